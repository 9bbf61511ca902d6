"""NTFS. Source: the boot sector and MFT record layout as documented by the Linux kernel's
fs/ntfs3/ntfs.h; integers little-endian."""

from __future__ import annotations

import struct

from imager.allocation.model import Filesystem, read_if_inside
from imager.blocksource import BlockSource

_VOLUME_RECORD = 3  # MFT record of $Volume
_VOLUME_NAME, _VOLUME_INFORMATION, _END = 0x60, 0x70, 0xFFFFFFFF
_DIRTY = 0x1


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    raw = read_if_inside(source, 0, 512)
    if raw[3:11] != b"NTFS    ":
        return None
    sector_size, cluster_code = struct.unpack_from("<HB", raw, 11)
    sectors, mft_cluster = struct.unpack_from("<QQ", raw, 40)
    # Above 128 the byte is a negative power of two.
    cluster_sectors = cluster_code if cluster_code <= 128 else 1 << (256 - cluster_code)
    cluster_size = cluster_sectors * sector_size
    attributes = _volume_attributes(
        source, mft_cluster * cluster_size, _record_size(raw[64], cluster_size)
    )
    name = attributes.get(_VOLUME_NAME, b"").decode("utf-16-le", errors="replace")
    flags = int.from_bytes(attributes.get(_VOLUME_INFORMATION, b"")[10:12], "little")
    return Filesystem(
        kind="ntfs",
        label=name or None,
        uuid=f"{int.from_bytes(raw[72:80], 'little'):016X}",
        size=sectors * sector_size,
        block_size=cluster_size,
        notes=("it is marked dirty",) if flags & _DIRTY else (),
    )


def _record_size(code: int, cluster_size: int) -> int:
    """Bytes of an MFT record: clusters, or a negative power of two."""
    return 1 << (256 - code) if code > 127 else code * cluster_size


def _volume_attributes(source: BlockSource, mft: int, record_size: int) -> dict[int, bytes]:
    """Resident attributes of $Volume by type; empty when the record is not sound."""
    if not 512 <= record_size <= 65536:
        return {}
    raw = read_if_inside(source, mft + _VOLUME_RECORD * record_size, record_size)
    if raw[:4] != b"FILE":
        return {}
    record = _without_fixups(raw)
    attributes: dict[int, bytes] = {}
    (at,) = struct.unpack_from("<H", record, 20)
    while at + 24 <= len(record):
        kind, length, nonresident = struct.unpack_from("<IIB", record, at)
        if kind == _END or length < 24 or at + length > len(record):
            break
        if not nonresident:
            size, offset = struct.unpack_from("<IH", record, at + 16)
            attributes[kind] = record[at + offset : at + min(offset + size, length)]
        at += length
    return attributes


def _without_fixups(raw: bytes) -> bytes:
    """The last two bytes of each sector are kept in an array, for tear detection."""
    record = bytearray(raw)
    array, count = struct.unpack_from("<HH", raw, 4)
    for sector in range(1, min(count, len(raw) // 512 + 1)):
        record[sector * 512 - 2 : sector * 512] = raw[array + 2 * sector : array + 2 * sector + 2]
    return bytes(record[: len(raw)])
