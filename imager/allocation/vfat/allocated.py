"""The allocation map of FAT12, FAT16 and FAT32.

Used are: the reserved sectors (with FSInfo and the backup of the boot sector), every copy of
the FAT, the root directory of FAT12 and FAT16, each cluster whose entry is not zero in any copy
of the FAT (bad ones too), and everything behind the last cluster.

There is no journal. What was going on when the power went shows in links and directory entries
that lead to clusters which the FAT calls free: those are used as well, for a driver reads them.

Every doubt is an error here, and the caller takes it as "all of it".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from imager.allocation.model import AllocationMap, Filesystem, require
from imager.allocation.vfat.layout import (
    BOOT_SECTOR_SIZE,
    ENTRY_SIZE,
    FIRST_CLUSTER,
    MOST_CLUSTERS,
    MOST_CLUSTERS_OF_FAT12,
    Geometry,
)
from imager.allocation.vfat.table import Table
from imager.allocation.vfat.tree import first_clusters
from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

# Makers of filesystems disagree by a few clusters on where FAT12 ends (the specification asks
# everybody to keep away from there).
_AMBIGUOUS = range(MOST_CLUSTERS_OF_FAT12 - 8, MOST_CLUSTERS_OF_FAT12 + 9)

# A BitLocker To Go volume shows itself to old systems as a FAT filesystem (libbde's document
# on the format; GUID 4967d63b-2e29-4ad8-8399-f6a339e3d001).
_BITLOCKER_OFFSET = 424  # bytes
_BITLOCKER = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")

_MOST_EXTRA_CLUSTERS = 1 << 20  # a bound on memory

_STATE_DIRTY, _STATE_ERRORS = 1, 2  # bits of a byte of the boot sector, set by Linux


def allocation_map(source: BlockSource, filesystem: Filesystem) -> AllocationMap:
    """Raises NotRecognized for any doubt, OSError for unreadable sectors."""
    geometry = Geometry.parse(source.pread(0, BOOT_SECTOR_SIZE))
    if geometry is None:
        raise NotRecognized("no FAT boot sector")
    _check_usable(geometry, source.size)
    table = Table(source, geometry)
    used = Extents.from_sorted(_ascending(geometry, table, source.size))
    doubts = list(_doubts(geometry, table))
    starts = first_clusters(source, geometry) if doubts else iter(())
    lost = Extents(_outside(chain(table.link_targets, starts), geometry, used))
    if lost:
        doubts.append("clusters of files are free in its FAT")
        used = used.union(lost)
    if geometry.is_fat32:
        require(_covers(geometry, used, geometry.root_cluster), "its root directory is free")
    if doubts:
        return AllocationMap(used, "union", f"{filesystem.kind}: {', '.join(doubts)}")
    return AllocationMap(used, "exact")


def _check_usable(geometry: Geometry, source_size: int) -> None:
    raw, sector_size = geometry.boot_sector, geometry.sector_size
    require(
        geometry.size <= source_size,
        f"the filesystem has {geometry.size} bytes, the source only {source_size}",
    )
    require(
        not raw.startswith(_BITLOCKER, _BITLOCKER_OFFSET),
        "it is a BitLocker volume",
    )
    require(0 < geometry.clusters <= MOST_CLUSTERS[geometry.bits], "impossible cluster count")
    require(
        geometry.is_fat32 or geometry.clusters not in _AMBIGUOUS,
        "its cluster count leaves open whether it is FAT12 or FAT16",
    )
    require(
        geometry.fat_sectors * sector_size * 8
        >= (geometry.clusters + FIRST_CLUSTER) * geometry.bits,
        "its FAT is shorter than the filesystem",
    )
    require(geometry.root_entries * ENTRY_SIZE % sector_size == 0, "impossible root directory")
    if geometry.is_fat32:
        _check_fat32(geometry)


def _check_fat32(geometry: Geometry) -> None:
    raw = geometry.boot_sector
    version, info, backup = (int.from_bytes(raw[at : at + 2], "little") for at in (42, 48, 50))
    require(version == 0, f"unknown version {version:#x}")
    require(geometry.is_cluster(geometry.root_cluster), "impossible root directory")
    for sector in (info, backup):
        require(
            sector in (0, 0xFFFF) or sector < geometry.reserved,
            "FSInfo or the backup boot sector lie outside of the reserved sectors",
        )


def _ascending(geometry: Geometry, table: Table, source_size: int) -> Iterator[tuple[int, int]]:
    """Used ranges in bytes."""
    yield 0, geometry.cluster_offset(FIRST_CLUSTER)
    for first, count in table.used_runs():
        yield geometry.cluster_offset(first), count * geometry.cluster_size
    end = geometry.cluster_offset(FIRST_CLUSTER + geometry.clusters)
    yield end, source_size - end


def _doubts(geometry: Geometry, table: Table) -> Iterator[str]:
    if table.copies_differ:
        yield "the copies of its FAT differ"
    state = geometry.boot_sector[65 if geometry.is_fat32 else 37]
    if state & (_STATE_DIRTY | _STATE_ERRORS) or _has_cleared_flags(geometry, table):
        yield "it was not unmounted, or is marked as having errors"


def _has_cleared_flags(geometry: Geometry, table: Table) -> bool:
    """The two flags in the second entry of the FAT: no dirt, no errors."""
    if geometry.bits == 12:
        return False
    flags = 0x0C000000 if geometry.bits == 32 else 0xC000
    return table.entry_1 & flags != flags


def _outside(
    numbers: Iterable[int], geometry: Geometry, used: Extents
) -> Iterator[tuple[int, int]]:
    """Byte ranges of the clusters that are not used yet."""
    extra = 0
    for number in numbers:
        if not _covers(geometry, used, number):
            yield geometry.cluster_offset(number), geometry.cluster_size
            extra += 1
            require(extra <= _MOST_EXTRA_CLUSTERS, "too many clusters are free in its FAT")


def _covers(geometry: Geometry, used: Extents, number: int) -> bool:
    return used.covers(geometry.cluster_offset(number), geometry.cluster_size)
