"""What is on a disk: its partition table, the filesystems, and which bytes they use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from imager.allocation import AllocationMap, Filesystem, allocation_map, identify
from imager.blocksource import BlockSource, PartSource
from imager.extents import Extents
from imager.partitions import Partition, PartitionTable, read_partition_table

# Filesystems think in pages of this size or larger; smaller pieces are not worth a seek.
PIECE_SIZE = 4096


@dataclass(frozen=True)
class Volume:
    """A partition, or the whole of a disk without a table. Offsets and sizes in bytes."""

    partition: Partition | None
    offset: int
    size: int
    filesystem: Filesystem
    allocation: AllocationMap

    @property
    def number(self) -> int | None:
        return self.partition.number if self.partition else None

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "offset": self.offset,
            "size": self.size,
            "filesystem": self.filesystem.to_json(),
            "used_bytes": self.allocation.used.total,
            "certainty": self.allocation.certainty,
            "reason": self.allocation.reason,
        }


@dataclass(frozen=True)
class DiskLayout:
    table: PartitionTable
    volumes: tuple[Volume, ...]
    size: int

    def used(self) -> Extents:
        """What has to be captured: all that no filesystem calls unused, in whole pieces.

        Space outside of partitions is included: boot loaders live there.
        """
        mapped = Extents((volume.offset, volume.size) for volume in self.volumes)
        inside = [
            (volume.offset + extent.offset, extent.length)
            for volume in self.volumes
            for extent in volume.allocation.used
        ]
        outside = mapped.complement(self.size)
        used = Extents([*outside, *inside, *self.table.table_extents])
        return used.align_outward(PIECE_SIZE, self.size)


def read_layout(source: BlockSource) -> DiskLayout:
    """Read table and allocation maps; what can't be understood counts as used."""
    table = read_partition_table(source)
    if not table.partitions:
        return DiskLayout(table, (_volume(source, None, 0, source.size),), source.size)
    volumes = (
        _volume(source, partition, partition.offset, partition.size)
        for partition in sorted(table.partitions, key=lambda item: item.offset)
        if partition.kind != "extended" and partition.end <= source.size
    )
    return DiskLayout(table, _without_overlaps(volumes), source.size)


def _volume(source: BlockSource, partition: Partition | None, offset: int, size: int) -> Volume:
    part = PartSource(source, offset, size)
    return Volume(partition, offset, size, identify(part), allocation_map(part))


def _without_overlaps(volumes: Iterable[Volume]) -> tuple[Volume, ...]:
    """Where partitions overlap, no map can be trusted: those count as used whole."""
    ordered = list(volumes)
    doubtful = set()
    for one, other in pairwise(ordered):
        if one.offset + one.size > other.offset:
            doubtful |= {id(one), id(other)}
    return tuple(_all_used(v) if id(v) in doubtful else v for v in ordered)


def _all_used(volume: Volume) -> Volume:
    allocation = AllocationMap(Extents.whole(volume.size), "all", "it overlaps another partition")
    return Volume(volume.partition, volume.offset, volume.size, volume.filesystem, allocation)
