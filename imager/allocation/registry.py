"""The chooser: asks every kind's ``probe``, and the one kind that answered for its map."""

from __future__ import annotations

import struct
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from imager.allocation.model import AllocationMap, Filesystem, all_used
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


def allocation_map(source: BlockSource) -> AllocationMap:
    """Which bytes of the source are used. Never raises for damaged or unreadable bytes: any
    doubt is ``all``, with the reason."""
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
        found: AllocationMap = module.allocation_map(source, filesystem)
    except _DAMAGE as doubt:
        return all_used(source, f"{filesystem.kind}: {doubt}")
    except OSError as error:
        return all_used(source, f"{filesystem.kind}: unreadable: {error.strerror}")
    if found.used.end > source.size:
        return all_used(source, f"{filesystem.kind}: the map ends behind the source")
    return found


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
    return survey
