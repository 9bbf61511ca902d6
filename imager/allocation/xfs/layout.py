"""The XFS superblock and the headers of free space: bytes to values, and where things lie.

Source: Linux fs/xfs/libxfs/xfs_format.h, xfs_sb.c, xfs_alloc.c. All integers big-endian, but
for checksums: CRC-32C, inverted, little-endian, over the structure with the field zeroed.

Places are counted in blocks from the filesystem's start, in blocks from the start of an
allocation group, or in *basic blocks* of 512 bytes from the filesystem's start, as log and
btree blocks have them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

from imager.allocation.checksum import crc32c_of
from imager.allocation.model import require
from imager.errors import UnsupportedError

MAGIC = b"XFSB"
BASIC_BLOCK = 512  # bytes
SMALLEST_SECTOR = 512  # bytes; the superblock's fields lie within

_LARGEST_SECTOR = 32 << 10
_LARGEST_BLOCK = 64 << 10
_SMALLEST_GROUP = 64  # blocks
_MAX_LEVELS = 9  # of a btree (XFS_BTREE_MAXLEVELS)

# --- features -------------------------------------------------------------------------------------

_VERSION_4, _VERSION_5 = 4, 5
_VERSION_LOGV2 = 0x0400
_VERSION_DIRV2 = 0x2000
_VERSION_MOREBITS = 0x8000
_VERSION_KNOWN = 0xFFFF & ~0x0200  # all but the shared bit, which nobody ever defined

# lazysbcount, attr2, projid32, ftype
_FEATURES2_KNOWN = 0x2 | 0x8 | 0x80 | 0x200

# finobt, rmapbt, reflink, inobtcount
_RO_COMPAT_KNOWN = 0xF
_RO_COMPAT_RMAPBT, _RO_COMPAT_REFLINK = 0x2, 0x4
_INCOMPAT_META_UUID = 0x4
_INCOMPAT_NEEDS_REPAIR = 0x10
# ftype, sparse inodes, meta_uuid, bigtime, nrext64, exchange-range, parent pointers
_INCOMPAT_KNOWN = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80
# extended attributes by intents
_LOG_INCOMPAT_KNOWN = 0x1


def verify(data: bytes, checksum_offset: int, what: str) -> None:
    """Raises NotRecognized when the checksum in ``data`` at that offset is not its own."""
    stored = int.from_bytes(data[checksum_offset : checksum_offset + 4], "little")
    bare = b"".join((data[:checksum_offset], bytes(4), data[checksum_offset + 4 :]))
    register = crc32c_of(0xFFFFFFFF, bare)
    require(register ^ 0xFFFFFFFF == stored, f"the checksum of {what} is wrong")


@dataclass(frozen=True)
class Superblock:
    """What the map needs of a superblock. Counts in blocks unless the name says otherwise."""

    block_size: int
    blocks_count: int
    realtime_blocks: int
    uuid: bytes
    log_start: int
    """As a block address: group in the high bits, see ``log_first_block``."""
    group_blocks: int
    group_count: int
    log_blocks: int
    version: int
    sector_size: int
    label: bytes
    block_log: int
    group_log: int
    in_progress: int
    free_blocks: int
    features2: int
    ro_compat: int
    incompat: int
    log_incompat: int
    metadata_uuid: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """From the first 512 bytes or more. Raises NotRecognized without the magic."""

        def at(offset: int, code: str) -> int:
            return int(struct.unpack_from(f">{code}", raw, offset)[0])

        require(len(raw) >= SMALLEST_SECTOR and raw[:4] == MAGIC, "no XFS superblock")
        version = at(100, "H")
        is_5 = version & 0xF == _VERSION_5
        incompat = at(216, "I") if is_5 else 0
        own_uuid = raw[32:48]
        return cls(
            block_size=at(4, "I"),
            blocks_count=at(8, "Q"),
            realtime_blocks=at(16, "Q"),
            uuid=own_uuid,
            log_start=at(48, "Q"),
            group_blocks=at(84, "I"),
            group_count=at(88, "I"),
            log_blocks=at(96, "I"),
            version=version,
            sector_size=at(102, "H"),
            label=raw[108:120],
            block_log=raw[120],
            group_log=raw[124],
            in_progress=raw[126],
            free_blocks=at(144, "Q"),
            features2=at(200, "I") if version & _VERSION_MOREBITS or is_5 else 0,
            ro_compat=at(212, "I") if is_5 else 0,
            incompat=incompat,
            log_incompat=at(220, "I") if is_5 else 0,
            metadata_uuid=raw[248:264] if incompat & _INCOMPAT_META_UUID else own_uuid,
        )

    # --- features -----------------------------------------------------------------------------

    @property
    def has_checksums(self) -> bool:
        return self.version & 0xF == _VERSION_5

    @property
    def has_log_version_2(self) -> bool:
        return self.has_checksums or bool(self.version & _VERSION_LOGV2)

    @property
    def has_rmap(self) -> bool:
        return bool(self.ro_compat & _RO_COMPAT_RMAPBT)

    @property
    def has_reflink(self) -> bool:
        return bool(self.ro_compat & _RO_COMPAT_REFLINK)

    # --- geometry -----------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes."""
        return self.blocks_count * self.block_size

    @property
    def basic_blocks_per_block(self) -> int:
        return self.block_size // BASIC_BLOCK

    @property
    def basic_blocks_per_sector(self) -> int:
        return self.sector_size // BASIC_BLOCK

    @property
    def header_blocks(self) -> int:
        """Blocks at a group's start that hold its superblock copy, AGF, AGI and AGFL."""
        return -(-4 * self.sector_size // self.block_size)

    @cached_property
    def log_first_block(self) -> int:
        """From the filesystem's start."""
        group, block = divmod(self.log_start, 1 << self.group_log)
        return group * self.group_blocks + block

    def blocks_in(self, group: int) -> int:
        """Blocks of a group; the last may be short."""
        return min(self.group_blocks, self.blocks_count - group * self.group_blocks)

    def group_start(self, group: int) -> int:
        """Bytes."""
        return group * self.group_blocks * self.block_size

    # --- checks -------------------------------------------------------------------------------

    def check(self, source_size: int) -> None:
        """Raises UnsupportedError for unknown features, NotRecognized for any inconsistency."""
        self._check_features()
        self._check_geometry()
        require(
            self.size <= source_size,
            f"the filesystem has {self.size} bytes, the source only {source_size}",
        )
        if self.realtime_blocks:
            raise UnsupportedError("it has a realtime device")
        self._check_log()

    def _check_features(self) -> None:
        number = self.version & 0xF
        if number not in (_VERSION_4, _VERSION_5):
            raise UnsupportedError(f"unknown version {number}")
        require(bool(self.version & _VERSION_DIRV2), "directories of version 1")
        features2_known = _FEATURES2_KNOWN | (0x100 if number == _VERSION_5 else 0)
        for name, flags, known in (
            ("version", self.version, _VERSION_KNOWN),
            ("features2", self.features2, features2_known),
            ("ro_compat", self.ro_compat, _RO_COMPAT_KNOWN),
            ("incompat", self.incompat, _INCOMPAT_KNOWN | _INCOMPAT_NEEDS_REPAIR),
            ("log_incompat", self.log_incompat, _LOG_INCOMPAT_KNOWN),
        ):
            if flags & ~known:
                raise UnsupportedError(f"unknown {name} feature bits {flags & ~known:#x}")
        require(not self.incompat & _INCOMPAT_NEEDS_REPAIR, "it is marked as needing repair")
        require(not self.in_progress, "its mkfs did not finish")

    def _check_geometry(self) -> None:
        require(
            SMALLEST_SECTOR <= self.block_size <= _LARGEST_BLOCK
            and self.block_size == 1 << self.block_log,
            "impossible block size",
        )
        require(
            SMALLEST_SECTOR <= self.sector_size <= min(self.block_size, _LARGEST_SECTOR)
            and self.sector_size & (self.sector_size - 1) == 0,
            "impossible sector size",
        )
        require(
            self.group_blocks >= _SMALLEST_GROUP
            and self.group_log <= 31
            and 1 << self.group_log >= self.group_blocks > 1 << self.group_log >> 1,
            "impossible size of allocation groups",
        )
        require(
            self.group_count == -(-self.blocks_count // self.group_blocks)
            and self.blocks_in(self.group_count - 1) >= _SMALLEST_GROUP,
            "impossible number of allocation groups",
        )

    def _check_log(self) -> None:
        if self.log_start == 0:
            raise UnsupportedError("its log is on another device")
        group, block = divmod(self.log_start, 1 << self.group_log)
        require(
            group < self.group_count
            and self.header_blocks <= block
            and 0 < self.log_blocks <= self.blocks_in(group) - block,
            "its log is not inside of an allocation group",
        )


class GroupHeader(NamedTuple):
    """An AGF: the free space of one allocation group. Places in blocks from the group's start."""

    by_block_root: int
    by_size_root: int
    by_block_levels: int
    by_size_levels: int
    first_spare: int
    """Index of the first entry in use of the AGFL, which is a ring."""
    last_spare: int
    spare_count: int
    free_blocks: int
    longest: int
    other_roots: tuple[int, ...]
    sequence: int
    """The log sequence number of the last change; 0 without checksums."""

    @classmethod
    def parse(cls, raw: bytes, superblock: Superblock, group: int) -> Self:
        """Raises NotRecognized when it is not the AGF of that group."""
        magic, version, number, length = struct.unpack_from(">4s3I", raw)
        by_block, by_size, rmap, block_levels, size_levels = struct.unpack_from(">5I", raw, 16)
        first, last, spares, free, longest = struct.unpack_from(">5I", raw, 40)
        blocks = superblock.blocks_in(group)
        require(
            magic == b"XAGF" and version == 1 and number == group and length == blocks,
            f"no free space header in allocation group {group}",
        )
        if superblock.has_checksums:
            require(
                raw[64:80] == superblock.metadata_uuid,
                f"the free space header of allocation group {group} is of another filesystem",
            )
        roots = [rmap] if superblock.has_rmap else []
        if superblock.has_reflink:
            roots.append(int.from_bytes(raw[88:92], "big"))
        header = cls(
            by_block,
            by_size,
            block_levels,
            size_levels,
            first,
            last,
            spares,
            free,
            longest,
            tuple(roots),
            int.from_bytes(raw[208:216], "big") if superblock.has_checksums else 0,
        )
        require(
            1 <= block_levels <= _MAX_LEVELS and 1 <= size_levels <= _MAX_LEVELS and free <= blocks,
            f"impossible free space header in allocation group {group}",
        )
        return header


AGF_CHECKSUM_OFFSET = 216
AGFL_CHECKSUM_OFFSET = 32
SUPERBLOCK_CHECKSUM_OFFSET = 224


def spare_blocks(raw: bytes, superblock: Superblock, group: int, header: GroupHeader) -> list[int]:
    """The AGFL: blocks held ready for the btrees, from the group's start. Used, in no tree.

    Raises NotRecognized when it is not the AGFL of that group or has another count.
    """
    start = 0
    if superblock.has_checksums:
        magic, number = struct.unpack_from(">4sI", raw)
        require(
            magic == b"XAFL" and number == group and raw[8:24] == superblock.metadata_uuid,
            f"no free list in allocation group {group}",
        )
        start = 36
    size = (len(raw) - start) // 4
    entries = struct.unpack_from(f">{size}I", raw, start)
    if header.spare_count == 0:
        return []
    first, last = header.first_spare, header.last_spare
    require(
        first < size and last < size and (last - first) % size + 1 == header.spare_count,
        f"the free list of allocation group {group} has another count than its header",
    )
    spares = [entries[(first + n) % size] for n in range(header.spare_count)]
    require(
        all(superblock.header_blocks <= n < superblock.blocks_in(group) for n in spares),
        f"the free list of allocation group {group} points outside of it",
    )
    return spares


class TreeBlock(NamedTuple):
    """One block of a free space btree (struct xfs_btree_block, short form)."""

    level: int
    left: int
    right: int
    records: list[tuple[int, int]]
    """(first block, count) in a leaf; in a node the first of each child."""
    children: tuple[int, ...]
    sequence: int

    @classmethod
    def parse(
        cls, raw: bytes, superblock: Superblock, magics: tuple[bytes, bytes], group: int, block: int
    ) -> Self:
        """``magics``: without and with checksums. Raises NotRecognized when it is not that
        block of such a tree."""
        magic, level, count, left, right = struct.unpack_from(">4sHHII", raw)
        what = f"block {block} of allocation group {group}"
        require(magic == magics[superblock.has_checksums], f"no free space btree at {what}")
        start, sequence = 16, 0
        if superblock.has_checksums:
            place, sequence = struct.unpack_from(">QQ", raw, 16)
            owner = int.from_bytes(raw[48:52], "big")
            expected = group * superblock.group_blocks + block
            require(
                place == expected * superblock.basic_blocks_per_block
                and owner == group
                and raw[32:48] == superblock.metadata_uuid,
                f"the btree block at {what} says it is another",
            )
            start = 56
        most = (len(raw) - start) // (12 if level else 8)
        require(count <= most, f"too many records at {what}")
        records = list(struct.iter_unpack(">II", raw[start : start + 8 * count]))
        children = struct.unpack_from(f">{count}I", raw, start + 8 * most) if level else ()
        return cls(level, left, right, records, children, sequence)


TREE_CHECKSUM_OFFSET = 52
BY_BLOCK = (b"ABTB", b"AB3B")
BY_SIZE = (b"ABTC", b"AB3C")
NO_BLOCK = 0xFFFFFFFF
