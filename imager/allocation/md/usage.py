"""The allocation map of a mirror's member: what the filesystem on the mirror uses, and all else.

While the members are the same, each of them shows what the array holds. After a crash they may
differ, and which of them is right is the write-intent bitmap's to say, region by region: then
the map is the union of what they all show, and all of them have to be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from imager.allocation.md.superblock import Superblock, find_superblocks
from imager.allocation.model import (
    AllocationMap,
    Certainty,
    Companion,
    Filesystem,
    LookInside,
    require,
)
from imager.blocksource import BlockSource, PartSource
from imager.extents import Extent, Extents

_BY_DOUBT: tuple[Certainty, ...] = ("exact", "union", "all")
_NO_BAD_BLOCK = b"\xff" * 8  # ends the log (drivers/md/md.c, super_1_load)


def allocation_map(
    source: BlockSource,
    filesystem: Filesystem,
    companions: Sequence[Companion],
    look_inside: LookInside,
) -> AllocationMap:
    """Raises NotRecognized for anything but a mirror's member in sync, OSError.

    ``companions``: other members of the array, as far as they are there.
    ``look_inside``: identifies and maps what the array holds.
    """
    own = _usable(source)
    others = [
        (other.source, _usable(other.source)) for other in companions if not _is_spare(other.source)
    ]
    members = [(source, own), *others]
    _check_agreement([superblock for _, superblock in members])
    if own.active == 1 or all(superblock.is_clean for _, superblock in members):
        members = members[:1]
        doubt = None
    else:
        roles = {superblock.role for _, superblock in members}
        require(
            len(roles) == own.active,
            "the array is in use or was not stopped, and not all of its members are here",
        )
        doubt = "the array is in use or was not stopped"
    shown = [_shown(device, superblock.data, look_inside) for device, superblock in members]
    return _placed(source, own.data, _united(shown, doubt))


def _usable(source: BlockSource) -> Superblock:
    """The superblock of a member in sync, whose data the array holds. Raises NotRecognized."""
    found = list(find_superblocks(source))
    require(len(found) == 1, f"{len(found)} superblocks")
    (own,) = found
    require(own.level == 1, f"RAID level {own.level}: only mirrors have a map")
    require(not own.doubts, "; ".join(own.doubts))
    require(own.data.end <= source.size, "the array has more bytes than the member")
    for place in (own.own, *own.metadata):
        require(
            place.end <= own.data.offset or place.offset >= own.data.end,
            "metadata of the array lies among its data",
        )
    if own.bad_blocks is not None:
        require(
            source.pread(own.bad_blocks.offset, 8) == _NO_BAD_BLOCK, "it has a list of bad blocks"
        )
    return own


def _is_spare(source: BlockSource) -> bool:
    """It holds nothing of the array, and need not know what happened to it."""
    return all(found.role is None for found in find_superblocks(source))


def _check_agreement(members: list[Superblock]) -> None:
    """Members that were in the array until now count the same events, or one more while they
    are being written; one that was dropped is behind."""
    events = [superblock.events for superblock in members]
    require(max(events) - min(events) <= 1, "its members are not of the same time")
    agreed = {(s.set_id, s.disks, s.active, s.data.length) for s in members}
    require(len(agreed) == 1, "its members do not agree about the array")
    roles = [superblock.role for superblock in members]
    require(len(set(roles)) == len(roles), "two members say that they are the same")
    if min(events) != max(events):
        require(not all(s.is_clean for s in members), "its members do not agree about events")


def _shown(source: BlockSource, data: Extent, look_inside: LookInside) -> tuple[str, AllocationMap]:
    """What one member shows of the array, and the name of its kind."""
    content, found = look_inside(PartSource(source, data.offset, data.length))
    return content.kind, found


def _united(shown: list[tuple[str, AllocationMap]], doubt: str | None) -> AllocationMap:
    """One map of the array's bytes."""
    kinds = {kind for kind, _ in shown}
    require(len(kinds) == 1, "its members hold different filesystems")
    (kind,) = kinds
    maps = [found for _, found in shown]
    reasons = dict.fromkeys(found.reason for found in maps if found.reason)
    said = "; ".join(filter(None, [doubt, *reasons]))
    certainties: list[Certainty] = [found.certainty for found in maps]
    certainty = max(["union" if doubt else "exact", *certainties], key=_BY_DOUBT.index)
    used = Extents(extent for found in maps for extent in found.used)
    text = f"it holds {kind}" + (f" ({said})" if said else "")
    return AllocationMap(used, certainty, text)


def _placed(source: BlockSource, data: Extent, inside: AllocationMap) -> AllocationMap:
    """The map of the member: everything outside of the array's data is used."""
    around = Extents([data]).complement(source.size)
    used = around.union(inside.used.shift(data.offset))
    return replace(inside, used=used)
