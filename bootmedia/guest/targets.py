"""Which disk a restore goes to: the disks of this machine, and the rules that pick one of them.

A rule picks exactly one disk or is refused: it never guesses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bootmedia.guest.diskwords import disk_words
from bootmedia.guest.session import Session
from bootmedia.job import ONLY_DISK, TargetRule
from imager.blocksource import FileSource
from imager.deviceuse import uses_of
from imager.diskidentity import DiskIdentity, disk_identity, disks
from imager.errors import ImagerError, RefusedError
from imager.partitions import read_partition_table
from imager.units import show_bytes

Matches = Callable[[DiskIdentity], bool]


@dataclass(frozen=True)
class Candidate:
    """A disk of this machine. ``reason``: why it must not be written to."""

    path: str
    identity: DiskIdentity
    reason: str | None = None


def candidates(session: Session) -> list[Candidate]:
    """All disks, those that are refused with the reason."""
    found = []
    for path in disks():
        try:
            found.append(Candidate(path, disk_identity(path), _reason(session, path)))
        except OSError:
            continue  # pulled out meanwhile
    return found


def choose_target(
    rule: TargetRule, candidates: Sequence[Candidate], needed_bytes: int
) -> Candidate:
    """The one disk that the rule means, that is free and has ``needed_bytes``.

    Raises RefusedError when there is none or several, with what speaks against each disk.
    """
    matches = _matcher(rule.target)
    misfits = [_misfit(candidate, matches, needed_bytes) for candidate in candidates]
    fitting = [
        candidate for candidate, misfit in zip(candidates, misfits, strict=True) if misfit is None
    ]
    if len(fitting) == 1:
        return fitting[0]
    count = "several disks are" if fitting else "no disk is"
    disks_and_why = [
        f"{disk_words(candidate.identity)}: {misfit or 'fit'}"
        for candidate, misfit in zip(candidates, misfits, strict=True)
    ]
    raise RefusedError(
        [f"{rule.target} for {rule.disk}: {count} fit, exactly one has to be", *disks_and_why],
        hint="attach the right disk (and no other that the rule fits), or restore by the menu",
    )


def _reason(session: Session, path: str) -> str | None:
    if reserved := session.reserved(path):
        return reserved
    uses = [f"{use.device} is {use.description}" for use in uses_of(path)]
    return "in use: " + ", ".join(uses) if uses else None


def _misfit(candidate: Candidate, matches: Matches, needed_bytes: int) -> str | None:
    size = candidate.identity.size
    if not matches(candidate.identity):
        return "not the one that is asked for"
    if candidate.reason is not None:
        return candidate.reason
    if size is None or size < needed_bytes:
        return f"too small: the image needs {show_bytes(needed_bytes)}"
    return None


def _matcher(target: str) -> Matches:
    """Raises RefusedError for a rule that is not known."""
    if target == ONLY_DISK:
        return lambda identity: True
    if target.startswith("/dev/"):
        path = os.path.realpath(target)
        return lambda identity: identity.path == path
    key, _, value = target.partition("=")
    wanted = value.strip().lower()
    if key == "table" and wanted:
        return lambda identity: _table_id(identity.path) == wanted
    if key not in ("serial", "wwn", "model") or not wanted:
        raise RefusedError([f"{target!r} is no rule for a target"])
    return lambda identity: (getattr(identity, key) or "").strip().lower() == wanted


def _table_id(path: str | None) -> str | None:
    try:
        with FileSource(path or "") as source:
            return read_partition_table(source).disk_id
    except (ImagerError, OSError):
        return None
