"""Members of Linux software RAID: superblocks 0.90, 1.0, 1.1 and 1.2.

Source: Linux include/uapi/linux/raid/md_p.h; 1.x little-endian, 0.90 in the machine's order
(here: little-endian).
"""

from __future__ import annotations

import struct
import uuid

from imager.allocation.model import Filesystem, Membership, read_if_inside, text, uuid_text
from imager.blocksource import BlockSource

_MAGIC = 0xA92B4EFC
_SECTOR = 512  # bytes; md counts in these whatever the disk has
_RESERVED_090 = 65536  # bytes at the end, and the alignment of the superblock
_MAX_DEVICES = 1920  # of a 1.x superblock of 4 KiB


def probe(source: BlockSource) -> Filesystem | None:
    """The member, labelled with its array's name, or None. Raises OSError."""
    sectors = source.size // _SECTOR
    for version, sector in (("1.2", 8), ("1.1", 0), ("1.0", (sectors - 16) & ~7)):
        found = _version_1(source, version, sector)
        if found:
            return found
    return _version_090(source)


def _version_1(source: BlockSource, version: str, sector: int) -> Filesystem | None:
    raw = read_if_inside(source, sector * _SECTOR, 4096)
    if raw[:8] != struct.pack("<II", _MAGIC, 1):
        return None
    (own_sector,) = struct.unpack_from("<Q", raw, 144)
    if own_sector != sector or not _sum_is_right(raw):
        return None
    level, _, _, _, disks = struct.unpack_from("<iIQII", raw, 72)
    (data_sectors,) = struct.unpack_from("<Q", raw, 136)
    set_id = uuid_text(raw[16:32])
    device_id = uuid_text(raw[168:184])
    return Filesystem(
        kind="md",
        label=text(raw[32:64]),
        uuid=set_id,
        size=data_sectors * _SECTOR,
        member_of=Membership("md", set_id or "", device_id or "", disks),
        notes=(f"superblock {version}", _level_note(level)),
    )


def _sum_is_right(raw: bytes) -> bool:
    (stored, most) = struct.unpack_from("<II", raw, 216)
    if most > _MAX_DEVICES:
        return False
    bare = raw[:216] + bytes(4) + raw[220 : 256 + 2 * most]
    total = sum(word for (word,) in struct.iter_unpack("<I", bare[: len(bare) // 4 * 4]))
    if len(bare) % 4:
        total += int.from_bytes(bare[-2:], "little")
    return bool((total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF == stored)


def _version_090(source: BlockSource) -> Filesystem | None:
    at = source.size // _RESERVED_090 * _RESERVED_090 - _RESERVED_090
    raw = read_if_inside(source, at, 4096)
    if raw[:12] != struct.pack("<III", _MAGIC, 0, 90):
        return None
    words = struct.unpack("<1024I", raw)
    set_id = str(uuid.UUID(bytes=struct.pack(">4I", words[5], *words[13:16])))
    level = words[7] - (1 << 32) if words[7] >> 31 else words[7]
    return Filesystem(
        kind="md",
        uuid=set_id,
        size=words[8] * 1024,
        member_of=Membership("md", set_id, str(words[992]), words[10]),
        notes=("superblock 0.90", _level_note(level)),
    )


def _level_note(level: int) -> str:
    """Negative levels: linear -1, multipath -4, faulty -5, container -100000."""
    return f"RAID level {level}"
