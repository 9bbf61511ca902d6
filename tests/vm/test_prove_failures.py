"""Disks of one boot sector that fail, or come up, in each way that a machine can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imager.boot import BootJob, booted
from imager.bootsigns import Sign
from imager.bootwatch import watch
from imager.imagedrives import image_drives
from imager.machine import MachineJob, running_machine
from imager.progress import NullProgress
from imager.proofs import latest_proofs
from imager.qemu import BUSES, CARDS, Hardware
from imager.repository import Repository
from tests.support.commandline import imager

pytestmark = pytest.mark.vm

# 16-bit code at 0x7c00: prints the text behind it with the BIOS, then halts.
_PRINT = bytes.fromhex(
    "31c08ed8fcbe187c"  # xor ax,ax; mov ds,ax; cld; mov si,0x7c18
    "ac84c07406b40ecd10"  # lodsb; test al,al; jz end; mov ah,0x0e; int 0x10
    "ebf5faf4ebfc"  # jmp lodsb; end: cli; hlt; jmp end
    "90"
)
_RESET = bytes.fromhex("eaf0ff00f0")  # jmp 0xf000:0xfff0
_POWER_OFF = bytes.fromhex("b80753bb0100b90300cd15faf4ebfc")  # APM: set power state, off


def printing(text: str) -> bytes:
    assert len(_PRINT) == 0x18
    return _PRINT + text.replace("\n", "\r\n").encode() + b"\0"


def make_image(repo: Path, tmp_path: Path, code: bytes, *, signature: bytes = b"\x55\xaa") -> str:
    """An image of a small disk whose boot sector has this code."""
    disk = tmp_path / "tiny.img"
    disk.write_bytes(code.ljust(510, b"\0") + signature + bytes(1 << 20))
    image: str = imager("capture", disk, "--repo", repo, "--json").json["image"]
    return image


def prove(repo: Path, image: str, *words: object, code: int, timeout: int = 120) -> Any:
    options = ("--accel", "tcg", "--memory", "128M", "--timeout", timeout, "--json")
    return imager("prove", image, "--repo", repo, *options, *words, code=code).json


CASES = {
    "panic": ("Kernel panic - not syncing: VFS: no root", "the kernel panicked: VFS: no root"),
    "no-root": ("ALERT!  UUID=12 does not exist.  Dropping to a shell!", "UUID=12 does not exist"),
    "emergency": ("You are in emergency mode. After logging in,", "emergency mode"),
    "grub-rescue": ("error: no such device: 12.\ngrub rescue> ", "rescue shell"),
    "grub-core": ("GRUB GRUB GRUB GRUB ", "no core image"),
}


@pytest.mark.parametrize("cause", CASES)
def test_the_screen_says_why(repo: Path, tmp_path: Path, cause: str) -> None:
    said, words = CASES[cause]
    image = make_image(repo, tmp_path, printing(f"\n{said}"))
    proof = prove(repo, image, code=1)
    assert (proof["verdict"], proof["cause"]) == ("failed", cause), proof
    assert words in proof["reason"]
    console, picture = map(Path, proof["evidence"])
    assert said.splitlines()[-1].strip() in console.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_boot(repo: Path, tmp_path: Path) -> None:
    proof = prove(repo, make_image(repo, tmp_path, b"", signature=b"\0\0"), code=1)
    assert proof["cause"] == "not-bootable", proof


def test_a_reset_loop(repo: Path, tmp_path: Path) -> None:
    proof = prove(repo, make_image(repo, tmp_path, _RESET), code=1)
    assert proof["cause"] == "reset-loop", proof


def test_it_switches_itself_off(repo: Path, tmp_path: Path) -> None:
    proof = prove(repo, make_image(repo, tmp_path, _POWER_OFF), code=1)
    assert proof["cause"] == "power-off", proof


def test_a_machine_that_says_nothing(repo: Path, tmp_path: Path) -> None:
    proof = prove(repo, make_image(repo, tmp_path, bytes.fromhex("faf4ebfc")), code=1, timeout=10)
    assert proof["cause"] == "timeout", proof


def test_a_login_on_the_screen_alone(repo: Path, tmp_path: Path) -> None:
    """Proved although it says nothing on the serial line; the image stays as it was."""
    image = make_image(repo, tmp_path, printing("\nweb1 login: "))
    before = (repo / f"manifests/{image}.json").read_bytes()
    picture = tmp_path / "screen.png"
    proof = prove(repo, image, "--picture", picture, code=0)
    assert (proof["verdict"], proof["sign"], proof["cause"]) == ("proved", "login", "")
    assert picture.read_bytes() == Path(proof["evidence"][1]).read_bytes()
    assert (repo / f"manifests/{image}.json").read_bytes() == before
    (stored,) = latest_proofs(Repository.open(str(repo))).values()
    assert stored.proved and stored.hardware is not None and stored.hardware.firmware == "bios"


def test_a_target_on_the_screen(repo: Path, tmp_path: Path) -> None:
    said = "\nweb1 login: \n[  OK  ] Reached target multi-user.target - Multi-User System."
    image = make_image(repo, tmp_path, printing(said))
    prove(repo, image, "--sign", "target=multi-user", code=0)
    proof = prove(repo, image, "--sign", "target=graphical", code=1, timeout=10)
    assert proof["cause"] == "timeout"


@pytest.mark.parametrize("bus", BUSES)
def test_every_bus_and_card_runs(repo: Path, tmp_path: Path, bus: str) -> None:
    image = make_image(repo, tmp_path, printing("\nweb1 login: "))
    repository = Repository.open(str(repo))
    cards = list(CARDS)
    hardware = Hardware(bus=bus, card=cards[list(BUSES).index(bus) % len(cards)], memory=128 << 20)
    with image_drives(repository, repository.manifest(image)) as drives:
        job = MachineJob(hardware, drives, "tcg", network="isolated")
        with running_machine(job) as machine:
            outcome, evidence = watch(machine, Sign(), timeout_seconds=120)
    assert outcome.proved, evidence.console


def test_several_disks(repo: Path, tmp_path: Path) -> None:
    """It boots from the first; overlays that are kept have a file each."""
    first, second = tmp_path / "first.img", tmp_path / "second.img"
    code = printing("\nweb1 login: ").ljust(510, b"\0") + b"\x55\xaa"
    first.write_bytes(code + bytes(1 << 20))
    second.write_bytes(b"data" * (1 << 18))
    words = ("capture", first, second, "--name", "web1", "--repo", repo, "--json")
    image = imager(*words).json["image"]
    assert prove(repo, image, code=0)["verdict"] == "proved"
    overlay = tmp_path / "run.qcow2"
    repository = Repository.open(str(repo))
    job = BootJob(overlay=overlay, acceleration="tcg", memory=128 << 20)
    for _ in range(2):  # made, and gone on with
        with booted(repository, repository.manifest(image), NullProgress(), job) as machine:
            assert machine.control.execute("query-status")["running"]
    assert sorted(path.name for path in tmp_path.glob("run.*")) == [
        "run.qcow2.first",
        "run.qcow2.second",
    ]
    made = imager("commit", overlay, "--repo", repo, "--json").json
    before = [disk.root for disk in repository.manifest(image).disks]
    assert [disk["root"] for disk in made["disks"]] == before
