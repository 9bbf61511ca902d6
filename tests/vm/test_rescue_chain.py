"""The whole way: a server is imaged, a rescue medium made, an empty machine booted from it, the
image restored by its menu, and the server boots from the disk alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.machines.debian_disk import debian_disk
from tests.machines.qemu import BOOT_SECONDS, Bus, Disk, Firmware, Machine
from tests.support.commandline import imager_alone
from tests.vm.rescue import Person, build

pytestmark = [pytest.mark.vm, pytest.mark.timeout(4 * BOOT_SECONDS)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("chain") / "images"
    imager_alone("repo", "init", "--repo", repository)
    imager_alone("capture", debian_disk(), "--repo", repository, "--name", "server")
    return repository


@pytest.fixture(scope="module")
def medium(repository: Path) -> Path:
    iso = repository.with_name("rescue.iso")
    return build(iso, "--repo", repository, "--image", "server@latest")


WAYS: dict[str, tuple[Firmware, str, Bus]] = {
    "bios-cd-to-virtio": ("bios", "cdrom", "virtio"),
    "uefi-usb-to-nvme": ("uefi", "usb", "nvme"),
    "secure-boot-cd-to-sata": ("secure-boot", "cdrom", "sata"),
    "bios-usb-to-scsi": ("bios", "usb", "scsi"),
    "uefi-cd-to-usb": ("uefi", "cdrom", "usb"),
}


@pytest.mark.parametrize("way", WAYS)
def test_from_medium_to_login(way: str, medium: Path, tmp_path: Path) -> None:
    firmware, media, bus = WAYS[way]
    target = tmp_path / "target.img"
    with target.open("wb") as file:
        file.truncate(debian_disk().stat().st_size)
    begun = time.monotonic()
    with Machine(
        firmware=firmware, disks=[Disk(target, bus, keep=True)], **{media: medium}
    ) as machine:
        person = Person(machine)
        ready = person.wait_until_ready()
        print(f"{way}: ready {time.monotonic() - begun:.1f} s after power-on")
        assert ("secure boot=on" in ready) == (firmware == "secure-boot")
        begun = time.monotonic()
        said = person.restore()
        print(f"{way}: planned and restored in {time.monotonic() - begun:.1f} s")
        assert "is restored to" in said
        assert ("UEFI boot entry, Boot" in said) == (firmware != "bios")
        machine.send("y")
        machine.wait_for_end(timeout_seconds=60)
    # A machine that never saw this disk: its firmware has no entry of it.
    with Machine(target, firmware=firmware, bus=bus) as machine:
        begun = time.monotonic()
        machine.log_in()
        print(f"{way}: login {time.monotonic() - begun:.1f} s after power-on")
        assert machine.run("hostname").strip() == "imager-test"
        if firmware == "secure-boot":
            # The value is the variable's last byte; four bytes of attributes go before it.
            value = machine.run("od -An -tu1 -j4 /sys/firmware/efi/efivars/SecureBoot-*")
            assert value.strip() == "1"
