"""The promise itself: a captured server, restored to an empty disk, boots and has all its files."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.machines.debian_disk import BOOT_MARKER, GIB, Layout, debian_disk
from tests.machines.qemu import BOOT_SECONDS, Bus, Firmware, Machine
from tests.support.commandline import imager_alone

pytestmark = [
    pytest.mark.vm,
    # The first test also builds the disk (a minute) when it is not in the cache.
    pytest.mark.timeout(3 * BOOT_SECONDS),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: builds a disk, mounts"),
]


@pytest.fixture(scope="module")
def disk() -> Path:
    return debian_disk()


@pytest.fixture(scope="module")
def repository(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one image of the disk, named server."""
    repository = tmp_path_factory.mktemp("repository") / "images"
    document: dict[str, Any] = imager_alone(
        "capture", disk, "--repo", repository, "--name", "server", "--json"
    ).json
    assert document["image"]
    return repository


@pytest.fixture(scope="module", params=[0, 2 * GIB], ids=["same-size", "larger"])
def restored(
    request: pytest.FixtureRequest,
    disk: Path,
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The image on an empty sparse file, of the same size and larger."""
    target = tmp_path_factory.mktemp("restored") / "target.img"
    with target.open("wb") as file:
        file.truncate(disk.stat().st_size + request.param)
    imager_alone("restore", "server@latest", target, "--repo", repository, "--yes")
    yield target
    target.unlink()


def test_the_repository_verifies(repository: Path) -> None:
    imager_alone("verify", "--repo", repository)


@pytest.mark.parametrize(("firmware", "bus"), [("bios", "virtio"), ("uefi", "nvme")])
def test_restored_disk_boots(restored: Path, firmware: Firmware, bus: Bus) -> None:
    with Machine(restored, firmware=firmware, bus=bus) as machine:
        machine.expect(BOOT_MARKER, timeout_seconds=BOOT_SECONDS)
        machine.log_in()
        assert machine.run("systemctl --failed --no-legend") == ""
        assert machine.run("systemctl is-active ssh") == "active\n"
        # Swap and the ESP are found by UUID, as fstab names them.
        assert machine.run("swapon --noheadings | wc -l") == "1\n"
        assert machine.run("ls /boot/efi/EFI/BOOT") == "BOOTX64.EFI  grubx64.efi\n"


def test_restored_boot_partitions_are_identical(disk: Path, restored: Path) -> None:
    layout = Layout.for_size(disk.stat().st_size)
    for part in (layout.bios_boot, layout.esp):
        assert _bytes_of(restored, part.offset, part.size) == _bytes_of(
            disk, part.offset, part.size
        ), part.name


def test_restored_root_has_every_file(disk: Path, restored: Path) -> None:
    with ExitStack() as stack:
        original, copy = (
            stack.enter_context(_root_of(image, disk.stat().st_size)) for image in (disk, restored)
        )
        different = subprocess.run(
            ["diff", "--recursive", "--brief", "--no-dereference", original, copy],
            capture_output=True,
            text=True,
            check=False,
        )
    assert different.returncode == 0, different.stdout[:4000] + different.stderr[:4000]


def _bytes_of(image: Path, offset: int, size: int) -> bytes:
    with image.open("rb") as file:
        file.seek(offset)
        return file.read(size)


@contextmanager
def _root_of(image: Path, original_size: int) -> Iterator[Path]:
    """The root filesystem of a disk image, mounted read-only without its journal replayed."""
    part = Layout.for_size(original_size).root
    options = f"ro,noload,loop,offset={part.offset},sizelimit={part.size}"
    with tempfile.TemporaryDirectory(prefix="imager-root-") as mountpoint:
        subprocess.run(["mount", "-t", "ext4", "-o", options, image, mountpoint], check=True)
        try:
            yield Path(mountpoint)
        finally:
            subprocess.run(["umount", mountpoint], check=True)
