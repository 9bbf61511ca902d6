"""Sets of byte ranges: the one place for boundary arithmetic.

``Extents`` is an immutable, sorted set of disjoint, non-touching half-open ranges
``[start, end)`` in bytes, kept in two arrays (16 bytes a range), so that a fragmented
terabyte filesystem stays small.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """A byte range: ``offset`` and ``length`` in bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Extents:
    """An immutable set of byte ranges; iterating gives ``Extent`` in ascending order."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """``ranges`` are (offset, length) in bytes, in any order, overlapping or not.

        Raises ValueError for a negative offset or length.
        """
        self._starts, self._ends = _merge(sorted((o, o + n) for o, n in _checked(ranges)))

    @classmethod
    def from_sorted(cls, ranges: Iterable[tuple[int, int]]) -> Extents:
        """Like the constructor for ranges that ascend by offset, without sorting them."""
        extents = cls.__new__(cls)
        extents._starts, extents._ends = _merge((o, o + n) for o, n in _checked(ranges))
        return extents

    @classmethod
    def whole(cls, length: int) -> Extents:
        """The range from 0 to ``length``."""
        return cls([(0, length)])

    def __iter__(self) -> Iterator[Extent]:
        for start, end in zip(self._starts, self._ends, strict=True):
            yield Extent(start, end - start)

    def __len__(self) -> int:
        return len(self._starts)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Extents):
            return NotImplemented
        return self._starts == other._starts and self._ends == other._ends

    def __hash__(self) -> int:
        return hash((self._starts.tobytes(), self._ends.tobytes()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{e.offset}+{e.length}" for e in list(self)[:8])
        return f"Extents({shown}{', …' if len(self) > 8 else ''})"

    @property
    def total(self) -> int:
        """Sum of all lengths, in bytes."""
        return sum(self._ends) - sum(self._starts)

    @property
    def end(self) -> int:
        """First byte after the last range; 0 when empty."""
        return self._ends[-1] if self._ends else 0

    def covers(self, offset: int, length: int) -> bool:
        """Whether every byte of the range is in the set."""
        if length <= 0:
            return True
        at = bisect_right(self._starts, offset) - 1
        return at >= 0 and self._ends[at] >= offset + length

    def within(self, offset: int, length: int) -> Iterator[Extent]:
        """The parts of the set that lie in ``[offset, offset + length)``, cut at its borders."""
        end = offset + length
        at = max(bisect_right(self._starts, offset) - 1, 0)
        while at < len(self._starts) and self._starts[at] < end:
            start, stop = max(self._starts[at], offset), min(self._ends[at], end)
            if start < stop:
                yield Extent(start, stop - start)
            at += 1

    def clip(self, offset: int, length: int) -> Extents:
        """The intersection with one range."""
        return Extents.from_sorted(self.within(offset, length))

    def shift(self, distance: int) -> Extents:
        """Every range moved by ``distance`` bytes."""
        return Extents.from_sorted((e.offset + distance, e.length) for e in self)

    def union(self, other: Extents) -> Extents:
        return Extents([*self, *other])

    def intersect(self, other: Extents) -> Extents:
        few, many = (self, other) if len(self) <= len(other) else (other, self)
        return Extents.from_sorted(part for e in few for part in many.within(e.offset, e.length))

    def subtract(self, other: Extents) -> Extents:
        return self.intersect(other.complement(max(self.end, other.end)))

    def complement(self, length: int) -> Extents:
        """What the set leaves free in ``[0, length)``."""
        return Extents.from_sorted(_gaps(self.within(0, length), length))

    def align_outward(self, unit: int, limit: int) -> Extents:
        """Every range widened to multiples of ``unit`` bytes, cut at ``limit``."""
        return Extents.from_sorted(
            (start, min(-(-e.end // unit) * unit, limit) - start)
            for e in self.within(0, limit)
            for start in (e.offset // unit * unit,)
        )

    def join_gaps(self, gap: int) -> Extents:
        """Neighbours that are no more than ``gap`` bytes apart made one."""
        joined: list[list[int]] = []
        for extent in self:
            if joined and extent.offset - joined[-1][1] <= gap:
                joined[-1][1] = extent.end
            else:
                joined.append([extent.offset, extent.end])
        return Extents.from_sorted((start, end - start) for start, end in joined)


def _checked(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for offset, length in ranges:
        if offset < 0 or length < 0:
            raise ValueError(f"not a byte range: {offset}+{length}")
        yield offset, length


def _merge(ascending: Iterable[tuple[int, int]]) -> tuple[array[int], array[int]]:
    starts, ends = array("Q"), array("Q")
    for start, end in ascending:
        if start == end:
            continue
        if ends and start <= ends[-1]:
            if start < starts[-1]:
                raise ValueError("ranges do not ascend")
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return starts, ends


def _gaps(ascending: Iterator[Extent], length: int) -> Iterator[tuple[int, int]]:
    at = 0
    for extent in ascending:
        yield at, extent.offset - at
        at = extent.end
    yield at, length - at
