"""The allocation map of an XFS.

Each allocation group has a btree of its free extents; everything else is used: metadata, data,
the log, the blocks held ready for the btrees (AGFL), and all behind the filesystem's end.

A log in use is recovered in memory. Then a block counts as unused only if it is free on the
disk as it is, free after the recovery, and not touched by the recovery. Why that is enough:

- A recovery first writes the logged copies of buffers, in the order of the commits, but for
  those that a later commit cancels since the buffer was freed. That is what ``recovery`` does
  with the blocks that tell of free space. Where a kernel skips a copy, because the block on the
  disk has that change already, copying it and all that follow gives the same bytes.
- It reads blocks to change parts of them: buffers, inodes, quotas. Those are all kept as
  touched, even if they are free in the end. New inodes are written without reading.
- Then it finishes what intents promised. Freeing (EFI) only frees. Mapping (BUI), exchanging
  (XMI), counting references (CUI) and owners (RUI) and attributes (ATTRI) work on inodes and
  extents that are in use by the recovered btrees: a block that an intent hands over was taken
  out of the free space in the transaction that logged the intent. What they allocate for their
  own btrees and attributes comes from free space and is written whole before it is read. So do
  the freeing of unlinked inodes and of leftovers of copy-on-write.
- So no intent needs the old content of a block that is free after the buffers were written,
  and the kinds of items that are not known here are a doubt.

On the disk of a dirty filesystem the group headers and btrees are of different moments, since
they are written back one by one. Where they don't fit together, nothing of that group counts
as free. The recovered state has to pass every check.

Every doubt is an error here, and the caller takes it as "all of it".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from imager.allocation.model import AllocationMap, Filesystem, require
from imager.allocation.xfs.layout import (
    AGF_CHECKSUM_OFFSET,
    AGFL_CHECKSUM_OFFSET,
    BASIC_BLOCK,
    BY_BLOCK,
    BY_SIZE,
    NO_BLOCK,
    SMALLEST_SECTOR,
    SUPERBLOCK_CHECKSUM_OFFSET,
    TREE_CHECKSUM_OFFSET,
    GroupHeader,
    Superblock,
    TreeBlock,
    spare_blocks,
    verify,
)
from imager.allocation.xfs.log import Log
from imager.allocation.xfs.recovery import Overlay, Place, recover
from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

# What no recovery changes, short of growing the filesystem.
_GEOMETRY = (
    "block_size",
    "blocks_count",
    "realtime_blocks",
    "uuid",
    "log_start",
    "group_blocks",
    "group_count",
    "log_blocks",
    "sector_size",
    "group_log",
    "has_checksums",
    "has_rmap",
    "has_reflink",
    "metadata_uuid",
)


def allocation_map(source: BlockSource, filesystem: Filesystem) -> AllocationMap:
    """Raises NotRecognized or UnsupportedError for any doubt, OSError for unreadable sectors."""
    superblock = _read_superblock(source)
    log = Log(source, superblock)
    if log.is_clean:
        state = _State(source, superblock, Overlay(), log.sequence)
        return AllocationMap(_used(state, None, source.size), "exact")
    overlay = recover(log.operations(), superblock)
    _check_same_geometry(source, superblock, overlay)
    recovered = _State(source, superblock, overlay, log.sequence)
    on_disk = _State(source, superblock, Overlay(), log.sequence)
    used = _used(recovered, on_disk, source.size)
    return AllocationMap(used, "union", f"{filesystem.kind}: its log is in use")


def _read_superblock(source: BlockSource) -> Superblock:
    superblock = Superblock.parse(source.pread(0, SMALLEST_SECTOR))
    superblock.check(source.size)
    if superblock.has_checksums:
        raw = source.pread(0, superblock.sector_size)
        verify(raw, SUPERBLOCK_CHECKSUM_OFFSET, "the superblock")
    return superblock


def _check_same_geometry(source: BlockSource, superblock: Superblock, overlay: Overlay) -> None:
    """A growing filesystem is more than a recovery in memory should judge."""
    place = Place(0, superblock.basic_blocks_per_sector)
    later = Superblock.parse(overlay.patch(place, source.pread(0, superblock.sector_size)))
    later.check(source.size)
    require(
        all(getattr(superblock, name) == getattr(later, name) for name in _GEOMETRY),
        "the log changes the filesystem's size or features",
    )


def _used(state: _State, other: _State | None, source_size: int) -> Extents:
    """Everything in use up to the source's end, in bytes. ``other``: what has to be free too."""
    superblock = state.superblock
    free = Extents.from_sorted(
        (start, length)
        for group in range(superblock.group_count)
        for start, length in _free_in(state, other, group)
    )
    used = free.subtract(_bytes_of(state.overlay.touched)).complement(source_size)
    start = superblock.log_first_block * superblock.block_size
    require(
        used.covers(start, superblock.log_blocks * superblock.block_size),
        "a free space btree calls the log free",
    )
    return used


def _free_in(state: _State, other: _State | None, group: int) -> Iterator[tuple[int, int]]:
    """Free ranges of a group in both states, in bytes."""
    if other is None or not state.changes(group):
        yield from state.free_in(group)
        return
    free = Extents.from_sorted(state.free_in(group))
    try:
        yield from free.intersect(other.unchecked_free_in(group))
    except NotRecognized:
        return  # written back by halves: see above


def _bytes_of(places: set[Place]) -> Extents:
    return Extents((block * BASIC_BLOCK, length * BASIC_BLOCK) for block, length in places)


class _State:
    """The free space as it is on the disk, or as it will be after the recovery."""

    def __init__(
        self, source: BlockSource, superblock: Superblock, overlay: Overlay, sequence: int
    ) -> None:
        """``sequence``: no block can have a later one."""
        self.superblock = superblock
        self.overlay = overlay
        self._source = source
        self._sequence = sequence
        unit = superblock.group_blocks * superblock.basic_blocks_per_block
        self._changed = {place.block // unit for place in overlay.chunks}

    def changes(self, group: int) -> bool:
        """Whether the overlay says anything about the group."""
        return group in self._changed

    def free_in(self, group: int) -> Iterator[tuple[int, int]]:
        """Ascending free ranges of a group in bytes. Raises NotRecognized, OSError."""
        superblock = self.superblock
        header = self._header(group)
        known = array("I", [header.by_block_root, header.by_size_root, *header.other_roots])
        known.extend(self._spares(group, header))
        tree = _Tree(self, group, BY_BLOCK, header.by_block_root, header.by_block_levels)
        free = self._in_bytes(group, tree)
        self._check_counts(group, header, tree)
        if not superblock.has_checksums:
            self._check_twin(group, header, tree)
        known.extend(tree.blocks)
        origin = superblock.group_start(group)
        for block in known:
            require(
                superblock.header_blocks <= block < superblock.blocks_in(group)
                and not any(free.within(origin + block * superblock.block_size, 1)),
                f"the metadata at block {block} of allocation group {group} is called free",
            )
        yield from free

    def unchecked_free_in(self, group: int) -> Extents:
        """Free ranges in bytes by the btree alone, for a group that may be of several moments."""
        header = self._header(group)
        tree = _Tree(self, group, BY_BLOCK, header.by_block_root, header.by_block_levels)
        return self._in_bytes(group, tree)

    def _in_bytes(self, group: int, tree: _Tree) -> Extents:
        origin, size = self.superblock.group_start(group), self.superblock.block_size
        return Extents.from_sorted(
            (origin + first * size, count * size) for first, count in tree.extents()
        )

    def read_tree_block(self, group: int, block: int, magics: tuple[bytes, bytes]) -> TreeBlock:
        superblock = self.superblock
        require(
            superblock.header_blocks <= block < superblock.blocks_in(group),
            f"a free space btree of allocation group {group} points outside of it",
        )
        unit = superblock.basic_blocks_per_block
        place = Place((group * superblock.group_blocks + block) * unit, unit)
        what = f"block {block} of allocation group {group}"
        raw = self._read(place, TREE_CHECKSUM_OFFSET, what)
        parsed = TreeBlock.parse(raw, superblock, magics, group, block)
        self._check_sequence(parsed.sequence, what)
        return parsed

    def _header(self, group: int) -> GroupHeader:
        what = f"the free space header of allocation group {group}"
        raw = self._read(self._sector(group, 1), AGF_CHECKSUM_OFFSET, what)
        header = GroupHeader.parse(raw, self.superblock, group)
        self._check_sequence(header.sequence, what)
        return header

    def _spares(self, group: int, header: GroupHeader) -> list[int]:
        what = f"the free list of allocation group {group}"
        raw = self._read(self._sector(group, 3), AGFL_CHECKSUM_OFFSET, what)
        return spare_blocks(raw, self.superblock, group, header)

    def _sector(self, group: int, number: int) -> Place:
        unit = self.superblock.basic_blocks_per_sector
        return Place(self.superblock.group_start(group) // BASIC_BLOCK + number * unit, unit)

    def _read(self, place: Place, checksum_offset: int, what: str) -> bytes:
        """A logged copy has no checksum of its own: its record in the log had one."""
        data = self._source.pread(place.block * BASIC_BLOCK, place.length * BASIC_BLOCK)
        if self.overlay.chunks.get(place):
            return self.overlay.patch(place, data)
        if self.superblock.has_checksums:
            verify(data, checksum_offset, what)
        return data

    def _check_sequence(self, sequence: int, what: str) -> None:
        require(sequence <= self._sequence, f"{what} is newer than the log")

    def _check_counts(self, group: int, header: GroupHeader, tree: _Tree) -> None:
        require(
            tree.total == header.free_blocks and tree.longest == header.longest,
            f"allocation group {group} counts {header.free_blocks} free blocks,"
            f" its btree {tree.total}",
        )

    def _check_twin(self, group: int, header: GroupHeader, tree: _Tree) -> None:
        """Without checksums: the btree by size must hold the same extents."""
        twin = _Tree(self, group, BY_SIZE, header.by_size_root, header.by_size_levels)
        for _ in twin.extents():
            pass
        require(
            (twin.total, twin.longest, twin.fingerprint)
            == (tree.total, tree.longest, tree.fingerprint),
            f"the two free space btrees of allocation group {group} differ",
        )


@dataclass
class _Tree:
    """A free space btree, walked in order; what it counts is known once the walk is over."""

    state: _State
    group: int
    magics: tuple[bytes, bytes]
    root: int
    levels: int

    def __post_init__(self) -> None:
        self.total = self.longest = self.fingerprint = 0
        self._last = (0, 0)
        self.blocks = array("I")

    def extents(self) -> Iterator[tuple[int, int]]:
        """(first block, count) in the group, in the tree's order.

        Raises NotRecognized unless they ascend within the group without overlapping:
        so the walk ends, whatever the blocks say.
        """
        in_order = self._ascend_by_size if self.magics is BY_SIZE else self._ascend_by_block
        for leaf in self._leaves():
            if not leaf.records:
                continue
            require(
                in_order(leaf.records),
                f"a free space btree of allocation group {self.group} is out of order",
            )
            counts = [count for _, count in leaf.records]
            self.total += sum(counts)
            self.longest = max(self.longest, *counts)
            self.fingerprint += sum(map(hash, leaf.records))
            yield from leaf.records

    def _ascend_by_block(self, records: list[tuple[int, int]]) -> bool:
        start = self._last[0] or self.state.superblock.header_blocks
        ends = [first + count for first, count in records]
        self._last = (ends[-1], 0)
        return (
            records[0][0] >= start
            and all(count for _, count in records)
            and all(end <= first for end, (first, _) in zip(ends, records[1:], strict=False))
            and ends[-1] <= self.state.superblock.blocks_in(self.group)
        )

    def _ascend_by_size(self, records: list[tuple[int, int]]) -> bool:
        keys = [self._last, *((count, first) for first, count in records)]
        self._last = keys[-1]
        lowest = self.state.superblock.header_blocks
        limit = self.state.superblock.blocks_in(self.group)
        return all(one < other for one, other in pairwise(keys)) and all(
            count and lowest <= first <= limit - count for first, count in records
        )

    def _leaves(self) -> Iterator[TreeBlock]:
        """Each level is a chain of neighbours, which must be the same from the parents' side."""
        expected: list[int | None] = [None] * self.levels  # the right neighbour of the last
        previous = [NO_BLOCK] * self.levels
        stack: list[tuple[int, int, tuple[int, int] | None]] = [(self.root, self.levels - 1, None)]
        while stack:
            block, level, key = stack.pop()
            node = self.state.read_tree_block(self.group, block, self.magics)
            self.blocks.append(block)
            is_root = level == self.levels - 1
            require(
                node.level == level
                and node.left == previous[level]
                and expected[level] in (None, block)
                and (bool(node.records) or (is_root and level == 0))
                and (key is None or key == node.records[0]),
                f"block {block} of allocation group {self.group} is not in its btree's order",
            )
            previous[level], expected[level] = block, node.right
            if level == 0:
                yield node
            else:
                pairs = zip(node.children, node.records, strict=True)
                stack.extend(reversed([(child, level - 1, first) for child, first in pairs]))
        require(
            all(right == NO_BLOCK for right in expected),
            f"a free space btree of allocation group {self.group} is cut off",
        )
