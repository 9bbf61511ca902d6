"""What identifies a physical volume: its label, its header, and its metadata areas.

Source: LVM2 lib/label/label.h, lib/format_text/layout.h and lib/misc/crc.c; integers are
little-endian, and a sector is 512 bytes whatever the disk has.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from imager.allocation.model import read_if_inside, require
from imager.blocksource import BlockSource
from imager.extents import Extent

SECTOR = 512
_LABEL_SECTORS = 4  # the label is in one of the first four
_CHECKSUM_SEED = 0xF597A6CF  # INITIAL_CRC
_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_AREA_HEADER_SIZE = 512  # bytes
_IGNORED = 1  # RAW_LOCN_IGNORED: the area is there, but not kept up to date
_MAX_TEXT = 8 << 20  # bytes; a metadata area is 1 MiB unless asked for otherwise
_MAX_EXTENSION = 2


class Location(NamedTuple):
    """Where the text of a volume group lies: bytes from the metadata area's start."""

    offset: int
    size: int
    checksum: int
    flags: int


class PhysicalVolume(NamedTuple):
    """The label's sector, parsed. Offsets and sizes in bytes."""

    uuid: str
    size: int
    data_areas: tuple[Extent, ...]
    """The size of the last one is 0: to the end of the device."""
    metadata_areas: tuple[Extent, ...]
    extension: int
    """Version of what follows in the header: flags, and a list of boot loader areas."""


def find_label(source: BlockSource) -> bytes | None:
    """The sector with the label, damaged or not; None when there is none.

    Raises NotRecognized for a label that says it is elsewhere, OSError.
    """
    for sector in range(_LABEL_SECTORS):
        raw = read_if_inside(source, sector * SECTOR, SECTOR)
        if raw[:8] == b"LABELONE" and raw[24:32] == b"LVM2 001":
            own = int.from_bytes(raw[8:16], "little")
            require(own == sector, f"the label in sector {sector} is that of sector {own}")
            return raw
    return None


def parse_label(raw: bytes) -> PhysicalVolume:
    """Raises NotRecognized for an impossible structure; see ``check_label`` for the rest."""
    (at,) = struct.unpack_from("<I", raw, 20)
    require(32 <= at <= SECTOR - 72, "the label points outside of its sector")
    uuid = dashed(raw[at : at + 32].decode("ascii", errors="replace"))
    (size,) = struct.unpack_from("<Q", raw, at + 32)
    data, at = _areas(raw, at + 40)
    metadata, at = _areas(raw, at)
    extension = int.from_bytes(raw[at : at + 4], "little")
    return PhysicalVolume(uuid, size, data, metadata, extension)


def check_label(raw: bytes, volume: PhysicalVolume) -> None:
    """Raises NotRecognized for a wrong checksum or what only a later LVM knows."""
    (checksum,) = struct.unpack_from("<I", raw, 16)
    require(lvm_checksum(raw[20:]) == checksum, "the checksum of the label is wrong")
    require(
        volume.extension <= _MAX_EXTENSION, f"unknown extension {volume.extension} of the header"
    )


def current_text(source: BlockSource, area: Extent) -> bytes:
    """The text in a metadata area; empty when there is none or when it isn't kept up to date.

    The text lies in a ring behind the area's header, and may continue at the ring's start.
    Raises NotRecognized for a wrong checksum or a change that is not committed, OSError.
    """
    header = read_if_inside(source, area.offset, _AREA_HEADER_SIZE)
    locations = _checked_locations(header, area)
    current = locations[0]
    if current.flags & _IGNORED:
        return b""
    require(not locations[1].offset, "a change of the volume group is not yet committed")
    if not current.offset:
        return b""
    require(not current.flags, f"unknown flags {current.flags:#x} of its metadata")
    text = b"".join(_ring(source, area, current))
    require(lvm_checksum(text) == current.checksum, "the checksum of its metadata is wrong")
    return text.rstrip(b"\0")


def lvm_checksum(data: bytes) -> int:
    """CRC-32 (the polynomial of zlib) with LVM's seed, and no inversion before or after."""
    return zlib.crc32(data, _CHECKSUM_SEED ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def dashed(raw: str) -> str:
    """LVM prints its ids as 6-4-4-4-4-4-6 characters."""
    cuts = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(raw[a:b] for a, b in pairwise(cuts))


def _areas(raw: bytes, at: int) -> tuple[tuple[Extent, ...], int]:
    """A list of (offset, size), ended by zeros; also where it ends."""
    areas: list[Extent] = []
    while at + 16 <= SECTOR:
        offset, size = struct.unpack_from("<QQ", raw, at)
        at += 16
        if offset == 0:
            return tuple(areas), at
        areas.append(Extent(offset, size))
    require(False, "a list in the header of the physical volume has no end")
    return (), at


def _checked_locations(header: bytes, area: Extent) -> tuple[Location, Location]:
    """The committed and the precommitted text. Raises NotRecognized."""
    require(len(header) == _AREA_HEADER_SIZE, "a metadata area lies outside of the device")
    checksum, magic, version, start, size = struct.unpack_from("<I16sIQQ", header)
    require(magic == _AREA_MAGIC, "there is no metadata area where the header says")
    require(lvm_checksum(header[4:]) == checksum, "the checksum of a metadata area is wrong")
    require(version == 1, f"unknown version {version} of a metadata area")
    require((start, size) == area, "a metadata area and the header do not agree")
    current = Location(*struct.unpack_from("<QQII", header, 40))
    # The list ends at the first location without an offset.
    other = struct.unpack_from("<QQII", header, 64) if current.offset else (0, 0, 0, 0)
    return current, Location(*other)


def _ring(source: BlockSource, area: Extent, text: Location) -> Iterator[bytes]:
    room = area.length - _AREA_HEADER_SIZE
    require(
        _AREA_HEADER_SIZE <= text.offset < area.length and text.size <= min(room, _MAX_TEXT),
        "the metadata lies outside of its area",
    )
    require(area.end <= source.size, "a metadata area ends behind the device")
    first = min(text.size, area.length - text.offset)
    yield source.pread(area.offset + text.offset, first)
    yield source.pread(area.offset + _AREA_HEADER_SIZE, text.size - first)
