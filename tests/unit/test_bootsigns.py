"""What consoles say, as text: signs of a system that is up, and dead ends told apart."""

from __future__ import annotations

import pytest

from imager.bootsigns import (
    LOGIN,
    Sign,
    find_dead_end,
    parse_sign,
    stopped_in_first_stage,
    target_reached,
)
from imager.errors import UsageError


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("login", Sign()),
        ("target=multi-user", Sign("target", "multi-user")),
        ("port=22", Sign("port", "22")),
        ("command=test a = b", Sign("command", "test a = b")),
    ],
)
def test_signs(text: str, sign: Sign) -> None:
    assert parse_sign(text) == sign
    assert str(sign) == text


@pytest.mark.parametrize(
    "text", ["", "login=x", "target", "target=", "port=0", "port=70000", "port=ssh", "ping=1"]
)
def test_no_signs(text: str) -> None:
    with pytest.raises(UsageError):
        parse_sign(text)


@pytest.mark.parametrize("text", ["web1 login: ", "\nweb1.example.org login: \n[ 9.1] late news"])
def test_a_login(text: str) -> None:
    assert LOGIN.search(text)


@pytest.mark.parametrize("text", ["Last login: Tue", "systemd-logind: New login: x", "a b login: "])
def test_no_login(text: str) -> None:
    assert not LOGIN.search(text)


def test_targets() -> None:
    said = "[  OK  ] Reached target multi-user.target - Multi-User System."
    assert target_reached("multi-user").search(said)
    assert target_reached("multi-user.target").search(said)
    assert target_reached("Multi-User").search("Reached target Multi-User System.")
    assert not target_reached("graphical").search(said)


PANIC = "[    3.1] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"
CONSOLES = {
    "panic": PANIC,
    "no-root": "ALERT!  UUID=5c does not exist.  Dropping to a shell!\n\n(initramfs) ",
    "emergency": 'You are in emergency mode. After logging in, type "journalctl -xb"',
    "grub-no-kernel": (
        "error: file `/boot/vmlinuz' not found.\nerror: you need to load the kernel first.\n"
        "\nPress any key to continue..."
    ),
    "grub-rescue": "error: unknown filesystem.\nEntering rescue mode...\ngrub rescue> ",
    "grub-prompt": "  Minimal BASH-like line editing is supported.\n\ngrub> ",
    "signature": 'BdsDxe: failed to load Boot0001 "UEFI HARDDISK": Access Denied',
    "not-bootable": "BdsDxe: No bootable option or device was found.",
}


@pytest.mark.parametrize("cause", CONSOLES)
def test_dead_ends(cause: str) -> None:
    found = find_dead_end(f"some lines\nbefore\n{CONSOLES[cause]}")
    assert found is not None and found[0].kind == cause


def test_a_dead_end_says_more() -> None:
    found = find_dead_end(PANIC)
    assert found is not None
    assert found[1] == ("the kernel panicked: VFS: Unable to mount root fs on unknown-block(0,0)")
    found = find_dead_end(CONSOLES["grub-no-kernel"])
    assert found is not None and "not found" in found[1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Welcome to GRUB!\n\n  Booting `Debian GNU/Linux'\n\nweb1 login: ",
        "Run fsck. error: no suitable video mode found.\nBooting in blind mode",
        "[ 1.0] ACPI: SPCR: Unexpected. emergency restart handler",
    ],
)
def test_no_dead_ends(text: str) -> None:
    assert find_dead_end(text) is None


def test_the_first_stage_of_grub() -> None:
    assert stopped_in_first_stage("Booting from Hard Disk...\nGRUB ")
    assert not stopped_in_first_stage("GRUB loading.\nWelcome to GRUB!")
    assert not stopped_in_first_stage("")
