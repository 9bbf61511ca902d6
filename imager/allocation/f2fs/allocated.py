"""The allocation map of F2FS.

Used are: the superblocks, checkpoints and tables before the main area whole, the blocks of the
main area that the segment information table (SIT) calls valid, and everything behind the main
area. Entries in the checkpoint's journal are newer than the table's.

Only an unmounted filesystem has a map: after a crash, files synced since the last checkpoint
lie in blocks that it calls free. Every doubt is an error here, and the caller takes it as "all
of it".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imager.allocation import bitmap
from imager.allocation.f2fs.checkpoint import Checkpoint, newest_checkpoint
from imager.allocation.f2fs.layout import (
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    SUPERBLOCK_OFFSETS,
    SUPERBLOCK_SIZE,
    Superblock,
)
from imager.allocation.model import AllocationMap, Filesystem, require
from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

_ENTRY_SIZE = 74  # bytes: count and type, bitmap, time
_ENTRIES_PER_BLOCK = BLOCK_SIZE // _ENTRY_SIZE
_BITMAP_SIZE = BLOCKS_PER_SEGMENT // 8  # bytes
_JOURNAL_ENTRY_SIZE = 4 + _ENTRY_SIZE  # bytes: segment, entry
_COUNT_BITS = 10
_FIRST_NODE_TYPE, _TYPES = 3, 6

_READ_BLOCKS = 256  # of the table, at once

# The first bit of F2FS's bitmaps is the highest of its byte.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def allocation_map(source: BlockSource, filesystem: Filesystem) -> AllocationMap:
    """Raises NotRecognized or UnsupportedError for any doubt, OSError for unreadable sectors."""
    superblock = _superblock(source)
    superblock.check(source.size)
    checkpoint = newest_checkpoint(source, superblock)
    checkpoint.check_usable()
    checkpoint.check_nothing_follows(source, superblock)
    table = _SegmentTable(source, superblock, checkpoint)
    used = Extents.from_sorted(_ascending(superblock, table, source.size))
    table.check_totals()
    return AllocationMap(used, "exact")


def _superblock(source: BlockSource) -> Superblock:
    """Raises NotRecognized unless both copies say the same."""
    copies = {source.pread(offset, SUPERBLOCK_SIZE) for offset in SUPERBLOCK_OFFSETS}
    superblock = Superblock.parse(copies.pop())
    if superblock is None or copies:
        raise NotRecognized("the two superblocks differ")
    return superblock


def _ascending(
    superblock: Superblock, table: _SegmentTable, source_size: int
) -> Iterator[tuple[int, int]]:
    """Used ranges in bytes."""
    yield 0, superblock.main * BLOCK_SIZE
    for segment, marks in table.bitmaps():
        edges = bitmap.edges(marks.translate(_REVERSED))
        start = superblock.main + segment * BLOCKS_PER_SEGMENT
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            yield (start + first) * BLOCK_SIZE, (end - first) * BLOCK_SIZE
    end = superblock.main_end * BLOCK_SIZE
    yield end, source_size - end


class _SegmentTable:
    """The SIT with its journal. All raise NotRecognized for damage, OSError."""

    def __init__(self, source: BlockSource, superblock: Superblock, checkpoint: Checkpoint) -> None:
        self._source = source
        self._superblock = superblock
        self._checkpoint = checkpoint
        self._versions = checkpoint.sit_versions(source, superblock)
        self._journal = self._journal_entries(checkpoint.sit_journal(source))
        self._blocks = 0
        self._nodes = 0
        require(
            superblock.main_segments <= superblock.sit_blocks * _ENTRIES_PER_BLOCK,
            "the segment information table is too short",
        )

    def bitmaps(self) -> Iterator[tuple[int, bytes]]:
        """First segment and concatenated bitmaps of many segments, ascending."""
        for first, blocks in self._table_pieces():
            segment = first * _ENTRIES_PER_BLOCK
            count = min(len(blocks) * _ENTRIES_PER_BLOCK, self._superblock.main_segments - segment)
            entries = (
                block[at : at + _ENTRY_SIZE]
                for block in blocks
                for at in range(0, _ENTRIES_PER_BLOCK * _ENTRY_SIZE, _ENTRY_SIZE)
            )
            numbers = range(segment, segment + count)
            yield (
                segment,
                b"".join(
                    self._checked_bitmap(number, self._journal.get(number, entry))
                    for number, entry in zip(numbers, entries, strict=False)
                ),
            )

    def check_totals(self) -> None:
        """What was read against the checkpoint (build_sit_entries in segment.c); blocks that are
        only reserved count there, but have no place yet."""
        require(
            self._nodes == self._checkpoint.valid_nodes
            and self._blocks <= self._checkpoint.valid_blocks,
            "the segment information table and the checkpoint count different blocks",
        )

    def _table_pieces(self) -> Iterator[tuple[int, list[bytes]]]:
        """Number of the first table block, and the current copies of some that follow."""
        total = -(-self._superblock.main_segments // _ENTRIES_PER_BLOCK)
        for first in range(0, total, _READ_BLOCKS):
            count = min(_READ_BLOCKS, total - first)
            copies = [
                self._source.pread((start + first) * BLOCK_SIZE, count * BLOCK_SIZE)
                for start in (
                    self._superblock.sit,
                    self._superblock.sit + self._superblock.sit_blocks,
                )
            ]
            yield (
                first,
                [
                    copies[self._version(first + at)][at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]
                    for at in range(count)
                ],
            )

    def _version(self, block: int) -> int:
        return self._versions[block // 8] >> 7 - block % 8 & 1

    def _checked_bitmap(self, segment: int, entry: bytes) -> bytes:
        (packed,) = struct.unpack_from("<H", entry)
        count, kind = packed & (1 << _COUNT_BITS) - 1, packed >> _COUNT_BITS
        marks = entry[2 : 2 + _BITMAP_SIZE]
        if int.from_bytes(marks, "little").bit_count() != count or kind >= _TYPES:
            raise NotRecognized(f"segment {segment} counts {count} valid blocks, its bitmap not")
        self._blocks += count
        self._nodes += count if kind >= _FIRST_NODE_TYPE else 0
        return marks

    def _journal_entries(self, raw: bytes) -> dict[int, bytes]:
        (count,) = struct.unpack_from("<H", raw)
        require(2 + count * _JOURNAL_ENTRY_SIZE <= len(raw), "the checkpoint's journal is damaged")
        entries: dict[int, bytes] = {}
        for at in range(2, 2 + count * _JOURNAL_ENTRY_SIZE, _JOURNAL_ENTRY_SIZE):
            (segment,) = struct.unpack_from("<I", raw, at)
            require(segment < self._superblock.main_segments, "the checkpoint's journal is damaged")
            entries[segment] = raw[at + 4 : at + _JOURNAL_ENTRY_SIZE]
        return entries
