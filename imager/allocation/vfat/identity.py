"""What a FAT filesystem says of itself."""

from __future__ import annotations

import struct

from imager.allocation.model import Filesystem, read_if_inside
from imager.allocation.vfat.layout import BOOT_SECTOR_SIZE, ENTRY_SIZE, Geometry
from imager.blocksource import BlockSource

_EXTENDED_SIGNATURES = (0x28, 0x29)
_VOLUME_ID, _LONG_NAME = 0x08, 0x0F
_UNKNOWN_COUNT = 0xFFFFFFFF


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    raw = read_if_inside(source, 0, BOOT_SECTOR_SIZE)
    geometry = Geometry.parse(raw)
    if geometry is None:
        return None
    extended = 64 if geometry.is_fat32 else 36
    has_serial = raw[extended + 2] in _EXTENDED_SIGNATURES
    serial = int.from_bytes(raw[extended + 3 : extended + 7], "little")
    return Filesystem(
        kind="vfat",
        label=_label(source, geometry),
        uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}" if has_serial else None,
        size=geometry.size,
        used_bytes=_used_bytes(source, geometry, raw),
        block_size=geometry.cluster_size,
        notes=(f"FAT{geometry.bits}",),
    )


def _label(source: BlockSource, geometry: Geometry) -> str | None:
    """From the root directory's first cluster; the boot sector's copy is often stale."""
    if geometry.is_fat32:
        offset = geometry.cluster_offset(geometry.root_cluster)
        size = geometry.cluster_size
    else:
        offset = (geometry.first_data - geometry.root_sectors) * geometry.sector_size
        size = geometry.root_sectors * geometry.sector_size
    directory = read_if_inside(source, offset, size)
    for at in range(0, len(directory), ENTRY_SIZE):
        name, attributes = directory[at : at + 11], directory[at + 11]
        if name[0] == 0:
            break
        is_label = attributes & _VOLUME_ID and attributes != _LONG_NAME
        if is_label and name[0] != 0xE5:
            return name.decode("cp437").rstrip() or None
    return None


def _used_bytes(source: BlockSource, geometry: Geometry, raw: bytes) -> int | None:
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
