"""The directory tree of a FAT filesystem: where its files begin.

Only walked when the filesystem was not unmounted: a directory entry may then be on the disk
before the FAT knows of its clusters.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imager.allocation.model import require
from imager.allocation.vfat.layout import ENTRY_SIZE, Geometry
from imager.blocksource import BlockSource

_DIRECTORY, _VOLUME_ID = 0x10, 0x08  # attributes; entries of long names have both label bits
_FREE, _END = 0xE5, 0x00
# A bound on work and memory when damage makes directories of everything.
_MOST_DIRECTORY_CLUSTERS = 1 << 20


def first_clusters(source: BlockSource, geometry: Geometry) -> Iterator[int]:
    """The first cluster of every file, and all clusters of directories (by any copy of the FAT).

    Raises NotRecognized for directories that can't be, OSError for unreadable sectors.
    """
    waiting = []
    if geometry.is_fat32:
        waiting.append(geometry.root_cluster)
    else:
        start = geometry.first_data - geometry.root_sectors
        size = geometry.root_sectors * geometry.sector_size
        root = source.pread(start * geometry.sector_size, size)
        yield from _listed(geometry, root, waiting)
    seen: set[int] = set()
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        require(len(seen) <= _MOST_DIRECTORY_CLUSTERS, "too many directories")
        yield number
        part = source.pread(geometry.cluster_offset(number), geometry.cluster_size)
        yield from _listed(geometry, part, waiting)
        waiting.extend(filter(geometry.is_cluster, _following(source, geometry, number)))


def _listed(geometry: Geometry, entries: bytes, waiting: list[int]) -> Iterator[int]:
    """First clusters in a part of a directory; subdirectories join the waiting ones."""
    for at in range(0, len(entries) - ENTRY_SIZE + 1, ENTRY_SIZE):
        name, attributes = entries[at], entries[at + 11]
        if name == _END:
            return
        if name in (_FREE, ord(".")) or attributes & _VOLUME_ID:
            continue
        high, low = struct.unpack_from("<H4xH", entries, at + 20)
        number = low | high << 16 if geometry.is_fat32 else low
        if number == 0:  # an empty file
            continue
        require(geometry.is_cluster(number), "a file begins outside of the filesystem")
        yield number
        if attributes & _DIRECTORY:
            waiting.append(number)


def _following(source: BlockSource, geometry: Geometry, number: int) -> Iterator[int]:
    """The entry of a cluster, in every copy of the FAT."""
    place = number * geometry.bits // 8
    for copy in range(geometry.fats):
        raw = source.pread(geometry.fat_offset(copy) + place, 4 if geometry.is_fat32 else 2)
        entry = int.from_bytes(raw, "little")
        if geometry.bits == 12:
            entry = entry >> 4 if number % 2 else entry & 0xFFF
        yield entry & 0x0FFFFFFF
