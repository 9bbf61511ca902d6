"""After a restore, in a machine that was started by UEFI: the firmware's own variables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bootmedia.guest.afterwards import finish
from bootmedia.guest.bootentry import EFIVARS, Variables
from imager.diskidentity import DiskIdentity
from imager.extents import Extent
from imager.format import Place
from imager.manifest import Disk, Manifest
from imager.plan import RestoreOptions, RestorePlan
from imager.process import run
from tests.support.disks import mounted

MIB = 1 << 20
ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    """A disk with an ESP that has a shim but no fallback."""
    if not EFIVARS.parent.is_dir():
        pytest.skip("this machine was started by BIOS: tests/vm/test_boot_entry.py does")
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    run(["sfdisk", "--quiet", str(path)], input_bytes=f"label: gpt\ntype={ESP_TYPE}\n".encode())
    run(["modprobe", "vfat"], accept=range(256))
    run(["modprobe", "efivarfs"], accept=range(256))
    device = run(["losetup", "--find", "--show", "--partscan", str(path)]).stdout.decode().strip()
    try:
        run(["mkfs.vfat", f"{device}p1"])
        with mounted(f"{device}p1", tmp_path / "esp") as esp:
            (esp / "EFI/debian").mkdir(parents=True)
            (esp / "EFI/debian/shimx64.efi").write_bytes(b"shim")
            (esp / "EFI/debian/grubx64.efi").write_bytes(b"grub")
        yield device
    finally:
        run(["losetup", "--detach", device])


def plan_for(target: str) -> RestorePlan:
    return RestorePlan(
        image="i",
        disk="sda",
        options=RestoreOptions(),
        source=Extent(0, 64 * MIB),
        target=target,
        target_exists=True,
        target_size=64 * MIB,
        target_offset=0,
        identity=DiskIdentity(),
        overwrites=(),
        steps=(),
        warnings=(),
        missing=(),
        refusals=(),
        resumes=False,
        stale_gpt=None,
        data_bytes=0,
        packs=0,
    )


def test_entry_and_fallback(target: str, tmp_path: Path) -> None:
    disk = Disk("sda", 64 * MIB, 1 << 18, 1, Place(bytes(16), 0), "", {})
    manifest = Manifest("i", 1 << 18, (disk,), {"name": "web"})

    def run_it() -> tuple[str, ...]:
        said: list[str] = []
        lines = finish(
            *(manifest, disk, plan_for(target), target),
            fill_fallback=True,
            boot_entry=True,
            log=said.append,
        )
        assert list(lines) == said
        print(*lines, sep="\n")
        return lines

    first = run_it()
    assert any("added to the EFI system partition" in line for line in first)
    assert any("a new UEFI boot entry" in line for line in first)
    second = run_it()
    assert not any("added" in line for line in second)
    assert any("the UEFI boot entry that was there" in line for line in second)
    with mounted(f"{target}p1", tmp_path / "esp") as esp:
        assert (esp / "EFI/BOOT/BOOTX64.EFI").read_bytes() == b"shim"
        assert (esp / "EFI/BOOT/grubx64.efi").read_bytes() == b"grub"
    variables = Variables()
    entry = variables.boot_entries()[variables.boot_order()[0]]
    assert (entry.description, entry.path) == ("debian", "\\EFI\\debian\\shimx64.efi")
