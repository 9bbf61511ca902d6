"""The boot sector of FAT12, FAT16 and FAT32, and where things lie.

Source: Microsoft's FAT32 File System Specification 1.03; Linux fs/fat/inode.c where makers
disagree. Integers are little-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Self

BOOT_SECTOR_SIZE = 512  # bytes; what counts of it, however large the sectors are
ENTRY_SIZE = 32  # bytes of a directory entry
FIRST_CLUSTER = 2

MOST_CLUSTERS_OF_FAT12 = 4084
MOST_CLUSTERS = {12: MOST_CLUSTERS_OF_FAT12, 16: 65524, 32: 0x0FFFFFF4}


class Geometry(NamedTuple):
    """Counts in sectors unless the name says otherwise."""

    sector_size: int
    cluster_sectors: int
    reserved: int
    fats: int
    root_entries: int
    fat_sectors: int
    total: int
    media: int
    is_fat32: bool
    boot_sector: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Self | None:
        """None unless every field is plausible: a boot sector has no magic but 55AA."""
        if len(raw) < BOOT_SECTOR_SIZE or raw[510:512] != b"\x55\xaa" or raw[0] not in (0xEB, 0xE9):
            return None
        fields = struct.unpack_from("<HBHBHHBH", raw, 11)
        sector_size, cluster_sectors, reserved, fats, root_entries, total16, media, fat16 = fields
        total32, fat32 = struct.unpack_from("<II", raw, 32)
        geometry = cls(
            sector_size,
            cluster_sectors,
            reserved,
            fats,
            root_entries,
            fat16 or fat32,
            total16 or total32,
            media,
            fat16 == 0,
            raw,
        )
        plausible = (
            sector_size in (512, 1024, 2048, 4096)
            and cluster_sectors.bit_count() == 1
            and reserved > 0
            and 1 <= fats <= 4
            and media >= 0xF0
            and geometry.fat_sectors > 0
            and geometry.first_data < geometry.total
            and (root_entries > 0) != geometry.is_fat32
        )
        return geometry if plausible else None

    @property
    def bits(self) -> int:
        """Width of a FAT entry. The number of clusters decides between 12 and 16."""
        if self.is_fat32:
            return 32
        return 12 if self.clusters <= MOST_CLUSTERS_OF_FAT12 else 16

    @property
    def root_sectors(self) -> int:
        return -(-self.root_entries * ENTRY_SIZE // self.sector_size)

    @property
    def first_data(self) -> int:
        return self.reserved + self.fats * self.fat_sectors + self.root_sectors

    @property
    def clusters(self) -> int:
        return (self.total - self.first_data) // self.cluster_sectors

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.cluster_sectors * self.sector_size

    @property
    def size(self) -> int:
        """Bytes."""
        return self.total * self.sector_size

    @property
    def root_cluster(self) -> int:
        """Of FAT32; the root directory of the others has a place of its own."""
        return int.from_bytes(self.boot_sector[44:48], "little")

    def is_cluster(self, number: int) -> bool:
        return FIRST_CLUSTER <= number < FIRST_CLUSTER + self.clusters

    def cluster_offset(self, number: int) -> int:
        """Bytes."""
        return self.first_data * self.sector_size + (number - FIRST_CLUSTER) * self.cluster_size

    def fat_offset(self, copy: int) -> int:
        """Bytes."""
        return (self.reserved + copy * self.fat_sectors) * self.sector_size
