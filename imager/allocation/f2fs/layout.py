"""The F2FS superblock: bytes to values, and where things lie.

Source: Linux include/linux/f2fs_fs.h, fs/f2fs/f2fs.h and super.c; integers little-endian.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple, Self

from imager.allocation.model import require
from imager.errors import UnsupportedError

MAGIC = 0xF2F52010
BLOCK_SIZE = 4096  # bytes; larger ones exist on machines with larger pages, and change the layout
BLOCKS_PER_SEGMENT = 512
SUPERBLOCK_SIZE = 3072  # bytes
SUPERBLOCK_OFFSETS = (1024, BLOCK_SIZE + 1024)

_CHECKSUM_OFFSET = SUPERBLOCK_SIZE - 4
_DEVICES_OFFSET, _DEVICE_SIZE, _MOST_DEVICES = 2201, 68, 8

_FEATURE_CHECKSUM = 0x800
# encrypt, atomic write, extra attributes, project quota, inode checksums, flexible inline
# xattrs, quota inodes, inode creation time, lost+found, verity, superblock checksum, casefold,
# compression, read-only
_FEATURES_KNOWN = 0x7FFF & ~0x2
_FEATURE_ZONED = 0x2


class Superblock(NamedTuple):
    """Places are block numbers; counts are in segments unless the name says otherwise."""

    raw: bytes
    log_block_size: int
    log_blocks_per_segment: int
    blocks: int
    segments: int
    checkpoint_segments: int
    sit_segments: int
    nat_segments: int
    summary_segments: int
    main_segments: int
    first_segment: int
    checkpoint: int
    sit: int
    nat: int
    summaries: int
    main: int
    checkpoint_payload: int
    features: int

    @classmethod
    def parse(cls, raw: bytes) -> Self | None:
        """None without magic."""
        if len(raw) < SUPERBLOCK_SIZE or raw[:4] != MAGIC.to_bytes(4, "little"):
            return None
        block_size, segment_size = struct.unpack_from("<II", raw, 16)
        (blocks,) = struct.unpack_from("<Q", raw, 36)
        counts_and_places = struct.unpack_from("<12I", raw, 48)
        (payload,) = struct.unpack_from("<I", raw, 1664)
        (features,) = struct.unpack_from("<I", raw, 2180)
        return cls._make(
            (raw, block_size, segment_size, blocks, *counts_and_places, payload, features)
        )

    def check(self, source_size: int) -> None:
        """Raises UnsupportedError for unknown features, NotRecognized for any inconsistency."""
        self._check_features()
        if self.features & _FEATURE_CHECKSUM:
            (offset,) = struct.unpack_from("<I", self.raw, 32)
            stored = int.from_bytes(self.raw[_CHECKSUM_OFFSET:SUPERBLOCK_SIZE], "little")
            require(
                offset == _CHECKSUM_OFFSET and checksum(self.raw[:_CHECKSUM_OFFSET]) == stored,
                "the superblock's checksum is wrong",
            )
        self._check_places()
        require(
            self.blocks * BLOCK_SIZE <= source_size,
            f"the filesystem has {self.blocks * BLOCK_SIZE} bytes, the source only {source_size}",
        )

    def _check_features(self) -> None:
        if (1 << self.log_block_size, 1 << self.log_blocks_per_segment) != (
            BLOCK_SIZE,
            BLOCKS_PER_SEGMENT,
        ):
            raise UnsupportedError("its blocks are not of 4 KiB, or its segments not of 2 MiB")
        if self.features & _FEATURE_ZONED:
            raise UnsupportedError("it is on zoned devices")
        if self.features & ~_FEATURES_KNOWN:
            raise UnsupportedError(f"unknown feature bits {self.features & ~_FEATURES_KNOWN:#x}")
        devices = self.raw[_DEVICES_OFFSET : _DEVICES_OFFSET + _DEVICE_SIZE * _MOST_DEVICES]
        if any(devices[::_DEVICE_SIZE]):
            raise UnsupportedError("it is on several devices")

    def _check_places(self) -> None:
        """The areas follow each other (sanity_check_area_boundary in super.c)."""
        areas = (
            (self.checkpoint, self.checkpoint_segments, self.sit),
            (self.sit, self.sit_segments, self.nat),
            (self.nat, self.nat_segments, self.summaries),
            (self.summaries, self.summary_segments, self.main),
        )
        require(
            self.first_segment == self.checkpoint >= 2
            and self.checkpoint_segments == 2
            and self.sit_segments > 0
            and self.sit_segments % 2 == 0
            and self.main_segments > 0
            and all(place + count * BLOCKS_PER_SEGMENT == end for place, count, end in areas)
            and self.main_end <= self.first_segment + self.segments * BLOCKS_PER_SEGMENT
            and self.main_end <= self.blocks,
            "the areas of the superblock don't follow each other",
        )

    @property
    def main_end(self) -> int:
        return self.main + self.main_segments * BLOCKS_PER_SEGMENT

    @property
    def sit_blocks(self) -> int:
        """Blocks of one of the two copies of the segment information table."""
        return self.sit_segments // 2 * BLOCKS_PER_SEGMENT


def checksum(data: bytes, register: int = MAGIC) -> int:
    """CRC-32 without inversions, as f2fs_crc32 has it."""
    return ~zlib.crc32(data, ~register & 0xFFFFFFFF) & 0xFFFFFFFF
