"""A volume group: its physical volumes, and the logical volumes with their segments.

Source: LVM2 lib/format_text/import_vsn1.c, flags.c and lib/metadata/segtype.h. Extents here are
LVM's: equal pieces, counted from 0 on each physical volume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from imager.allocation.lvm2.label import SECTOR
from imager.allocation.lvm2.metadata import Section, Value
from imager.allocation.model import require

_MAX_SECTORS = 1 << 55  # 2**64 bytes
_MAX_COLUMNS = 128  # MAX_STRIPES; a mirror has far fewer
_GROUP_STATUS = {"RESIZEABLE", "READ", "WRITE"}
_PARTS = {"physical_volumes", "logical_volumes", "historical_logical_volumes"}
_VOLUME_STATUS = {"READ", "WRITE", "VISIBLE", "FIXED_MINOR"}
_VOLUME_KEYS = {
    *("id", "status", "flags", "tags", "creation_time", "creation_host", "segment_count"),
    *("allocation_policy", "read_ahead", "profile", "major", "minor"),
}
_SEGMENT_KEYS = {"start_extent", "extent_count", "type", "tags"}
_STRIPED_KEYS = _SEGMENT_KEYS | {"stripe_count", "stripe_size", "stripes"}
_MIRROR_KEYS = _SEGMENT_KEYS | {"mirror_count", "mirror_log", "region_size", "mirrors"}

# Segments whose places on physical volumes are all in their lists of (name, first extent). One
# of any other type may have them where nobody knows.
_KNOWN_TYPES = {
    *("striped", "mirror", "snapshot", "thin", "thin-pool", "cache", "cache-pool"),
    *("writecache", "integrity", "vdo", "vdo-pool", "error", "zero"),
}


class Area(NamedTuple):
    """Where a column of a segment begins."""

    name: str
    """Of a physical volume in the metadata, or of a logical volume."""
    extent: int
    """The first one on a physical volume, or of a logical volume."""


@dataclass(frozen=True)
class Segment:
    start: int
    """In extents of the logical volume."""
    count: int
    """In extents of the logical volume."""
    type: str
    stripe_size: int
    """In bytes; 0 with one column."""
    areas: tuple[Area, ...]
    doubt: str | None
    """Why it is none that can be followed: not plainly striped or mirrored."""

    @property
    def column_extents(self) -> int:
        """How much each column holds. Only of segments that the physical volumes hold."""
        return self.count // len(self.areas) if self.type == "striped" else self.count


@dataclass(frozen=True)
class LogicalVolume:
    name: str
    segments: tuple[Segment, ...]
    is_visible: bool
    doubt: str | None
    """Why what is inside can't be followed, whatever its segments are."""
    used_by: tuple[str, ...]
    """Other logical volumes with a segment that names this one."""

    @property
    def types(self) -> str:
        """For people, who call a segment with one column linear."""
        return "+".join(
            sorted(
                {
                    "linear" if s.type == "striped" and len(s.areas) == 1 else s.type
                    for s in self.segments
                }
            )
        )


@dataclass(frozen=True)
class Member:
    """A physical volume as the group's metadata describes it. Offsets and sizes in bytes."""

    name: str
    uuid: str
    start: int
    """Of the first extent."""
    extents: int


@dataclass(frozen=True)
class VolumeGroup:
    name: str
    uuid: str
    sequence: int
    extent_size: int
    """In bytes."""
    members: dict[str, Member]
    volumes: dict[str, LogicalVolume]
    doubt: str | None
    """Why nothing inside can be followed: exported, or with a missing member."""


def read_group(document: Section) -> VolumeGroup:
    """Raises NotRecognized for whatever is missing, impossible or of an unknown kind."""
    require(document.get("contents") == "Text Format Volume Group", "not a volume group's text")
    require(document.get("version") == 1, "unknown version of the metadata")
    groups = [(key, value) for key, value in document.items() if isinstance(value, dict)]
    require(len(groups) == 1, "not one volume group in the metadata")
    name, body = groups[0]
    require(body.get("format", "lvm2") == "lvm2", "unknown format of the volume group")
    unknown = sorted(
        key for key, part in body.items() if isinstance(part, dict) and key not in _PARTS
    )
    require(not unknown, f"the volume group has unknown {' '.join(unknown)}")
    extent_size = _number(body, "extent_size", 1) * SECTOR
    members = {
        key: _member(key, value, extent_size)
        for key, value in _sections(body.get("physical_volumes"))
    }
    volumes = _volumes(body, members, extent_size)
    return VolumeGroup(
        name=name,
        uuid=_text(body, "id"),
        sequence=_number(body, "seqno", 0),
        extent_size=extent_size,
        members=members,
        volumes=volumes,
        doubt=_group_doubt(body),
    )


# --- parts --------------------------------------------------------------------------------------


def _member(name: str, body: Section, extent_size: int) -> Member:
    start = _number(body, "pe_start", 1) * SECTOR
    extents = _number(body, "pe_count", 0)
    require(extents * extent_size <= _MAX_SECTORS * SECTOR, "an impossible number of extents")
    return Member(name, _text(body, "id"), start, extents)


def _volumes(
    body: Section, members: dict[str, Member], extent_size: int
) -> dict[str, LogicalVolume]:
    found = dict(_sections(body.get("logical_volumes", {})))
    users: dict[str, list[str]] = {name: [] for name in found}
    for user, volume in found.items():
        segments = [value for value in volume.values() if isinstance(value, dict)]
        for name in {word for segment in segments for word in _names_in(segment)}:
            if name in users:
                users[name].append(user)
    return {
        name: _volume(name, volume, tuple(users[name]), members, extent_size)
        for name, volume in found.items()
    }


def _volume(
    name: str,
    body: Section,
    used_by: tuple[str, ...],
    members: dict[str, Member],
    extent_size: int,
) -> LogicalVolume:
    count = _number(body, "segment_count", 0)
    parts = [(key, value) for key, value in body.items() if isinstance(value, dict)]
    require(
        count == len(parts) and all(key == f"segment{n}" for n, (key, _) in enumerate(parts, 1)),
        f"{name} does not have the segments that it counts",
    )
    status = _words(body.get("status", []))
    segments = tuple(_segment(name, value, members, extent_size) for _, value in parts)
    _check_order(name, segments)
    return LogicalVolume(name, segments, "VISIBLE" in status, _volume_doubt(body, status), used_by)


def _check_order(name: str, segments: tuple[Segment, ...]) -> None:
    at = 0
    for segment in segments:
        require(segment.start == at, f"the segments of {name} do not follow one another")
        at += segment.count


def _segment(name: str, body: Section, members: dict[str, Member], extent_size: int) -> Segment:
    type = _text(body, "type")
    base = type.split("+")[0]
    require(base in _KNOWN_TYPES or base.startswith("raid"), f"{name} has segments of type {type}")
    require(not any(isinstance(value, dict) for value in body.values()), f"{name} is nested deeper")
    count = _number(body, "extent_count", 1)
    areas = tuple(_areas(body.get("stripes", body.get("mirrors", []))))
    require(
        base in ("striped", "mirror") or not any(word in members for word in _names_in(body)),
        f"{name} of type {type} names physical volumes itself",
    )
    require(len(areas) <= _MAX_COLUMNS, f"{name} has an impossible number of columns")
    stripe_size = _number(body, "stripe_size", 0) * SECTOR if "stripe_size" in body else 0
    if base == "striped":
        require(
            len(areas) == _number(body, "stripe_count", 1)
            and count % len(areas) == 0
            and (len(areas) == 1 or (stripe_size > 0 and extent_size % stripe_size == 0)),
            f"the stripes of {name} don't add up",
        )
    if base == "mirror":
        require(
            len(areas) == _number(body, "mirror_count", 1), f"the mirrors of {name} don't add up"
        )
    known = {"striped": _STRIPED_KEYS, "mirror": _MIRROR_KEYS}.get(type)
    doubt = type if known is None else _unknown(body, known)
    return Segment(_number(body, "start_extent", 0), count, base, stripe_size, areas, doubt)


def _areas(value: Value | Section) -> Iterator[Area]:
    """A list of names and first extents in turns. Raises NotRecognized."""
    require(isinstance(value, list) and len(value) % 2 == 0, "a list of places is damaged")
    assert isinstance(value, list)
    for name, extent in zip(value[::2], value[1::2], strict=True):
        require(
            isinstance(name, str) and isinstance(extent, int) and 0 <= extent < _MAX_SECTORS,
            "a list of places is damaged",
        )
        yield Area(str(name), int(extent))


# --- doubts -------------------------------------------------------------------------------------


def _group_doubt(body: Section) -> str | None:
    unknown = sorted(_states(body) - _GROUP_STATUS)
    if unknown or "lock_type" in body:
        return f"the volume group is {' '.join(unknown) or 'shared'}"
    for name, volume in _sections(body.get("physical_volumes")):
        states = sorted(_states(volume) - {"ALLOCATABLE"})
        if states:
            return f"{name} is {' '.join(states)}"
    return None


def _volume_doubt(body: Section, status: set[str]) -> str | None:
    unknown = sorted((status | _words(body.get("flags", []))) - _VOLUME_STATUS)
    if unknown:
        return " ".join(unknown)
    segments = {key for key, value in body.items() if isinstance(value, dict)}
    return _unknown(body, _VOLUME_KEYS | segments)


def _unknown(body: Section, known: set[str]) -> str | None:
    keys = sorted(body.keys() - known)
    return f"unknown setting {keys[0]}" if keys else None


# --- values -------------------------------------------------------------------------------------


def _sections(value: Value | Section | None) -> Iterator[tuple[str, Section]]:
    require(isinstance(value, dict), "a section is missing")
    assert isinstance(value, dict)
    for key, body in value.items():
        require(isinstance(body, dict), f"{key} is no section")
        assert isinstance(body, dict)
        yield key, body


def _number(body: Section, key: str, least: int) -> int:
    value = body.get(key)
    require(isinstance(value, int) and least <= value < _MAX_SECTORS, f"{key} is missing or wrong")
    assert isinstance(value, int)
    return value


def _text(body: Section, key: str) -> str:
    value = body.get(key)
    require(isinstance(value, str), f"{key} is missing or wrong")
    assert isinstance(value, str)
    return value


def _states(body: Section) -> set[str]:
    return _words(body.get("status", [])) | _words(body.get("flags", []))


def _words(value: Value | Section) -> set[str]:
    values = value if isinstance(value, list) else [value]
    require(all(isinstance(word, str) for word in values), "a list of words is damaged")
    return {str(word) for word in values}


def _names_in(segment: Section) -> Iterator[str]:
    """Every text in it but its type; the volumes that it refers to are among them."""
    for key, value in segment.items():
        if key in ("type", "tags"):
            continue
        if isinstance(value, list):
            yield from (word for word in value if isinstance(word, str))
        elif isinstance(value, str):
            yield value
