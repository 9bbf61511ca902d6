"""The file allocation table: an entry for each cluster; zero means free."""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise

from imager.allocation.model import require
from imager.allocation.vfat.layout import FIRST_CLUSTER, Geometry
from imager.blocksource import BlockSource

# Bytes read at once of each copy: whole entries of every width, and two of 12 bits make three.
_PIECE_SIZE = 3 << 18
_USED = re.compile(rb"\x01+")
_FAT32_MASK = 0x0FFFFFFF  # the upper four bits are reserved


class Table:
    """All copies of the table, read once from start to end."""

    def __init__(self, source: BlockSource, geometry: Geometry) -> None:
        self._source = source
        self._geometry = geometry
        self.copies_differ = False
        self.entry_1 = 0
        """Holds the flags "shut down cleanly" and "no read errors"."""
        self.link_targets = array("I")
        """Clusters that another one continues in, unless that is its predecessor by number."""

    def used_runs(self) -> Iterator[tuple[int, int]]:
        """Ascending (first cluster, count) of the clusters that are in use in any copy.

        Raises NotRecognized for entries that can't be, OSError for unreadable sectors.
        """
        for first, copies in self._pieces():
            distinct = [piece for at, piece in enumerate(copies) if piece not in copies[:at]]
            self.copies_differ |= len(distinct) > 1
            marks = [self._marks(first, piece) for piece in distinct]
            merged = bytes(map(max, *marks)) if len(marks) > 1 else marks[0]
            for run in _USED.finditer(merged):
                yield first + run.start(), run.end() - run.start()

    def _pieces(self) -> Iterator[tuple[int, list[bytes]]]:
        """Number of the first entry, and the same piece of every copy."""
        geometry = self._geometry
        size = -(-(geometry.clusters + FIRST_CLUSTER) * geometry.bits // 8)
        for at in range(0, size, _PIECE_SIZE):
            length = min(_PIECE_SIZE, size - at)
            yield (
                at * 8 // geometry.bits,
                [
                    self._source.pread(geometry.fat_offset(copy) + at, length)
                    for copy in range(geometry.fats)
                ],
            )

    def _marks(self, first: int, piece: bytes) -> bytes:
        """A byte for each cluster of the piece: 1 for a used one."""
        count = min(
            self._geometry.clusters + FIRST_CLUSTER - first,
            len(piece) * 8 // self._geometry.bits,
        )
        if first and piece.count(0) == len(piece):
            return bytes(count)
        entries = _entries(piece, self._geometry.bits)[:count]
        if first == 0:
            self._check_start(entries)
            entries = [0, 0, *entries[FIRST_CLUSTER:]]
        self._follow_links(first, entries)
        return bytes(map(bool, entries))

    def _check_start(self, entries: Sequence[int]) -> None:
        highest = _highest(self._geometry.bits)
        require(
            entries[0] == highest & ~0xFF | self._geometry.media,
            "the FAT doesn't start with the media byte",
        )
        # A flag that is cleared in any copy counts.
        self.entry_1 = entries[1] & (self.entry_1 or highest)

    def _follow_links(self, first: int, entries: Sequence[int]) -> None:
        own = [
            target
            for successor, target in enumerate(entries, first + 1)
            if target and target != successor
        ]
        # Followed by number, but the next one is free: a chain that breaks off.
        successors = [
            first + place + 1
            for place, (entry, following) in enumerate(pairwise(entries))
            if not following and entry == first + place + 1
        ]
        if entries[-1] == first + len(entries):
            successors.append(first + len(entries))
        bad = _highest(self._geometry.bits) - 8
        targets = [target for target in (*own, *successors) if target < bad]
        require(
            all(map(self._geometry.is_cluster, targets)),
            "the FAT has links to outside of the filesystem",
        )
        self.link_targets.extend(targets)


def _highest(bits: int) -> int:
    return _FAT32_MASK if bits == 32 else (1 << bits) - 1


def _entries(piece: bytes, bits: int) -> Sequence[int]:
    if bits == 12:
        triples = zip(piece[::3], piece[1::3], (*piece[2::3], 0), strict=False)
        return [
            entry
            for low, middle, high in triples
            for entry in (low | (middle & 0xF) << 8, middle >> 4 | high << 4)
        ]
    if bits == 16:
        return struct.unpack(f"<{len(piece) // 2}H", piece)
    return [entry & _FAT32_MASK for entry in struct.unpack(f"<{len(piece) // 4}I", piece)]
