"""The chooser: asks every kind's ``probe``, and the one kind that answered for its map."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from imager.allocation.model import (
    AllocationMap,
    Companion,
    Filesystem,
    LookInside,
    all_used,
)
from imager.blocksource import BlockSource
from imager.errors import ImagerError

# Module names in this package, imported on first use. Containers come first: RAID members with
# their superblock at the end show the filesystem inside as well.
_KINDS = (
    "md",
    "luks",
    "lvm2",
    "ext",
    "xfs",
    "btrfs",
    "swap",
    "ntfs",
    "exfat",
    "vfat",
    "f2fs",
    "foreign",
)

# Kinds that lie on several devices: their metadata may be on another member of the set, so their
# ``allocation_map`` takes a third argument, the companions that are members of the same set.
_SPANNING = frozenset({"btrfs", "lvm2", "md"})

# Kinds that hold others: their ``allocation_map`` takes a last argument, what to ask for the map
# of something inside. A volume group may lie on a mirror, and a mirror on logical volumes.
_CONTAINERS = frozenset({"lvm2", "md"})
_MAX_DEPTH = 3

# What a parser may trip over in damaged bytes beside its own checks; the last net, never a plan.
_DAMAGE = (ImagerError, ValueError, LookupError, ArithmeticError, struct.error)


class _Finding(NamedTuple):
    module: ModuleType
    filesystem: Filesystem


class _Survey(NamedTuple):
    findings: list[_Finding]
    unreadable: list[str]


def identify(source: BlockSource) -> Filesystem:
    """What the source (a partition, or a whole device) holds; ``unknown`` when nothing matches.

    Never raises for damaged or unreadable bytes: notes say what was in the way.
    """
    survey = _survey(source)
    if not survey.findings:
        return Filesystem("unknown", notes=tuple(survey.unreadable))
    first, *others = (finding.filesystem for finding in survey.findings)
    also = tuple(f"there is a signature of {other.kind} too" for other in others)
    return replace(first, notes=(*first.notes, *also, *survey.unreadable))


def allocation_map(source: BlockSource, companions: Iterable[Companion] = ()) -> AllocationMap:
    """Which bytes of the source are used. Never raises for damaged or unreadable bytes: any
    doubt is ``all``, with the reason.

    ``companions``: whatever is captured together with the source; of a set of devices, those
    that are missing here can't be read, and the map gets coarser.
    """
    return _map(source, companions, 0)


def _map(source: BlockSource, companions: Iterable[Companion], depth: int) -> AllocationMap:
    survey = _survey(source)
    kinds = [finding.filesystem.kind for finding in survey.findings]
    if survey.unreadable:
        return all_used(source, survey.unreadable[0])
    if len(kinds) != 1:
        return all_used(source, f"signatures of {', '.join(kinds)}" if kinds else "no filesystem")
    module, filesystem = survey.findings[0]
    if not hasattr(module, "allocation_map"):
        return all_used(source, f"{filesystem.kind}: no allocation map")
    try:
        found = _ask(module, source, filesystem, companions, depth)
    except _DAMAGE as doubt:
        return all_used(source, f"{filesystem.kind}: {doubt}")
    except OSError as error:
        return all_used(source, f"{filesystem.kind}: unreadable: {error.strerror}")
    if found.used.end > source.size:
        return all_used(source, f"{filesystem.kind}: the map ends behind the source")
    return found


def _ask(
    module: ModuleType,
    source: BlockSource,
    filesystem: Filesystem,
    companions: Iterable[Companion],
    depth: int,
) -> AllocationMap:
    arguments: list[object] = [source, filesystem]
    if filesystem.kind in _SPANNING:
        arguments.append(_other_members(source, filesystem, companions))
    if filesystem.kind in _CONTAINERS:
        arguments.append(_looker(depth))
    found: AllocationMap = module.allocation_map(*arguments)
    return found


def _looker(depth: int) -> LookInside:
    def look_inside(inner: BlockSource) -> tuple[Filesystem, AllocationMap]:
        if depth == _MAX_DEPTH:
            return Filesystem("unknown"), all_used(inner, "it is nested too deeply")
        return identify(inner), _map(inner, (), depth + 1)

    return look_inside


def _other_members(
    source: BlockSource, filesystem: Filesystem, companions: Iterable[Companion]
) -> tuple[Companion, ...]:
    """The companions that are of the same kind and set."""
    own = _set_of(filesystem)
    return tuple(
        other
        for other in companions
        if own is not None
        and other.source is not source
        and other.filesystem.kind == filesystem.kind
        and _set_of(other.filesystem) == own
    )


def _set_of(filesystem: Filesystem) -> tuple[str, str] | None:
    member = filesystem.member_of
    return (member.set_kind, member.set_id) if member else None


def transparent_raid(source: BlockSource) -> Filesystem | None:
    """The RAID that a device is a member of although it begins with what the RAID holds. Never
    raises for damaged or unreadable bytes."""
    for module, filesystem in _survey(source).findings:
        if _is_transparent(module, source):
            return filesystem
    return None


def _is_transparent(module: ModuleType, source: BlockSource) -> bool:
    if not hasattr(module, "is_transparent"):
        return False
    try:
        return bool(module.is_transparent(source))
    except (OSError, *_DAMAGE):  # though ``probe`` could read it: then what follows is a doubt
        return False


def _survey(source: BlockSource) -> _Survey:
    """All signatures that are there, not only the first: a second one is a doubt."""
    survey = _Survey([], [])
    for name in _KINDS:
        module = import_module(f"imager.allocation.{name}")
        try:
            filesystem = module.probe(source)
        except _DAMAGE as doubt:
            survey.unreadable.append(f"cannot judge whether it is {name}: {doubt}")
            continue
        except OSError as error:
            survey.unreadable.append(f"cannot look for {name}: {error.strerror}")
            continue
        if filesystem is not None:
            survey.findings.append(_Finding(module, filesystem))
            # The signatures that follow are of what it holds, not of another owner.
            if _is_transparent(module, source):
                break
    return survey
