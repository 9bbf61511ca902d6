"""FAT12, FAT16 and FAT32. Source: Microsoft's FAT32 File System Specification 1.03;
integers little-endian."""

from __future__ import annotations

import struct
from typing import NamedTuple

from imager.allocation.model import Filesystem, read_if_inside
from imager.blocksource import BlockSource

_EXTENDED_SIGNATURES = (0x28, 0x29)
_VOLUME_ID, _LONG_NAME = 0x08, 0x0F
_ENTRY_SIZE = 32  # bytes
_UNKNOWN_COUNT = 0xFFFFFFFF


class _Geometry(NamedTuple):
    """Counts in sectors unless the name says otherwise."""

    sector_size: int
    cluster_sectors: int
    reserved: int
    fats: int
    root_entries: int
    fat_sectors: int
    total: int
    is_fat32: bool

    @property
    def root_sectors(self) -> int:
        return -(-self.root_entries * _ENTRY_SIZE // self.sector_size)

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


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    raw = read_if_inside(source, 0, 512)
    geometry = _geometry(raw)
    if geometry is None:
        return None
    extended = 64 if geometry.is_fat32 else 36
    has_serial = raw[extended + 2] in _EXTENDED_SIGNATURES
    serial = int.from_bytes(raw[extended + 3 : extended + 7], "little")
    return Filesystem(
        kind="vfat",
        label=_label(source, geometry, raw),
        uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}" if has_serial else None,
        size=geometry.total * geometry.sector_size,
        used_bytes=_used_bytes(source, geometry, raw),
        block_size=geometry.cluster_size,
        notes=(_width(geometry),),
    )


def _geometry(raw: bytes) -> _Geometry | None:
    """None unless every field is plausible: a boot sector has no magic but 55AA."""
    if len(raw) < 512 or raw[510:] != b"\x55\xaa" or raw[0] not in (0xEB, 0xE9):
        return None
    fields = struct.unpack_from("<HBHBHHBH", raw, 11)
    sector_size, cluster_sectors, reserved, fats, root_entries, total16, media, fat16 = fields
    total32, fat32 = struct.unpack_from("<II", raw, 32)
    geometry = _Geometry(
        sector_size,
        cluster_sectors,
        reserved,
        fats,
        root_entries,
        fat16 or fat32,
        total16 or total32,
        fat16 == 0,
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


def _width(geometry: _Geometry) -> str:
    if geometry.is_fat32:
        return "FAT32"
    return "FAT12" if geometry.clusters < 4085 else "FAT16"


def _label(source: BlockSource, geometry: _Geometry, raw: bytes) -> str | None:
    """From the root directory's first cluster; the boot sector's copy is often stale."""
    if geometry.is_fat32:
        (cluster,) = struct.unpack_from("<I", raw, 44)
        sector = geometry.first_data + (cluster - 2) * geometry.cluster_sectors
        size = geometry.cluster_size
    else:
        sector = geometry.first_data - geometry.root_sectors
        size = geometry.root_sectors * geometry.sector_size
    directory = read_if_inside(source, sector * geometry.sector_size, size)
    for at in range(0, len(directory), _ENTRY_SIZE):
        name, attributes = directory[at : at + 11], directory[at + 11]
        if name[0] == 0:
            break
        is_label = attributes & _VOLUME_ID and attributes != _LONG_NAME
        if is_label and name[0] != 0xE5:
            return name.decode("cp437").rstrip() or None
    return None


def _used_bytes(source: BlockSource, geometry: _Geometry, raw: bytes) -> int | None:
    """From the FSInfo sector of FAT32, when it knows the number of free clusters."""
    if not geometry.is_fat32:
        return None
    (sector,) = struct.unpack_from("<H", raw, 48)
    info = read_if_inside(source, sector * geometry.sector_size, 512)
    if info[:4] != b"RRaA" or info[484:488] != b"rrAa":
        return None
    (free,) = struct.unpack_from("<I", info, 488)
    if free == _UNKNOWN_COUNT or free > geometry.clusters:
        return None
    used_sectors = geometry.total - free * geometry.cluster_sectors
    return int(used_sectors * geometry.sector_size)
