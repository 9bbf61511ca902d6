"""Superblock readers against real mkfs programs, with blkid's low-level probe as the witness."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.allocation import Filesystem, allocation_map, identify
from imager.blocksource import FileSource
from imager.process import find_tool, run
from tests.loop import allocation_lab
from tests.loop.allocation_lab import MIB

pytestmark = pytest.mark.loop
memory_path = allocation_lab.memory_path  # the fixture

LUKS = "cryptsetup luksFormat -q --pbkdf-force-iterations 1000"

# Program and options, size in MiB; blkid names the same kinds otherwise in some cases.
MADE = {
    "ext2": ("mkfs.ext2 -q -F -L ext-label", 8),
    "ext3": ("mkfs.ext3 -q -F -L ext-label", 16),
    "ext4": ("mkfs.ext4 -q -F -L ext-label -b 1024", 64),
    "ext4-dev": ("mkfs.ext4 -q -F -E test_fs", 64),
    "jbd": ("mkfs.ext4 -q -F -O journal_dev -L journal", 16),
    "xfs": ("mkfs.xfs -q -f -L xfs-label", 320),
    "xfs-1k": ("mkfs.xfs -q -f -b size=1024 -L 123456789012", 320),
    "btrfs": ("mkfs.btrfs -q -f -L btrfs-label", 128),
    "btrfs-mixed": ("mkfs.btrfs -q -f --mixed", 64),
    "fat12": ("mkfs.vfat -F 12 -n FAT12LABEL", 4),
    "fat16": ("mkfs.vfat -F 16 -n FAT16LABEL", 32),
    "fat32": ("mkfs.vfat -F 32 -n FAT32LABEL", 64),
    "fat32-no-label": ("mkfs.vfat -F 32 -S 4096", 300),
    "exfat": ("mkfs.exfat -L exfat-label", 32),
    "ntfs": ("mkfs.ntfs -q -F -f -L ntfs-label", 32),
    "ntfs-64k": ("mkfs.ntfs -q -F -f -c 65536", 64),
    "f2fs": ("mkfs.f2fs -q -f -l f2fs-label", 64),
    "swap": ("mkswap -q -L swap-label", 8),
    "swap-64k": ("mkswap -q -p 65536 -L swap-label", 8),
    "luks1": (f"{LUKS} --type luks1", 16),
    "luks2": (f"{LUKS} --type luks2 --label luks-label --pbkdf pbkdf2", 32),
}


def _make(path: Path, line: str, size: int) -> Path:
    """Needs the program; others' leftovers (0xA5) everywhere that it doesn't write."""
    program, *options = line.split()
    if find_tool(program) is None:
        pytest.skip(f"{program} is not installed")
    with path.open("wb") as file:
        for _ in range(size):
            file.write(b"\xa5" * MIB)
    run([program, *options, str(path)], input_bytes=b"password")
    return path


def _identify(path: Path) -> Filesystem:
    with FileSource(path) as source:
        found = identify(source)
        assert Filesystem.from_json(found.to_json()) == found
    return found


def _blkid(path: Path) -> dict[str, str]:
    lines = run(["blkid", "-p", "-o", "export", str(path)]).stdout.decode().splitlines()
    return dict(line.replace("\\ ", " ").split("=", 1) for line in lines if "=" in line)


@pytest.mark.parametrize("name", MADE)
def test_same_as_blkid_and_no_raise_when_damaged(memory_path: Path, name: str) -> None:
    line, size = MADE[name]
    image = _make(memory_path / "image", line, size)
    found, told = _identify(image), _blkid(image)
    assert {"crypto_LUKS": "luks"}.get(told["TYPE"], told["TYPE"]) in (found.kind, "ext4dev")
    assert (found.label, found.uuid) == (told.get("LABEL"), told.get("UUID"))
    if "FSSIZE" in told and found.kind != "xfs":  # blkid leaves the XFS log out
        assert found.size is not None and abs(found.size - int(told["FSSIZE"])) <= 4096
    if found.size is not None:
        assert 0.9 * size * MIB <= found.size <= size * MIB
    if found.used_bytes is not None and found.size is not None:
        print(f"{found.used_bytes} of {found.size} bytes used when empty")
        assert 0 < found.used_bytes < found.size // 2 or found.kind == "jbd"
    _check_damaged(image, random.Random(name))


def _check_damaged(image: Path, chance: random.Random) -> None:
    """Whatever is in the superblocks: an answer, and a map within the source."""
    with image.open("r+b", buffering=0) as file:
        head = file.read(MIB)
        for _ in range(25):
            damaged = bytearray(head)
            start = chance.choice((0, 0, 1024, 4096, 65536))
            for _ in range(chance.choice((1, 8, 200))):
                byte = chance.choice((0, 0xFF, chance.randrange(256)))
                damaged[start + chance.randrange(1024)] = byte
            file.seek(0)
            file.write(damaged)
            with FileSource(image) as source:
                identify(source)
                assert allocation_map(source).used.end <= source.size


@contextlib.contextmanager
def _loops(paths: list[Path]) -> Iterator[list[str]]:
    devices: list[str] = []
    try:
        for path in paths:
            devices.append(run(["losetup", "-f", "--show", str(path)]).stdout.decode().strip())
        yield devices
    finally:
        for device in devices:
            run(["losetup", "-d", device])


def _empty(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_btrfs_over_two_devices(memory_path: Path) -> None:
    paths = [_empty(memory_path / name, 128 * MIB) for name in ("a", "b")]
    run(["mkfs.btrfs", "-q", "-f", *map(str, paths)])
    found = [_identify(path).member_of for path in paths]
    assert [(m.set_kind, m.device_id, m.members) for m in found if m] == [
        ("btrfs", "1", 2),
        ("btrfs", "2", 2),
    ]
    assert found[0] and found[1] and found[0].set_id == found[1].set_id


def test_volume_group_over_two_devices(memory_path: Path) -> None:
    if find_tool("vgcreate") is None:
        pytest.skip("vgcreate is not installed")
    paths = [_empty(memory_path / name, 32 * MIB) for name in ("a", "b", "c")]
    with _loops(paths) as devices:
        filters = "devices { filter=[" + ",".join(f'"a|^{d}$|"' for d in devices) + ',"r|.*|"] }'
        config = ["--config", filters + " activation { udev_sync=0 udev_rules=0 }"]
        run(["pvcreate", "-q", *config, "-y", *devices])
        run(["vgcreate", "-q", *config, "vg_of-two", *devices[:2]])
        try:
            report = run(
                ["pvs", *config, "--noheadings", "-o", "pv_uuid,vg_uuid", *devices[:2]]
            ).stdout.decode()
            found = [_identify(path) for path in paths]
        finally:
            run(["vgremove", "-q", *config, "-f", "vg_of-two"])
    members = [filesystem.member_of for filesystem in found]
    told = sorted(tuple(line.split()) for line in report.splitlines())
    assert sorted((m.device_id, m.set_id) for m in members if m) == told
    assert [(m.set_kind, m.members) for m in members if m] == [("lvm", 2)] * 2
    assert [filesystem.label for filesystem in found] == ["vg_of-two", "vg_of-two", None]
    assert {filesystem.kind for filesystem in found} == {"lvm2"}


RAID_UUID = bytes.fromhex("3e1f9f433fbb4d4f9f5139b0cd54bd33")


def _raid_member(version: str, size: int) -> tuple[int, bytes]:
    """Offset and bytes of a member's superblock (md_p.h), as the md driver writes it."""
    if version == "0.90":
        offset = size // 65536 * 65536 - 65536
        words = [0] * 1024
        words[:6] = [0xA92B4EFC, 0, 90, 0, 0, int.from_bytes(RAID_UUID[:4], "big")]
        words[13:16] = struct.unpack(">3I", RAID_UUID[4:])
        words[7:11] = [1, offset // 1024, 2, 2]
        words[992] = 1
        words[38] = sum(words) & 0xFFFFFFFF
        return offset, struct.pack("<1024I", *words)
    sector = {"1.0": (size // 512 - 16) & ~7, "1.1": 0, "1.2": 8}[version]
    raw = bytearray(4096)
    struct.pack_into("<II", raw, 0, 0xA92B4EFC, 1)
    raw[16:32], raw[32:64] = RAID_UUID, b"host:array".ljust(32, b"\0")
    struct.pack_into("<iIQII", raw, 72, 1, 0, size // 512 - 2048, 0, 2)
    struct.pack_into("<QQQ", raw, 128, 0 if version == "1.0" else 2048, size // 512 - 2048, sector)
    raw[168:184] = RAID_UUID[::-1]
    struct.pack_into("<I", raw, 220, 128)
    raw[256 : 256 + 256] = struct.pack("<128H", 0, 1, *[0xFFFE] * 126)
    total = sum(struct.unpack("<128I", raw[:512]))
    struct.pack_into("<I", raw, 216, (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
    return sector * 512, bytes(raw)


@pytest.mark.parametrize("version", ["0.90", "1.0", "1.1", "1.2"])
def test_raid_member_is_no_filesystem(memory_path: Path, version: str) -> None:
    """A mirror with its superblock at the end shows its filesystem: the member comes first.

    Written here, because an array needs the md driver; blkid confirms the superblock."""
    image = _empty(memory_path / "image", 64 * MIB + 12345 * 512)
    offset, superblock = _raid_member(version, image.stat().st_size)
    if version in ("0.90", "1.0"):
        run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", str(image), "48M"])
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(superblock)
    found, told = _identify(image), _blkid(image)
    assert (found.kind, found.uuid) == ("md", told["UUID"])
    assert told["TYPE"] == "linux_raid_member"
    assert found.label == told.get("LABEL")
    assert found.member_of is not None and found.member_of.members == 2
    assert f"superblock {version}" in found.notes
    with FileSource(image) as source:
        assert allocation_map(source).certainty == "all"
