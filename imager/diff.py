"""What differs between two disks of images, by comparing their block maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from imager.blockmap import BlockMap, Run
from imager.errors import UsageError
from imager.extents import Extent, Extents
from imager.manifest import Disk
from imager.repository import Repository


@dataclass(frozen=True)
class Change:
    """A changed range; offset and length in bytes."""

    offset: int
    length: int
    where: str


@dataclass(frozen=True)
class Difference:
    changes: tuple[Change, ...]
    changed_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "changes": [vars(change) for change in self.changes],
            "changed_bytes": self.changed_bytes,
        }


def diff(repository: Repository, one: Disk, other: Disk) -> Difference:
    """Ranges that read differently, cut at partition borders; zero and unused read the same.

    Raises UsageError when the block sizes differ.
    """
    if one.block_size != other.block_size:
        raise UsageError("the images have different block sizes and can't be compared by blocks")
    unit = one.block_size
    maps = repository.block_map(one), repository.block_map(other)
    blocks = _changed_blocks(*maps)
    size = max(one.size, other.size)
    extents = Extents.from_sorted(
        (first * unit, min((first + count) * unit, size) - first * unit) for first, count in blocks
    )
    if one.size != other.size:
        least = min(one.size, other.size)
        extents = extents.union(Extents([(least, size - least)]))
    changes = tuple(chain.from_iterable(_named(other, extent) for extent in extents))
    return Difference(changes, extents.total)


def _changed_blocks(one: BlockMap, other: BlockMap) -> Iterator[tuple[int, int]]:
    """(first block, number of blocks) that differ, in order, as far as both maps reach."""
    runs, others = one.runs(), other.runs()
    a, b = next(runs, None), next(others, None)
    while a is not None and b is not None:
        count = min(a.blocks, b.blocks)
        if a.digest != b.digest:
            yield a.first, count
        a, b = _behind(a, count, runs), _behind(b, count, others)


def _behind(run: Run, count: int, runs: Iterator[Run]) -> Run | None:
    if count == run.blocks:
        return next(runs, None)
    return run._replace(first=run.first + count, blocks=run.blocks - count)


def _named(disk: Disk, extent: Extent) -> Iterator[Change]:
    """An extent cut at the borders of partitions, each part with its name."""
    borders = {extent.offset, extent.end}
    for item in disk.partitions:
        start, size = item.get("offset"), item.get("size")
        if isinstance(start, int) and isinstance(size, int):
            borders |= {n for n in (start, start + size) if extent.offset < n < extent.end}
    ordered = sorted(borders)
    for start, end in pairwise(ordered):
        yield Change(start, end - start, disk.where(start))
