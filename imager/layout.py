"""What is on a disk: its partition table, the filesystems, and which bytes they use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from imager.allocation import (
    AllocationMap,
    Companion,
    Filesystem,
    allocation_map,
    identify,
    transparent_raid,
)
from imager.blocksource import BlockSource, PartSource
from imager.extents import Extents
from imager.partitions import Partition, PartitionTable, read_partition_table

# Filesystems think in pages of this size or larger; smaller pieces are not worth a seek.
PIECE_SIZE = 4096


Verdict = Literal["proved", "nothing to prove", "not proved", "failed"]


@dataclass(frozen=True)
class Proof:
    """What the coverage proof says of a volume's map."""

    verdict: Verdict
    text: str
    """By what it was proved, or why it was not."""

    @property
    def holds(self) -> bool:
        """Whether the map can be trusted by more than its own word."""
        return self.verdict in ("proved", "nothing to prove")

    def to_json(self) -> dict[str, str]:
        return {"verdict": self.verdict, "text": self.text}


@dataclass(frozen=True)
class Volume:
    """A partition, or the whole of a disk without a table. Offsets and sizes in bytes."""

    partition: Partition | None
    offset: int
    size: int
    filesystem: Filesystem
    allocation: AllocationMap
    proof: Proof | None = None
    excluded: str | None = None
    """Why nothing of it is captured: a data backup has it. See ``exclusion``."""

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
            **({"proof": self.proof.to_json()} if self.proof else {}),
            **({"excluded": self.excluded} if self.excluded else {}),
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
            if volume.excluded is None
        ]
        outside = mapped.complement(self.size)
        used = Extents([*outside, *inside, *self.table.table_extents])
        return used.align_outward(PIECE_SIZE, self.size)

    def excluded(self) -> Extents:
        """The partitions of which nothing is captured."""
        return Extents((v.offset, v.size) for v in self.volumes if v.excluded is not None)


def read_layout(source: BlockSource) -> DiskLayout:
    """Read table and allocation maps; what can't be understood counts as used."""
    return read_layouts([source])[0]


def read_layouts(sources: Sequence[BlockSource]) -> list[DiskLayout]:
    """The layouts of disks that are captured together.

    First what all of them hold, then the maps: a filesystem or volume group over several devices
    may have on one what says which bytes of another are used.
    """
    tables = [read_partition_table(source) for source in sources]
    places = [_places(source, table) for source, table in zip(sources, tables, strict=True)]
    companions = [place.content for disk in places for place in disk]
    return [
        DiskLayout(table, _volumes(source, disk, companions), source.size)
        for source, table, disk in zip(sources, tables, places, strict=True)
    ]


class _Place(NamedTuple):
    """Where a volume lies, and what was found there."""

    partition: Partition | None
    offset: int
    content: Companion


def _places(source: BlockSource, table: PartitionTable) -> list[_Place]:
    """Ascending. A disk without partitions is one place."""
    if not table.partitions:
        return [_place(source, None, 0, source.size)]
    return [
        _place(source, partition, partition.offset, partition.size)
        for partition in sorted(table.partitions, key=lambda item: item.offset)
        if partition.kind != "extended" and partition.end <= source.size
    ]


def _place(source: BlockSource, partition: Partition | None, offset: int, size: int) -> _Place:
    part = PartSource(source, offset, size)
    return _Place(partition, offset, Companion(identify(part), part))


def _volumes(
    source: BlockSource, places: Sequence[_Place], companions: Sequence[Companion]
) -> tuple[Volume, ...]:
    volumes = _without_overlaps(_volume(place, companions) for place in places)
    raid = _raid_of(source, places)
    if raid is None:
        return volumes
    return tuple(_all_used(v, f"the disk is a member of a RAID ({raid.kind})") for v in volumes)


def _raid_of(source: BlockSource, places: Sequence[_Place]) -> Filesystem | None:
    """The RAID that a partitioned disk is a member of: the table is then that of the array, whose
    partitions may go on at other disks.

    An md superblock 0.90 in the last partition can look like one of the disk, but for its size.
    """
    raid = transparent_raid(source) if any(place.partition for place in places) else None
    if raid and raid.size and raid.size <= source.size - places[-1].offset:
        return None
    return raid


def _volume(place: _Place, companions: Sequence[Companion]) -> Volume:
    filesystem, part = place.content
    allocation = allocation_map(part, companions)
    return Volume(place.partition, place.offset, part.size, filesystem, allocation)


def _without_overlaps(volumes: Iterable[Volume]) -> tuple[Volume, ...]:
    """Where partitions overlap, no map can be trusted: those count as used whole."""
    ordered = list(volumes)
    doubtful = set()
    for one, other in pairwise(ordered):
        if one.offset + one.size > other.offset:
            doubtful |= {id(one), id(other)}
    reason = "it overlaps another partition"
    return tuple(_all_used(v, reason) if id(v) in doubtful else v for v in ordered)


def _all_used(volume: Volume, reason: str) -> Volume:
    allocation = AllocationMap(Extents.whole(volume.size), "all", reason)
    return Volume(volume.partition, volume.offset, volume.size, volume.filesystem, allocation)
