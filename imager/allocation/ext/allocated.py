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
from imager.errors import NotRecognized, UnsupportedError
from imager.extents import Extents

# What no replay changes, short of a resize.
_GEOMETRY = (
    "blocks_count",
    "block_size",
    "cluster_size",
    "blocks_per_group",
    "inodes_per_group",
    "descriptor_size",
    "first_meta_bg",
    "reserved_gdt_blocks",
    "incompat",
    "has_metadata_checksums",
    "has_descriptor_checksums",
    "checksum_seed",
)

# Bitmaps read at once: 1 MiB of the usual 4 KiB ones.
_READ_BLOCKS = 256


def allocation_map(source: BlockSource, filesystem: Filesystem) -> AllocationMap:
    """Raises NotRecognized or UnsupportedError for any doubt, OSError for unreadable sectors."""
    superblock = Superblock.parse(source.pread(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE))
    _check_usable(superblock, source.size)
    overlay = journal_overlay(Blocks(source, superblock), superblock)
    blocks = Blocks(source, superblock, overlay)
    _check_same_geometry(superblock, blocks, source.size)
    used = _BlockUse(superblock, blocks).used_bytes(source.size)
    if overlay is NOTHING:
        return AllocationMap(used, "exact")
    return AllocationMap(used, "union", f"{filesystem.kind}: its journal is in use")


def _check_usable(superblock: Superblock, source_size: int) -> None:
    superblock.check(source_size)
    require(not superblock.state & STATE_ERROR, "the filesystem is marked as having errors")
    require(
        bool(superblock.state & STATE_VALID),
        "the filesystem waits for e2fsck, or has no journal and is mounted or was not unmounted",
    )
    require(
        superblock.has_journal or not superblock.needs_recovery,
        "the filesystem has no journal, but one to recover",
    )
    if superblock.has_journal and (superblock.journal_inode == 0 or superblock.journal_device):
        raise UnsupportedError("the journal is on another device")


def journal_overlay(blocks: Blocks, superblock: Superblock) -> Overlay:
    """What a replay would change; NOTHING for a clean filesystem."""
    if not superblock.has_journal:
        return NOTHING
    log = open_inode(blocks, superblock, superblock.journal_inode)
    journal = Journal(log.read, superblock.block_size, log.count)
    if not superblock.needs_recovery:
        require(journal.is_empty, "the filesystem says it is clean, its journal that it is not")
        return NOTHING
    copies = journal.committed()
    require(
        max(copies, default=0) < superblock.blocks_count,
        "the journal holds blocks from outside of the filesystem",
    )
    return Overlay(copies.keys(), lambda block: journal.content(copies[block]))


def _check_same_geometry(superblock: Superblock, replayed: Blocks, source_size: int) -> None:
    """A resize in the journal is more than a replay in memory should judge."""
    offset = SUPERBLOCK_OFFSET % superblock.block_size
    raw = replayed.read(superblock.own_block)[offset : offset + SUPERBLOCK_SIZE]
    later = Superblock.parse(raw)
    _check_usable(later, source_size)
    require(
        all(getattr(superblock, name) == getattr(later, name) for name in _GEOMETRY),
        "the journal changes the filesystem's size or features",
    )


class _BlockUse:
    """Collects the used ranges from descriptors and bitmaps."""

    def __init__(self, superblock: Superblock, blocks: Blocks) -> None:
        self._superblock = superblock
        self._blocks = blocks

    def used_bytes(self, source_size: int) -> Extents:
        """Everything in use up to the source's end, in bytes."""
        used = Extents.from_sorted(self._ascending(source_size))
        if used.end > source_size:  # by the last cluster's missing blocks
            used = used.clip(0, source_size)
        self._check_metadata_is_used(used)
        return used

    def _ascending(self, source_size: int) -> Iterator[tuple[int, int]]:
        yield 0, SUPERBLOCK_OFFSET
        batch: list[tuple[int, Group]] = []
        for index, group in enumerate(self._groups):
            if self._superblock.is_uninitialized(group):
                yield from self._marked_in(batch)
                batch = []
                yield from self._reserved_in(index, group)
                continue
            follows = batch and group.block_bitmap == batch[-1][1].block_bitmap + 1
            if not follows or len(batch) == _READ_BLOCKS:
                yield from self._marked_in(batch)
                batch = []
            batch.append((index, group))
        yield from self._marked_in(batch)
        end = self._superblock.size
        yield end, source_size - end

    # --- descriptors --------------------------------------------------------------------------

    @cached_property
    def _groups(self) -> list[Group]:
        superblock = self._superblock
        places = map(superblock.descriptor_block, range(superblock.descriptor_block_count))
        table = b"".join(self._blocks.read(first, count) for first, count in _read_runs(places))
        return list(superblock.groups(table))

    def _reserved_in(self, index: int, group: Group) -> list[tuple[int, int]]:
        """The only blocks in use in a group without a bitmap (ext4_init_block_bitmap): its
        superblock and descriptor copies, its bitmaps and inode table if they lie in it."""
        superblock = self._superblock
        first = superblock.first_block(index)
        own = [
            (place, count)
            for place, count in self._metadata_of(group)
            if first <= place < first + superblock.blocks_per_group
        ]
        size = superblock.block_size
        ranges = [(first, superblock.overhead_blocks(index)), *sorted(own)]
        return [(place * size, count * size) for place, count in ranges]

    def _metadata_of(self, group: Group) -> tuple[tuple[int, int], ...]:
        """(first, count) in blocks."""
        return (
            (group.block_bitmap, 1),
            (group.inode_bitmap, 1),
            (group.inode_table, self._superblock.inode_table_blocks),
        )

    def _check_metadata_is_used(self, used: Extents) -> None:
        size = self._superblock.block_size
        for first, count in self._metadata():
            if not used.covers(first * size, count * size):
                raise NotRecognized(f"a bitmap calls the metadata at block {first} free")

    def _metadata(self) -> Iterator[tuple[int, int]]:
        """Everything whose place is known, as (first, count) in blocks."""
        superblock = self._superblock
        yield superblock.own_block, 1
        for index in range(superblock.descriptor_block_count):
            yield superblock.descriptor_block(index), 1
        if superblock.incompat & INCOMPAT_MMP:
            yield superblock.mmp_block, 1
        for group in self._groups:
            yield from self._metadata_of(group)

    # --- bitmaps ------------------------------------------------------------------------------

    def _marked_in(self, batch: list[tuple[int, Group]]) -> Iterator[tuple[int, int]]:
        """What bitmaps mark, in bytes. ``batch``: groups whose bitmaps lie in consecutive
        blocks, so that one read gets them all."""
        if not batch:
            return
        size = self._superblock.block_size
        data = self._blocks.read(batch[0][1].block_bitmap, len(batch))
        for position, (index, group) in enumerate(batch):
            raw = data[position * size : (position + 1) * size]
            yield from self._marked_bytes(index, self._edges(index, group, raw))

    def _edges(self, index: int, group: Group, raw: bytes) -> list[int]:
        """Edges of the checked bitmap, united with the one on disk if that is older."""
        clusters = self._superblock.clusters_in(index)
        edges = bitmap.edges(raw)
        self._check_bitmap(index, group, edges)
        older = self._blocks.covered_by_overlay(group.block_bitmap)
        if older is not None:
            edges = bitmap.edges(bitmap.union(raw, older))
        return bitmap.cut(edges, clusters)

    def _check_bitmap(self, index: int, group: Group, edges: list[int]) -> None:
        superblock = self._superblock
        if superblock.has_metadata_checksums:
            computed = self._checksum.of(bitmap.cut(edges, superblock.clusters_per_group))
            mask = 0xFFFFFFFF if superblock.descriptor_size >= 64 else 0xFFFF
            if computed & mask != group.bitmap_checksum:
                raise NotRecognized(f"the checksum of group {index}'s block bitmap is wrong")
        clusters = superblock.clusters_in(index)
        free = clusters - bitmap.count_set(bitmap.cut(edges, clusters))
        if free != group.free_clusters:
            raise NotRecognized(
                f"group {index} counts {group.free_clusters} free clusters, its bitmap {free}"
            )

    @cached_property
    def _checksum(self) -> EdgeChecksum:
        return EdgeChecksum(
            self._superblock.checksum_seed, self._superblock.clusters_per_group // 8
        )

    def _marked_bytes(self, index: int, edges: list[int]) -> list[tuple[int, int]]:
        start = self._superblock.first_block(index) * self._superblock.block_size
        unit = self._superblock.cluster_size
        return [
            (start + first * unit, (end - first) * unit)
            for first, end in zip(edges[::2], edges[1::2], strict=True)
        ]


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
