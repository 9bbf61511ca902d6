"""MFT records and their attributes: bytes to values.

Source: Linux fs/ntfs3/ntfs.h; ntfs-3g's layout.h and runlist.c. Integers little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from imager.allocation.model import require
from imager.errors import NotRecognized

ATTRIBUTE_LIST, FILE_NAME, VOLUME_NAME, VOLUME_INFORMATION = 0x20, 0x30, 0x60, 0x70
DATA, BITMAP = 0x80, 0xB0
_END = b"\xff" * 4

_FIXUP_STRIDE = 512  # bytes, however large the sectors are
_IN_USE = 1

_HEADER = struct.Struct("<IIBBH4x")  # type, length, non-resident, name length, name offset
_RESIDENT = struct.Struct("<IH")  # length and offset of the value
_NONRESIDENT = struct.Struct("<QqH6xQQQ")  # lowest, highest VCN, offset of the runs, sizes


class Run(NamedTuple):
    """Clusters in a row."""

    cluster: int | None
    """None for a hole."""
    length: int


class Attribute(NamedTuple):
    """Sizes in bytes; VCN: a cluster's number in its stream."""

    kind: int
    is_named: bool
    value: bytes | None
    """None for a non-resident attribute."""
    lowest_vcn: int
    highest_vcn: int
    allocated_size: int
    data_size: int
    initialized_size: int
    packed_runs: bytes


def is_record(raw: bytes) -> bool:
    return raw.startswith(b"FILE")


def is_in_use(raw: bytes) -> bool:
    return bool(raw[22] & _IN_USE)


def without_fixups(raw: bytes) -> bytes:
    """The record as it is in memory: on disk the last two bytes of each 512 are a number that
    shows torn writes, and stand in an array. Raises NotRecognized for a torn record."""
    array, count = struct.unpack_from("<HH", raw, 4)
    require(
        count == len(raw) // _FIXUP_STRIDE + 1 and array + 2 * count <= _FIXUP_STRIDE - 2,
        "a record's update sequence is impossible",
    )
    record = bytearray(raw)
    number = raw[array : array + 2]
    for block in range(1, count):
        end = block * _FIXUP_STRIDE
        if raw[end - 2 : end] != number:
            raise NotRecognized("a record was not written whole")
        record[end - 2 : end] = raw[array + 2 * block : array + 2 * block + 2]
    return bytes(record)


def attributes(record: bytes) -> Iterator[Attribute]:
    """Of a record without fixups. Raises NotRecognized when they don't fill it soundly."""
    (at,) = struct.unpack_from("<H", record, 20)
    (end,) = struct.unpack_from("<I", record, 24)
    require(at >= 24 and at % 8 == 0 and end <= len(record), "a record's size is impossible")
    while at + 4 <= end:
        if record[at : at + 4] == _END:
            return
        if at + 24 > end:
            break
        kind, length, nonresident, name_length, _ = _HEADER.unpack_from(record, at)
        if length < 24 or length % 8 or at + length > end:
            break
        raw = record[at : at + length]
        yield (
            _nonresident(kind, name_length, raw)
            if nonresident
            else _resident(kind, name_length, raw)
        )
        at += length
    raise NotRecognized("a record's attributes don't end in it")


def _resident(kind: int, name_length: int, raw: bytes) -> Attribute:
    size, offset = _RESIDENT.unpack_from(raw, 16)
    if offset + size > len(raw):
        raise NotRecognized("an attribute's value is longer than the attribute")
    value = raw[offset : offset + size]
    return Attribute(kind, name_length > 0, value, 0, 0, 0, size, size, b"")


def _nonresident(kind: int, name_length: int, raw: bytes) -> Attribute:
    if len(raw) < 64:
        raise NotRecognized("an attribute is too short")
    lowest, highest, offset, allocated, size, initialized = _NONRESIDENT.unpack_from(raw, 16)
    if offset < 64 or offset > len(raw):
        raise NotRecognized("an attribute's list of runs is impossible")
    return Attribute(
        kind, name_length > 0, None, lowest, highest, allocated, size, initialized, raw[offset:]
    )


def runs(attribute: Attribute, clusters: int) -> list[Run]:
    """The clusters of a non-resident attribute, each checked against their number in the
    filesystem. Raises NotRecognized for damage."""
    packed = attribute.packed_runs
    found: list[Run] = []
    at = place = covered = 0
    while at < len(packed) and packed[at]:
        length_size, offset_size = packed[at] & 0xF, packed[at] >> 4
        middle, end = at + 1 + length_size, at + 1 + length_size + offset_size
        if not 1 <= length_size <= 8 or offset_size > 8 or end > len(packed):
            raise NotRecognized("a list of runs is damaged")
        count = int.from_bytes(packed[at + 1 : middle], "little", signed=True)
        if count <= 0:
            raise NotRecognized("a list of runs is damaged")
        if offset_size:
            place += int.from_bytes(packed[middle:end], "little", signed=True)
            if place < 0 or place + count > clusters:
                raise NotRecognized("a run lies outside of the filesystem")
        found.append(Run(place if offset_size else None, count))
        covered += count
        at = end
    require(at < len(packed), "a list of runs has no end")
    require(
        covered == attribute.highest_vcn + 1 - attribute.lowest_vcn,
        "a list of runs doesn't have the length it should have",
    )
    return found
