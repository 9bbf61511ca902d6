"""The boot region of exFAT, and where things lie.

Source: Microsoft's exFAT file system specification; integers little-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Self

from imager.allocation.model import require
from imager.blocksource import BlockSource
from imager.errors import UnsupportedError

BOOT_SECTOR_SIZE = 512  # bytes; what counts of it, however large the sectors are
ENTRY_SIZE = 32  # bytes of a directory entry
FIRST_CLUSTER = 2

_CHECKED_SECTORS = 11  # of a boot region; the twelfth holds their checksum
_BOOT_REGIONS_SECTORS = 24
_UNCHECKED_BYTES = (106, 107, 112)  # flags and percent in use
_MOST_CLUSTERS = (1 << 32) - 11

_SECOND_FAT_ACTIVE, _DIRTY, _MEDIA_FAILURE = 1, 2, 4


class Geometry(NamedTuple):
    """Sizes and places in bytes unless the name says otherwise."""

    sector_size: int
    cluster_size: int
    size: int
    fat_offset: int
    fat_size: int
    heap_offset: int
    clusters: int
    root_cluster: int
    serial: int
    revision: int
    flags: int
    fats: int

    @classmethod
    def parse(cls, raw: bytes) -> Self | None:
        """None without signature or with sizes that can't be."""
        if raw[3:11] != b"EXFAT   " or raw[510:512] != b"\x55\xaa":
            return None
        (sectors,) = struct.unpack_from("<Q", raw, 72)
        fat, fat_length, heap, clusters, root, serial = struct.unpack_from("<6I", raw, 80)
        revision, flags, sector_shift, cluster_shift, fats = struct.unpack_from("<HHBBB", raw, 104)
        if not (9 <= sector_shift <= 12 and sector_shift + cluster_shift <= 25 and root >= 2):
            return None
        return cls(
            sector_size=1 << sector_shift,
            cluster_size=1 << sector_shift + cluster_shift,
            size=sectors << sector_shift,
            fat_offset=fat << sector_shift,
            fat_size=fat_length << sector_shift,
            heap_offset=heap << sector_shift,
            clusters=clusters,
            root_cluster=root,
            serial=serial,
            revision=revision,
            flags=flags,
            fats=fats,
        )

    @property
    def is_dirty(self) -> bool:
        return bool(self.flags & _DIRTY)

    def is_cluster(self, number: int) -> bool:
        return FIRST_CLUSTER <= number < FIRST_CLUSTER + self.clusters

    def cluster_offset(self, number: int) -> int:
        return self.heap_offset + (number - FIRST_CLUSTER) * self.cluster_size

    def clusters_for(self, length: int) -> int:
        return -(-length // self.cluster_size)

    def check(self, source: BlockSource) -> None:
        """Raises UnsupportedError for what is not known, NotRecognized for any inconsistency,
        OSError."""
        if self.revision >> 8 != 1:
            raise UnsupportedError(f"unknown revision {self.revision >> 8}.{self.revision & 0xFF}")
        if self.fats != 1 or self.flags & _SECOND_FAT_ACTIVE:
            raise UnsupportedError("it has two FATs (TexFAT)")
        require(not self.flags & _MEDIA_FAILURE, "it is marked as having unreadable sectors")
        self._check_places(source.size)
        region = source.pread(0, (_CHECKED_SECTORS + 1) * self.sector_size)
        checked = region[: _CHECKED_SECTORS * self.sector_size]
        stored = region[_CHECKED_SECTORS * self.sector_size :]
        require(
            stored == boot_checksum(checked).to_bytes(4, "little") * (self.sector_size // 4),
            "the checksum of the boot region is wrong",
        )

    def _check_places(self, source_size: int) -> None:
        require(
            self.size <= source_size,
            f"the filesystem has {self.size} bytes, the source only {source_size}",
        )
        require(
            0 < self.clusters <= _MOST_CLUSTERS
            and self.fat_offset >= _BOOT_REGIONS_SECTORS * self.sector_size
            and self.fat_size >= (self.clusters + FIRST_CLUSTER) * 4
            and self.fat_offset + self.fat_size <= self.heap_offset
            and self.heap_offset + self.clusters * self.cluster_size <= self.size
            and self.is_cluster(self.root_cluster),
            "the sizes in the boot sector don't add up",
        )


def boot_checksum(sectors: bytes) -> int:
    """Of the eleven sectors that a boot region starts with."""
    total = 0
    for place, byte in enumerate(sectors):
        if place not in _UNCHECKED_BYTES:
            total = ((total << 31 | total >> 1) + byte) & 0xFFFFFFFF
    return total
