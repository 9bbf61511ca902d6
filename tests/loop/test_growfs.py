"""Filesystems of a small disk that was copied to a bigger one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.errors import NotRecognized, UnsupportedError
from imager.growfs import can_grow, grow_filesystem
from imager.loopdevice import loop_device
from imager.partitions import Partition, read_partition_table
from imager.tableedit import grow_last_partition
from tests.support.disks import unmount

MIB = 1 << 20

MAKERS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-U", "11111111-2222-3333-4444-555555555555"],
    "ext2": ["mkfs.ext2", "-q", "-F", "-b", "1024"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}

CHECKERS = {
    "ext4": ["e2fsck", "-f", "-n"],
    "ext2": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check"],
}

pytestmark = [
    pytest.mark.loop,
    pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root"),
]


def tool(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def make_disk(path: Path, size: int) -> Partition:
    with path.open("wb") as file:
        file.truncate(size)
    tool("sfdisk", "--quiet", str(path), text="label: gpt\nstart=1M, type=L\n")
    with FileSource(path) as source:
        return read_partition_table(source).partitions[0]


def mounted_size(device: str, folder: Path, *, write: bool) -> int:
    """Mount, write or check a file, and return the filesystem's size in bytes."""
    folder.mkdir(exist_ok=True)
    tool("mount", device, str(folder))
    try:
        if write:
            (folder / "file").write_bytes(b"kept" * 100_000)
        assert (folder / "file").read_bytes() == b"kept" * 100_000
        return shutil.disk_usage(folder).total
    finally:
        unmount(folder)


@pytest.mark.parametrize("kind", MAKERS)
def test_grow(tmp_path: Path, kind: str) -> None:
    if not shutil.which(MAKERS[kind][0]):
        pytest.skip(f"{MAKERS[kind][0]} is not installed")
    path = tmp_path / "disk.img"
    old = make_disk(path, 360 * MIB)
    with loop_device(str(path), old.offset, old.size) as device:
        tool(*MAKERS[kind], device)
        before = mounted_size(device, tmp_path / "mnt", write=True)
    with path.open("r+b") as file:
        file.truncate(720 * MIB)
    new = grow_last_partition(str(path))
    assert new is not None
    for _ in range(2):  # a second time changes nothing
        grow_filesystem(str(path), new.offset, new.size, kind)
    with loop_device(str(path), new.offset, new.size) as device:
        tool(*CHECKERS[kind], device)
        after = mounted_size(device, tmp_path / "mnt", write=False)
    assert after > before + 300 * MIB


def test_grow_on_a_disk_of_4096_byte_sectors(tmp_path: Path) -> None:
    path = tmp_path / "fs.img"
    with path.open("wb") as file:
        file.truncate(320 * MIB)
    with loop_device(str(path), sector_size=4096) as device:
        tool("mkfs.xfs", "-q", "-f", device)
    with path.open("r+b") as file:
        file.truncate(640 * MIB)
    grow_filesystem(str(path), 0, 640 * MIB, "xfs", sector_size=4096)
    with loop_device(str(path), sector_size=4096) as device:
        tool("xfs_repair", "-n", device)
        assert mounted_size(device, tmp_path / "mnt", write=True) > 500 * MIB


@pytest.mark.parametrize("page", [4096, 65536])
def test_grow_swap(tmp_path: Path, page: int) -> None:
    path = tmp_path / "swap.img"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    tool("mkswap", "-q", "-p", str(page), "-U", uuid, "-L", "schwäp", str(path))
    with path.open("r+b") as file:
        file.truncate(32 * MIB)
    grow_filesystem(str(path), 0, 32 * MIB, "swap")
    head = path.read_bytes()[:65536]
    assert head[page - 10 : page] == b"SWAPSPACE2"
    assert int.from_bytes(head[1028:1032], "little") == 32 * MIB // page - 1
    assert head[1036:1052].hex() == uuid.replace("-", "")
    assert head[1052:1068].rstrip(b"\0").decode() == "schwäp"


def test_a_hibernated_system_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "swap.img"
    path.write_bytes(bytes(MIB))
    tool("mkswap", "-q", str(path))
    with path.open("r+b") as file:
        file.seek(4086)
        file.write(b"S1SUSPEND\0")
    content = path.read_bytes()
    with pytest.raises(NotRecognized, match="hibernation"):
        grow_filesystem(str(path), 0, MIB, "swap")
    assert path.read_bytes() == content


@pytest.mark.skipif(not shutil.which("mkfs.btrfs"), reason="mkfs.btrfs is not installed")
def test_btrfs_of_two_devices_is_left_alone(tmp_path: Path) -> None:
    paths = [tmp_path / "a.img", tmp_path / "b.img"]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(128 * MIB)
    tool("mkfs.btrfs", "-q", "-f", "-d", "raid1", "-m", "raid1", *map(str, paths))
    with pytest.raises(UnsupportedError, match="2 devices"):
        grow_filesystem(str(paths[1]), 0, 128 * MIB, "btrfs")


def test_unknown_kinds(tmp_path: Path) -> None:
    for kind in ("LVM2_member", "vfat", "zfs_member"):
        assert not can_grow(kind)
        with pytest.raises(UnsupportedError, match=kind) as caught:
            grow_filesystem(str(tmp_path / "none"), 0, MIB, kind)
        assert caught.value.hint


def test_loop_device_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "file.img"
    path.write_bytes(bytes(4 * MIB))
    with pytest.raises(ZeroDivisionError), loop_device(str(path), MIB, 2 * MIB) as device:
        backing = Path("/sys/block") / Path(device).name / "loop/backing_file"
        assert backing.read_text().strip() == str(path)
        with Path(device).open("r+b") as file:
            file.write(b"written")
            assert file.seek(0, os.SEEK_END) == 2 * MIB
        raise ZeroDivisionError
    assert not backing.exists() or backing.read_text().strip() != str(path)
    assert path.read_bytes()[MIB : MIB + 7] == b"written"
