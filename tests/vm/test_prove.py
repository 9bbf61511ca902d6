"""A real Debian server proved, told apart from broken ones of each kind, run, and committed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imager.boot import BootJob, attend_machine, booted
from imager.guestcommand import LogIn, SerialCommand
from imager.loopdevice import loop_device
from imager.overlay import read_overlay
from imager.process import run
from imager.progress import NullProgress
from imager.repository import Repository
from tests.machines.debian_disk import ROOT_PASSWORD, Layout, copy_sparse, debian_disk
from tests.support.commandline import imager
from tests.support.disks import MIB, mounted

NAME = "debian"
BOOT_SECONDS = 900

# Emulated on a loaded machine, a sound system finds its disks later than systemd waits for them.
PATIENCE = "[Manager]\nDefaultDeviceTimeoutSec=15min\nDefaultTimeoutStartSec=15min\n"

pytestmark = [
    pytest.mark.vm,
    # The first test also builds the disk (a minute) when it is not in the cache.
    pytest.mark.timeout(2 * BOOT_SECONDS),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: builds a disk, mounts"),
]


class Lab:
    """A repository, and a disk that tests change and put back."""

    def __init__(self, repo: Path, disk: Path) -> None:
        self.repo, self.disk = repo, disk
        self.layout = Layout.for_size(disk.stat().st_size)

    def capture(self) -> str:
        words = ("capture", self.disk, "--repo", self.repo, "--name", NAME, "--json")
        image: str = imager(*words).json["image"]
        return image

    def prove(self, *words: object, image: str | None = None, code: int = 0) -> Any:
        options = ("--accel", "tcg", "--timeout", BOOT_SECONDS, "--repo", self.repo, "--json")
        return imager("prove", image or self.capture(), *options, *words, code=code).json

    @contextmanager
    def bytes_changed(self, offset: int, content: bytes) -> Iterator[None]:
        with self.disk.open("r+b") as file:
            file.seek(offset)
            before = file.read(len(content))
            file.seek(offset)
            file.write(content)
            file.flush()
            try:
                yield
            finally:
                file.seek(offset)
                file.write(before)

    @contextmanager
    def file_changed(
        self, tmp_path: Path, name: str, change: Callable[[str], str]
    ) -> Iterator[None]:
        """A file of the root filesystem, as long as the block runs."""
        with self._root(tmp_path) as root:
            before = (root / name).read_text()
            assert change(before) != before
            (root / name).write_text(change(before))
        try:
            yield
        finally:
            with self._root(tmp_path) as root:
                (root / name).write_text(before)

    @contextmanager
    def _root(self, tmp_path: Path) -> Iterator[Path]:
        place = self.layout.root
        with (
            loop_device(str(self.disk), offset=place.offset, size=place.size) as device,
            mounted(device, tmp_path / "root") as root,
        ):
            yield root


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("prove")
    repo, disk = folder / "repo", folder / "debian.img"
    copy_sparse(debian_disk(), disk)
    imager("repo", "init", "--repo", repo)
    made = Lab(repo, disk)
    with made._root(folder) as root:
        patience = root / "etc/systemd/system.conf.d/patience.conf"
        patience.parent.mkdir()
        patience.write_text(PATIENCE)
    return made


def test_nothing_to_boot_for_a_bios(lab: Lab) -> None:
    with lab.bytes_changed(510, b"\0\0"):
        proof = lab.prove(code=1)
    assert proof["cause"] == "not-bootable", proof


def test_no_grub_core(lab: Lab) -> None:
    with lab.bytes_changed(lab.layout.bios_boot.offset, bytes(MIB)):
        proof = lab.prove(code=1)
    assert proof["cause"] in ("grub-core", "reset-loop"), proof


def test_grub_without_a_kernel(lab: Lab, tmp_path: Path) -> None:
    def change(text: str) -> str:
        return text.replace("/boot/vmlinuz", "/boot/no-vmlinuz").replace("initrd /", "initrd /no-")

    with lab.file_changed(tmp_path, "boot/grub/grub.cfg", change):
        proof = lab.prove(code=1)
    assert proof["cause"] == "grub-no-kernel", proof


def test_a_panic_by_a_wrong_root(lab: Lab, tmp_path: Path) -> None:
    def change(text: str) -> str:
        lines = [line for line in text.splitlines() if "initrd" not in line]
        return "\n".join(lines).replace("root=UUID=", "root=/dev/no-disk-") + "\n"

    with lab.file_changed(tmp_path, "boot/grub/grub.cfg", change):
        proof = lab.prove(code=1)
    assert proof["cause"] == "panic", proof
    assert "root" in proof["reason"]


def test_emergency_by_a_bad_fstab(lab: Lab, tmp_path: Path) -> None:
    lost = "UUID=11111111-2222-4333-8444-555555555555 /srv ext4 x-systemd.device-timeout=1s 0 2\n"
    with lab.file_changed(tmp_path, "etc/fstab", lambda text: text + lost):
        proof = lab.prove(code=1)
    assert proof["cause"] == "emergency", proof


def test_no_loader_for_uefi(lab: Lab) -> None:
    with lab.bytes_changed(lab.layout.esp.offset, bytes(MIB)):
        proof = lab.prove("--firmware", "uefi", code=1)
    assert proof["cause"] == "not-bootable", proof


def test_a_server_without_a_serial_console(lab: Lab, tmp_path: Path) -> None:
    """Its login is found in the kernel's own buffer of a graphical screen."""

    def change(text: str) -> str:
        return text.replace(" console=ttyS0,115200", "")

    with lab.file_changed(tmp_path, "boot/grub/grub.cfg", change):
        proof = lab.prove()
    assert (proof["verdict"], proof["hardware"]["firmware"]) == ("proved", "bios")
    console, picture = map(Path, proof["evidence"])
    serial, _, screen = console.read_text().partition("--- screen ---")
    assert "login:" not in serial
    assert "tty1" in screen
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_uefi_and_a_command_in_the_guest(lab: Lab, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(f"{ROOT_PASSWORD}\n")
    login = ("--user", "root", "--password-file", password)
    proof = lab.prove(
        *("--firmware", "uefi", "--sign", "command=test -d /sys/firmware/efi -a -d /etc/ssh"),
        *login,
    )
    assert proof["verdict"] == "proved", proof
    assert "imager-end 0" in Path(proof["evidence"][0]).read_text()
    assert imager("list", "--repo", lab.repo).code == 0


def test_run_change_and_commit(lab: Lab, tmp_path: Path) -> None:
    """The commit has the root digest of a full capture of the disk that the machine left."""
    image = lab.capture()
    overlay = tmp_path / "run.qcow2"
    repository = Repository.open(str(lab.repo))
    manifest = repository.manifest(image)
    job = BootJob(overlay=overlay, acceleration="tcg")
    with booted(repository, manifest, NullProgress(), job) as machine:
        change = "echo changed > /root/note; sync; systemctl --no-block poweroff"
        typed = SerialCommand(machine.serial, LogIn("root", ROOT_PASSWORD), change)
        deadline = time.monotonic() + BOOT_SECONDS
        while typed.step() is None and not machine.ended and time.monotonic() < deadline:
            machine.control.wait_for_end(0.2)
        assert attend_machine(machine, NullProgress()) == "the machine switched itself off"
    assert read_overlay(overlay).base.image == image
    made = imager("commit", overlay, "--note", "a note", "--repo", lab.repo, "--json").json
    assert (made["name"], made["previous"]) == (NAME, image)
    assert made["note"] == "a note"

    left = tmp_path / "left.img"
    source = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(overlay)},
        "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(lab.disk)}},
    }
    run(["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(source)}", str(left)])
    full = imager("capture", left, "--name", "left", "--repo", lab.repo, "--json").json
    assert full["disks"][0]["root"] == made["disks"][0]["root"]
    with Lab(lab.repo, left)._root(tmp_path) as root:
        assert (root / "root/note").read_text() == "changed\n"
