"""The superblocks 0.90, 1.0, 1.1 and 1.2 of a member, as one.

Source: Linux include/uapi/linux/raid/md_p.h and drivers/md/md.c; 1.x is little-endian, 0.90 in
the machine's order (here: little-endian). md counts in sectors of 512 bytes whatever the disk has.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from imager.allocation.model import read_if_inside, text, uuid_text
from imager.blocksource import BlockSource
from imager.extents import Extent

SECTOR = 512
_MAGIC = 0xA92B4EFC
_SIZE = 4096  # bytes of either kind of superblock
_RESERVED_090 = 65536  # bytes at the end, and the alignment of the superblock
_MAX_DEVICES = 1920  # that fit into a 1.x superblock
_MAX_SECTORS = 1 << 55
_NEVER = (1 << 64) - 1  # the place of a resync that is complete

# Of the 1.x feature map: those that say nothing of what the members hold.
_BITMAP, _BAD_BLOCKS = 1, 8
_FEATURES = {
    2: "it is being rebuilt",
    4: "the array is being reshaped",
    16: "it replaces another member",
    32: "the array is being reshaped",
    64: "the array is being reshaped",
    128: "it is being rebuilt",
    256: "the array is shared by a cluster",
    512: "the array has a journal device",
    1024: "the array has a partial parity log",
    2048: "the array has a partial parity log",
}
_DEVICE_FLAGS = 1 | 2  # write-mostly, fail-fast
_ROLES = {0xFFFF: "spare", 0xFFFE: "faulty", 0xFFFD: "the journal"}

# Of 0.90: bits of the array's state, and of a disk's.
_CLEAN_090, _BITMAP_090 = 1, 1 << 8
_FAULTY_090, _ACTIVE_090, _SYNC_090 = 1, 2, 4
_DISK_FLAGS_090 = 1 << 9 | 1 << 10  # write-mostly, fail-fast
_MAX_DISKS_090 = 27


@dataclass(frozen=True)
class Superblock:
    """What both kinds say. Offsets and sizes in bytes."""

    version: str
    own: Extent
    set_id: str
    device_id: str
    name: str | None
    level: int
    disks: int
    """Copies that a mirror should have."""
    data: Extent
    """Where the array's bytes lie."""
    events: int
    is_clean: bool
    """Nothing was being written and nothing was being synchronized: the members are the same."""
    active: int
    """How many members are in sync, this one included, as far as it knows."""
    role: int | None
    """Which of the copies it is; None for none."""
    metadata: tuple[Extent, ...]
    """Write-intent bitmap and bad block log; a length of 0 where it says nothing."""
    bad_blocks: Extent | None
    doubts: tuple[str, ...]
    """Why its map can't be that of what the array holds."""


def find_superblocks(source: BlockSource) -> Iterator[Superblock]:
    """Every superblock in its place; more than one is a doubt. Raises OSError."""
    sectors = source.size // SECTOR
    for version, sector in (("1.2", 8), ("1.1", 0), ("1.0", (sectors - 16) & ~7)):
        raw = read_if_inside(source, sector * SECTOR, _SIZE)
        if raw[:8] == struct.pack("<II", _MAGIC, 1) and raw[144:152] == struct.pack("<Q", sector):
            yield _version_1(version, sector, raw)
    at = source.size // _RESERVED_090 * _RESERVED_090 - _RESERVED_090
    raw = read_if_inside(source, at, _SIZE)
    if raw[:8] == struct.pack("<II", _MAGIC, 0):
        yield _version_090(at, raw)


# --- 1.x ----------------------------------------------------------------------------------------


def _version_1(version: str, sector: int, raw: bytes) -> Superblock:
    (features,) = struct.unpack_from("<I", raw, 8)
    level, _, size, _, disks, bitmap = struct.unpack_from("<iIQIIi", raw, 72)
    data_offset, data_size = struct.unpack_from("<QQ", raw, 128)
    (number,) = struct.unpack_from("<I", raw, 160)
    flags, _, log_size, log_offset = struct.unpack_from("<BBHi", raw, 184)
    events, resync = struct.unpack_from("<QQ", raw, 200)
    checksum, most = struct.unpack_from("<II", raw, 216)
    roles = struct.unpack_from(f"<{min(most, _MAX_DEVICES)}H", raw, 256)
    role = roles[number] if number < len(roles) else 0xFFFF
    metadata = [(bitmap, 0)] * bool(features & _BITMAP)
    log = [(log_offset, log_size)] * bool(features & _BAD_BLOCKS and log_size)
    places = [_beside(sector, *place) for place in (*metadata, *log)]
    doubts = [said for bit, said in _FEATURES.items() if features & bit]
    if unknown := features & ~(_BITMAP | _BAD_BLOCKS | sum(_FEATURES)):
        doubts.append(f"unknown feature bits {unknown:#x}")
    if most > _MAX_DEVICES or _sum_1(raw, most) != checksum:
        doubts.append("the checksum of its superblock is wrong")
    if role >= disks:
        doubts.append(f"it is {_ROLES.get(role, 'no member in use')}")
    if flags & ~_DEVICE_FLAGS:
        doubts.append(f"unknown device flags {flags:#x}")
    if not 0 < size <= data_size <= _MAX_SECTORS or data_offset > _MAX_SECTORS or None in places:
        doubts.append("impossible sizes in its superblock")
        data_offset = size = 0
    return Superblock(
        version=version,
        own=Extent(sector * SECTOR, _SIZE),
        set_id=uuid_text(raw[16:32]) or "",
        device_id=uuid_text(raw[168:184]) or "",
        name=text(raw[32:64]),
        level=level,
        disks=disks,
        data=Extent(data_offset * SECTOR, size * SECTOR),
        events=events,
        is_clean=resync == _NEVER,
        active=sum(1 for other in roles if other < disks),
        role=role if role < disks else None,
        metadata=tuple(place for place in places if place),
        bad_blocks=places[-1] if log else None,
        doubts=tuple(dict.fromkeys(doubts)),
    )


def _beside(sector: int, distance: int, count: int) -> Extent | None:
    """A place that the superblock names by its distance in sectors; None before the device."""
    start = sector + distance
    return Extent(start * SECTOR, count * SECTOR) if start >= 0 else None


def _sum_1(raw: bytes, most: int) -> int:
    bare = raw[:216] + bytes(4) + raw[220 : 256 + 2 * most]
    total = sum(word for (word,) in struct.iter_unpack("<I", bare[: len(bare) // 4 * 4]))
    if len(bare) % 4:
        total += int.from_bytes(bare[-2:], "little")
    return _folded(total)


# --- 0.90 ---------------------------------------------------------------------------------------


def _version_090(at: int, raw: bytes) -> Superblock:
    words = struct.unpack("<1024I", raw)
    level = words[7] - (1 << 32) if words[7] >> 31 else words[7]
    size, disks, state = words[8] * 1024, words[10], words[33]
    number = min(words[992], _MAX_DISKS_090)
    states = {n: (words[128 + 32 * n + 3], words[128 + 32 * n + 4]) for n in range(_MAX_DISKS_090)}
    in_sync = {
        n: role
        for n, (role, flags) in states.items()
        if flags & ~_DISK_FLAGS_090 == _ACTIVE_090 | _SYNC_090 and role < disks
    }
    doubts = []
    if words[2] != 90:
        doubts.append("the array is being reshaped" if words[2] == 91 else "unknown version")
    if _folded(sum(words) - words[38]) != words[38]:
        doubts.append("the checksum of its superblock is wrong")
    if state & ~(_CLEAN_090 | _BITMAP_090):
        doubts.append(f"unknown state {state:#x} of the array")
    if number not in in_sync:
        doubts.append("it is not in sync, or no member in use")
    return Superblock(
        version=f"0.{words[2]}" if words[2] < 100 else "0",
        own=Extent(at, _SIZE),
        set_id=str(uuid.UUID(bytes=struct.pack(">4I", words[5], *words[13:16]))),
        device_id=str(words[992]),
        name=None,
        level=level,
        disks=disks,
        data=Extent(0, size),
        events=words[40] << 32 | words[39],
        is_clean=bool(state & _CLEAN_090),
        active=len(in_sync),
        role=in_sync.get(number),
        metadata=(),
        bad_blocks=None,
        doubts=tuple(doubts),
    )


def _folded(total: int) -> int:
    """A sum of words as the driver folds it into one."""
    return (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF
