"""The allocation map of an ext filesystem.

Used are: the boot block, what the block bitmaps say, all metadata that the descriptors point
to (a group with an uninitialized bitmap has nothing else), and everything behind the
filesystem's end. A journal in use is replayed in memory: the map is then the union of the
bitmaps on disk and those that the replay would write.

Every doubt is an error here, and the caller takes it as "all of it".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from imager.allocation import bitmap
from imager.allocation.checksum import EdgeChecksum
from imager.allocation.ext.blocks import NOTHING, Blocks, Overlay
from imager.allocation.ext.inode import open_inode
from imager.allocation.ext.jbd2 import Journal
from imager.allocation.ext.layout import (
    INCOMPAT_MMP,
    STATE_ERROR,
    STATE_VALID,
    SUPERBLOCK_OFFSET,
    SUPERBLOCK_SIZE,
    Group,
    Superblock,
)
from imager.allocation.model import AllocationMap, Filesystem, require
from imager.blocksource import BlockSource
from imager.errors import UnsupportedError
from imager.extents import Extents

# Bitmaps read at once: 1 MiB of the usual 4 KiB ones.
_READ_BLOCKS = 256


def allocation_map(source: BlockSource, filesystem: Filesystem) -> AllocationMap:
    """Raises NotRecognized or UnsupportedError for any doubt, OSError for unreadable sectors."""
    superblock = Superblock.parse(source.pread(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE))
    _check_usable(superblock, source.size)
    on_disk = Blocks(source, superblock)
    overlay = _journal_overlay(on_disk, superblock)
    replayed = Blocks(source, superblock, overlay)
    _check_same_geometry(superblock, replayed, source.size)
    block_use = _BlockUse(superblock, replayed)
    used = block_use.used_bytes(source.size)
    if overlay is NOTHING:
        return AllocationMap(used, "exact")
    before = block_use.overlaid_bitmaps(on_disk, overlay)
    return AllocationMap(used.union(before), "union", f"{filesystem.kind}: its journal is in use")


def _check_usable(superblock: Superblock, source_size: int) -> None:
    superblock.check(source_size)
    require(not superblock.state & STATE_ERROR, "the filesystem is marked as having errors")
    if superblock.has_journal:
        if superblock.journal_inode == 0 or superblock.journal_device:
            raise UnsupportedError("the journal is on another device")
    else:
        require(not superblock.needs_recovery, "a journal to recover, but no journal")
        require(
            bool(superblock.state & STATE_VALID),
            "the filesystem has no journal and is mounted or was not unmounted cleanly",
        )


def _journal_overlay(blocks: Blocks, superblock: Superblock) -> Overlay:
    """What a replay would change; NOTHING for a clean filesystem."""
    if not superblock.has_journal:
        return NOTHING
    log = open_inode(blocks, superblock, superblock.journal_inode)
    journal = Journal(log.read, superblock.block_size, log.count)
    if journal.is_empty and not superblock.needs_recovery:
        return NOTHING
    copies = journal.committed()
    require(
        max(copies, default=0) < superblock.blocks_count,
        "the journal holds blocks from outside of the filesystem",
    )
    return Overlay(copies.keys(), lambda block: journal.content(copies[block]))


def _check_same_geometry(superblock: Superblock, replayed: Blocks, source_size: int) -> None:
    """A resize in the journal, or a new feature, is more than a replay in memory should judge."""
    offset = SUPERBLOCK_OFFSET % superblock.block_size
    raw = replayed.read(superblock.own_block)[offset : offset + SUPERBLOCK_SIZE]
    later = Superblock.parse(raw)
    later.check(source_size)
    require(
        all(
            getattr(superblock, name) == getattr(later, name)
            for name in ("blocks_count", "blocks_per_group", "compat", "incompat", "ro_compat")
        ),
        "the journal changes the filesystem's size or features",
    )


class _BlockUse:
    """Collects used ranges (bytes) from the descriptors and bitmaps of one state."""

    def __init__(self, superblock: Superblock, blocks: Blocks) -> None:
        self._superblock = superblock
        self._blocks = blocks

    def used_bytes(self, source_size: int) -> Extents:
        """Everything in use, up to the source's end."""
        superblock = self._superblock
        marked = Extents.from_sorted(self._in_bytes(self._marked_blocks(), superblock.size))
        metadata = Extents(self._in_bytes(self._metadata_blocks(), superblock.size))
        uninitialized = Extents.from_sorted(
            self._in_bytes(self._uninitialized_groups(), superblock.size)
        )
        stray = metadata.subtract(marked).subtract(uninitialized)
        require(not stray, f"the bitmaps call metadata free: {stray}")
        boot_and_tail = Extents(
            [(0, SUPERBLOCK_OFFSET), (superblock.size, source_size - superblock.size)]
        )
        return marked.union(metadata).union(boot_and_tail)

    def overlaid_bitmaps(self, on_disk: Blocks, overlay: Overlay) -> Extents:
        """What the bitmaps on disk say, unchecked, where the overlay has newer ones."""
        ranges = (
            block_range
            for index, group in enumerate(self._groups)
            if group.block_bitmap in overlay.blocks
            for block_range in self._marked_in(
                index, bitmap.edges(on_disk.read(group.block_bitmap))
            )
        )
        return Extents.from_sorted(self._in_bytes(ranges, self._superblock.size))

    def _in_bytes(
        self, block_ranges: Iterable[tuple[int, int]], end: int
    ) -> Iterator[tuple[int, int]]:
        """(first, count) in blocks to (offset, length) in bytes, cut at ``end``; neighbours that
        continue each other become one."""
        size = self._superblock.block_size
        offset = length = 0
        for first, count in block_ranges:
            if first * size == offset + length:
                length += count * size
                continue
            yield offset, min(length, end - offset)
            offset, length = first * size, count * size
        yield offset, min(length, end - offset)

    # --- descriptors --------------------------------------------------------------------------

    @cached_property
    def _groups(self) -> list[Group]:
        superblock = self._superblock
        places = map(superblock.descriptor_block, range(superblock.descriptor_block_count))
        table = b"".join(self._blocks.read(first, count) for first, count in _read_runs(places))
        return list(superblock.groups(table))

    def _metadata_blocks(self) -> Iterator[tuple[int, int]]:
        superblock = self._superblock
        yield superblock.own_block, 1
        for index in range(superblock.descriptor_block_count):
            yield superblock.descriptor_block(index), 1
        if superblock.incompat & INCOMPAT_MMP:
            require(superblock.mmp_block < superblock.blocks_count, "impossible MMP block")
            yield superblock.mmp_block, 1
        for column, count in (
            ("block_bitmap", 1),
            ("inode_bitmap", 1),
            ("inode_table", superblock.inode_table_blocks),
        ):
            for group in self._groups:
                yield getattr(group, column), count

    def _uninitialized_groups(self) -> Iterator[tuple[int, int]]:
        for index, group in enumerate(self._groups):
            if self._superblock.is_uninitialized(group):
                yield self._superblock.first_block(index), self._superblock.blocks_per_group

    # --- bitmaps ------------------------------------------------------------------------------

    def _marked_blocks(self) -> Iterator[tuple[int, int]]:
        """What bitmaps mark, and what uninitialized groups reserve, in ascending order."""
        batch: list[tuple[int, Group]] = []
        for index, group in enumerate(self._groups):
            if self._superblock.is_uninitialized(group):
                yield from self._marked_in_batch(batch)
                batch = []
                yield self._superblock.first_block(index), self._superblock.overhead_blocks(index)
                continue
            follows = batch and group.block_bitmap == batch[-1][1].block_bitmap + 1
            if not follows or len(batch) == _READ_BLOCKS:
                yield from self._marked_in_batch(batch)
                batch = []
            batch.append((index, group))
        yield from self._marked_in_batch(batch)

    def _marked_in_batch(self, batch: list[tuple[int, Group]]) -> Iterator[tuple[int, int]]:
        """``batch``: groups with bitmaps in consecutive blocks, read at once."""
        if not batch:
            return
        size = self._superblock.block_size
        data = self._blocks.read(batch[0][1].block_bitmap, len(batch))
        for position, (index, group) in enumerate(batch):
            edges = self._checked_edges(index, group, data[position * size : (position + 1) * size])
            yield from self._marked_in(index, edges)

    def _checked_edges(self, index: int, group: Group, raw: bytes) -> list[int]:
        superblock = self._superblock
        edges = bitmap.edges(raw)
        if superblock.has_metadata_checksums:
            computed = self._checksum.of(bitmap.cut(edges, superblock.clusters_per_group))
            mask = 0xFFFFFFFF if superblock.descriptor_size >= 64 else 0xFFFF
            if computed & mask != group.bitmap_checksum:
                require(False, f"the checksum of group {index}'s block bitmap is wrong")
        clusters = superblock.clusters_in(index)
        used = bitmap.count_set(bitmap.cut(edges, clusters))
        if clusters - used != group.free_clusters:
            require(
                False,
                f"group {index} counts {group.free_clusters} free clusters, "
                f"its bitmap {clusters - used}",
            )
        return edges

    @cached_property
    def _checksum(self) -> EdgeChecksum:
        return EdgeChecksum(
            self._superblock.checksum_seed, self._superblock.clusters_per_group // 8
        )

    def _marked_in(self, index: int, edges: list[int]) -> Iterator[tuple[int, int]]:
        """The runs of set bits as (first, count) in blocks."""
        superblock = self._superblock
        start, ratio = superblock.first_block(index), superblock.blocks_per_cluster
        edges = bitmap.cut(edges, superblock.clusters_in(index))
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            yield start + first * ratio, (end - first) * ratio


def _read_runs(places: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending neighbours among block numbers as (first, count), for one read each."""
    first = count = 0
    for place in places:
        if count and place == first + count and count < _READ_BLOCKS:
            count += 1
            continue
        if count:
            yield first, count
        first, count = place, 1
    if count:
        yield first, count
