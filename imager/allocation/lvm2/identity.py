"""Name, id and place in its volume group of a physical volume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from imager.allocation.lvm2.group import VolumeGroup, read_group
from imager.allocation.lvm2.label import (
    PhysicalVolume,
    check_label,
    current_text,
    find_label,
    parse_label,
)
from imager.allocation.lvm2.metadata import parse
from imager.allocation.model import Filesystem, Membership, require
from imager.blocksource import BlockSource
from imager.errors import NotRecognized

_MAX_AREAS = 16
_MOST_NAMES = 12  # logical volumes that the note names


def probe(source: BlockSource) -> Filesystem | None:
    """The physical volume, labelled with its volume group's name, or None. Raises OSError."""
    raw = find_label(source)
    if raw is None:
        return None
    try:
        volume = parse_label(raw)
    except NotRecognized as doubt:
        return Filesystem("lvm2", notes=(doubt.message,))
    try:
        check_label(raw, volume)
        group = newest_group(read_texts(source, volume))
    except NotRecognized as doubt:
        return Filesystem("lvm2", uuid=volume.uuid, size=volume.size, notes=(doubt.message,))
    return Filesystem(
        kind="lvm2",
        label=group.name,
        uuid=volume.uuid,
        size=volume.size,
        member_of=Membership("lvm", group.uuid, volume.uuid, len(group.members)),
        notes=(_contents(group, volume.uuid),),
    )


def read_texts(source: BlockSource, volume: PhysicalVolume) -> Iterator[bytes]:
    """The volume group's text in each metadata area of one physical volume that has one.

    Raises NotRecognized for any area that is damaged, OSError.
    """
    require(len(volume.metadata_areas) <= _MAX_AREAS, "an impossible number of metadata areas")
    for area in volume.metadata_areas:
        if text := current_text(source, area):
            yield text


def newest_group(texts: Iterable[bytes]) -> VolumeGroup:
    """By sequence number; an area that was out of reach for a while has an older text.

    Raises NotRecognized when there is none, or when they do not agree.
    """
    groups = [read_group(parse(text)) for text in set(texts)]
    ordered = sorted(groups, key=lambda group: group.sequence)
    require(bool(ordered), "no volume group in its metadata")
    newest = ordered[-1]
    for group in ordered:
        require(group.uuid == newest.uuid, "its metadata areas name different volume groups")
        require(
            group.sequence < newest.sequence or group == newest,
            "its metadata areas have different texts with the same sequence number",
        )
    return newest


def _contents(group: VolumeGroup, uuid: str) -> str:
    """What lies on the physical volume, for people."""
    own = {member.name for member in group.members.values() if member.uuid == uuid}
    here = [
        f"{volume.name} ({volume.types})"
        for volume in group.volumes.values()
        if any(area.name in own for segment in volume.segments for area in segment.areas)
    ]
    more = [f"{len(here) - _MOST_NAMES} more"] if len(here) > _MOST_NAMES else []
    return f"logical volumes: {', '.join([*here[:_MOST_NAMES], *more]) or 'none'}"
