"""The allocation map of a physical volume.

Used are: everything outside of LVM's extents (label, metadata areas, boot loader areas, what no
extent fills), and of the extents those of logical volumes. Of a logical volume that is plainly
linear, striped or an old-style mirror, only what the filesystem inside uses; of all others every
extent that they have here. Extents of no logical volume are unused.

A doubt about the group is an error here, and the caller takes it as "all of it"; a doubt about
one logical volume means all that it has on this device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from imager.allocation.lvm2.group import Area, LogicalVolume, Member, VolumeGroup
from imager.allocation.lvm2.identity import newest_group, read_texts
from imager.allocation.lvm2.label import PhysicalVolume, check_label, find_label, parse_label
from imager.allocation.lvm2.volume import Column, Stretch, VolumeSource
from imager.allocation.model import (
    AllocationMap,
    Certainty,
    Companion,
    Filesystem,
    LookInside,
    require,
)
from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

_MOST_NAMES = 30  # logical volumes that the reason names
_BY_DOUBT: tuple[Certainty, ...] = ("exact", "union", "all")


def allocation_map(
    source: BlockSource,
    filesystem: Filesystem,
    companions: Sequence[Companion],
    look_inside: LookInside,
) -> AllocationMap:
    """Raises NotRecognized for any doubt about the group, OSError for unreadable sectors.

    ``companions``: other physical volumes of the group, as far as they are there.
    ``look_inside``: identifies and maps what a logical volume holds.
    """
    devices = [_open(item) for item in (source, *(other.source for other in companions))]
    group = newest_group(text for device, volume in devices for text in read_texts(device, volume))
    places = _check_places(group, devices)
    own = next(name for name, device in places.items() if device is source)
    return _Usage(group, group.members[own], places, look_inside).map()


def _open(source: BlockSource) -> tuple[BlockSource, PhysicalVolume]:
    raw = find_label(source)
    if raw is None:
        raise NotRecognized("a physical volume has no label")
    volume = parse_label(raw)
    check_label(raw, volume)
    return source, volume


def _check_places(
    group: VolumeGroup, devices: Iterable[tuple[BlockSource, PhysicalVolume]]
) -> dict[str, BlockSource]:
    """The devices by their name in the metadata. Raises NotRecognized."""
    places: dict[str, BlockSource] = {}
    for device, volume in devices:
        names = [member.name for member in group.members.values() if member.uuid == volume.uuid]
        require(len(names) == 1, f"the volume group {group.name} does not know {volume.uuid}")
        require(names[0] not in places, f"two devices say that they are {volume.uuid}")
        _check_geometry(group.members[names[0]], group.extent_size, device, volume)
        places[names[0]] = device
    return places


def _check_geometry(
    member: Member, extent_size: int, device: BlockSource, volume: PhysicalVolume
) -> None:
    end = member.start + member.extents * extent_size
    require(end <= device.size, f"{member.name} has fewer bytes than its extents need")
    require(
        [area.offset for area in volume.data_areas] == [member.start],
        f"header and metadata of {member.name} do not agree where its extents begin",
    )
    for area in volume.metadata_areas:
        require(
            area.end <= member.start or area.offset >= end,
            f"a metadata area of {member.name} lies among its extents",
        )


@dataclass(frozen=True)
class _Inside:
    """What a logical volume holds. ``used`` in bytes of the volume."""

    used: Extents
    certainty: Certainty
    text: str


class _Usage:
    """Collects the used ranges of one physical volume."""

    def __init__(
        self,
        group: VolumeGroup,
        own: Member,
        devices: Mapping[str, BlockSource],
        look_inside: LookInside,
    ) -> None:
        self._group = group
        self._own = own
        self._devices = devices
        self._look_inside = look_inside
        self._seen: dict[str, _Inside | str] = {}

    def map(self) -> AllocationMap:
        own, size = self._own, self._devices[self._own.name].size
        extents = (own.start, own.extents * self._group.extent_size)
        outside = Extents([extents]).complement(size)
        inside = [extent for claim in self._claims for extent in self._used_of(claim)]
        used = Extents([*outside, *inside])
        return AllocationMap(used, self._certainty, self._text)

    # --- who has which extents ----------------------------------------------------------------

    @cached_property
    def _claims(self) -> dict[str, Extents]:
        """Bytes of this device by logical volume. Raises NotRecognized for extents of two,
        wherever they are: on another device they would make what is read of it doubtful."""
        places: dict[str, dict[str, list[tuple[int, int]]]] = {
            name: {} for name in self._group.members
        }
        for volume in self._group.volumes.values():
            for segment in volume.segments:
                for area in segment.areas:
                    if area.name in places:
                        claim = places[area.name].setdefault(volume.name, [])
                        claim.append((area.extent, segment.column_extents))
                    else:
                        known = area.name in self._group.volumes
                        require(known, f"{volume.name} lies on {area.name}, which is unknown")
        for device, claims in places.items():
            self._check_distinct(device, [pair for pairs in claims.values() for pair in pairs])
        start, size = self._own.start, self._group.extent_size
        return {
            name: Extents((start + first * size, count * size) for first, count in pairs)
            for name, pairs in places[self._own.name].items()
        }

    def _check_distinct(self, device: str, ranges: list[tuple[int, int]]) -> None:
        everything = Extents(ranges)
        require(
            everything.end <= self._group.members[device].extents
            and everything.total == sum(count for _, count in ranges),
            f"logical volumes share extents of {device}, or have some behind its end",
        )

    # --- what of them is used -----------------------------------------------------------------

    def _used_of(self, name: str) -> Extents:
        head = self._head(self._group.volumes[name])
        inside = self._inside(head) if head else "hidden"
        if isinstance(inside, str):
            return self._claims[name]
        stretches = self._stretches(self._group.volumes[name])
        return Extents(
            place
            for stretch in stretches
            for extent in inside.used.within(stretch.start, stretch.length)
            for place in stretch.on_device(self._own.name, extent)
        )

    def _head(self, volume: LogicalVolume) -> LogicalVolume | None:
        """The logical volume that people see: itself, or the mirror that this is a leg of."""
        if volume.is_visible and not volume.used_by:
            return volume
        users = [self._group.volumes[name] for name in volume.used_by]
        if len(users) == 1 and volume.name in self._legs(users[0]):
            return users[0]
        return None

    def _inside(self, volume: LogicalVolume) -> _Inside | str:
        """Or the reason why all of it counts as used."""
        if volume.name not in self._seen:
            try:
                self._seen[volume.name] = self._look_at(volume)
            except NotRecognized as doubt:
                self._seen[volume.name] = doubt.message
        return self._seen[volume.name]

    def _look_at(self, volume: LogicalVolume) -> _Inside:
        """Raises NotRecognized for any doubt about this logical volume."""
        require(self._group.doubt is None, self._group.doubt or "")
        self._check_plain(volume)
        users = [self._group.volumes[name] for name in volume.used_by]
        require(volume.is_visible and not users, _use(users))
        legs = self._legs(volume)
        if not legs:
            return self._read(volume)
        # Which leg is right where they differ is in the mirror's log: all of them count.
        found = [self._read(self._leg(volume, name)) for name in legs]
        worst = max(found, key=lambda inside: _BY_DOUBT.index(inside.certainty))
        used = Extents(extent for inside in found for extent in inside.used)
        return _Inside(used, worst.certainty, worst.text)

    def _read(self, volume: LogicalVolume) -> _Inside:
        stretches = self._stretches(volume)
        names = {column.device for stretch in stretches for column in stretch.columns}
        absent = sorted(names - self._devices.keys())
        require(not absent, f"partly on {' '.join(absent)}, which is not here")
        path = f"{self._group.name}/{volume.name}"
        content, found = self._look_inside(VolumeSource(path, stretches, self._devices))
        text = f"{content.kind}, {found.certainty}"
        if found.reason:
            text += f" ({found.reason.removeprefix(f'{content.kind}: ')})"
        return _Inside(found.used, found.certainty, text)

    # --- mirrors ------------------------------------------------------------------------------

    def _legs(self, volume: LogicalVolume) -> list[str]:
        """Names of the logical volumes that an old-style mirror keeps its copies in."""
        if [segment.type for segment in volume.segments] != ["mirror"]:
            return []
        return [area.name for area in volume.segments[0].areas]

    def _leg(self, mirror: LogicalVolume, name: str) -> LogicalVolume:
        (segment,) = mirror.segments
        require(name in self._group.volumes, f"its leg {name} is no logical volume")
        leg = self._group.volumes[name]
        require(leg.used_by == (mirror.name,), f"its leg {name} has other users")
        require(Area(name, 0) in segment.areas, f"its leg {name} does not begin at 0")
        require(
            sum(part.count for part in leg.segments) == segment.count,
            f"its leg {name} has another size",
        )
        require(all(part.type == "striped" for part in leg.segments), f"its leg {name} is a mirror")
        self._check_plain(leg)
        return leg

    # --- layout -------------------------------------------------------------------------------

    def _check_plain(self, volume: LogicalVolume) -> None:
        require(volume.doubt is None, volume.doubt or "")
        require(bool(volume.segments), "it has no segments")
        for segment in volume.segments:
            require(segment.doubt is None, segment.doubt or "")
            in_group = all(area.name in self._group.members for area in segment.areas)
            require(segment.type == "mirror" or in_group, "it lies on other logical volumes")

    def _stretches(self, volume: LogicalVolume) -> list[Stretch]:
        size = self._group.extent_size
        return [
            Stretch(
                segment.start * size,
                segment.count * size,
                segment.stripe_size,
                tuple(self._column(area) for area in segment.areas),
            )
            for segment in volume.segments
        ]

    def _column(self, area: Area) -> Column:
        require(area.name in self._group.members, "it lies on other logical volumes")
        start = self._group.members[area.name].start
        return Column(area.name, start + area.extent * self._group.extent_size)

    # --- for people ---------------------------------------------------------------------------

    @cached_property
    def _heads(self) -> dict[str, _Inside | str]:
        """What is on this device, by the name that people see."""
        heads: dict[str, _Inside | str] = {}
        for name in self._claims:
            volume = self._group.volumes[name]
            head = self._head(volume)
            if head is not None:
                heads[head.name] = self._inside(head)
            else:
                heads[name] = self._helper(volume)
        return heads

    def _helper(self, volume: LogicalVolume) -> _Inside | str:
        """Used whole; that is no doubt when it is the log of a mirror."""
        users = [self._group.volumes[name] for name in volume.used_by]
        if len(users) == 1 and self._legs(users[0]):
            return _Inside(self._claims[volume.name], "exact", f"log of {users[0].name}")
        return volume.doubt or _use(users)

    @property
    def _certainty(self) -> Certainty:
        found: list[Certainty] = [
            item.certainty if isinstance(item, _Inside) else "all" for item in self._heads.values()
        ]
        return max(found, key=_BY_DOUBT.index, default="exact")

    @property
    def _text(self) -> str:
        parts = [
            f"{name}: {item.text if isinstance(item, _Inside) else f'whole ({item})'}"
            for name, item in islice(self._heads.items(), _MOST_NAMES)
        ]
        if len(self._heads) > _MOST_NAMES:
            parts.append(f"{len(self._heads) - _MOST_NAMES} more")
        return "; ".join(parts) or "no logical volume on it"


def _use(users: list[LogicalVolume]) -> str:
    """Why a logical volume can't be followed that others use, or none that people see."""
    named = [f"part of {user.name}, {user.types}" for user in users[:3]]
    return " and ".join(named) or "hidden"
