"""Bringing data back: find out what would be written where, and why not; then do it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from imager.data.engines import open_engine
from imager.data.model import DataBackup, DataEntry, backups_of, has_program
from imager.errors import ImagerError, RefusedError, UsageError
from imager.manifest import Manifest
from imager.progress import Progress
from imager.units import show_bytes

# Enough to see what is there; counting all of a mail store takes minutes.
_MOST_COUNTED = 100_000

_VIRTUAL = frozenset({"swap", "tmpfs", "proc", "sysfs", "devpts"})
_TOOLS = frozenset({"restic", "borg"})


@dataclass(frozen=True)
class BringPlan:
    """One data backup on its way back. ``target`` takes the place of ``/``."""

    entry: DataEntry
    snapshot: str
    target: Path
    overwrites: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.entry.name,
            "engine": self.entry.engine,
            "snapshot": self.snapshot,
            "target": str(self.target),
            "paths": list(self.entry.paths),
            "overwrites": list(self.overwrites),
            "warnings": list(self.warnings),
            "refusals": list(self.refusals),
        }


class Choice(NamedTuple):
    """Which backups of an image: all, or one by name; the paired snapshots, or the latest."""

    name: str | None = None
    latest: bool = False


def plan_bringing(
    manifest: Manifest,
    entries: Sequence[DataEntry],
    target: Path,
    choice: Choice,
    *,
    folder: bool = False,
    root: Path = Path("/"),
) -> list[BringPlan]:
    """What would be brought back below ``target``. ``entries`` are the configuration of the system
    that is mounted at ``root``; ``folder``: an ordinary folder will do.

    Raises UsageError when the image has no such data backup.
    """
    plans = []
    for backup in _chosen(manifest, choice.name):
        entry = _entry_of(backup, entries, manifest, root)
        plans.append(_plan(backup, entry, target, choice.latest, folder))
    return plans


def bring_back(plan: BringPlan, progress: Progress) -> None:
    """Raises RefusedError for a plan with refusals, otherwise as the engine does."""
    if plan.refusals:
        raise RefusedError(list(plan.refusals))
    open_engine(plan.entry).restore(plan.snapshot, plan.target, progress)


def _chosen(manifest: Manifest, name: str | None) -> list[DataBackup]:
    backups = backups_of(manifest)
    found = [backup for backup in backups if name is None or backup.name == name]
    if not found:
        known = ", ".join(backup.name for backup in backups) or "none"
        what = f"no data backup {name}" if name else "no data backups"
        raise UsageError(f"image {manifest.id} has {what}", hint=f"it has: {known}")
    return found


def _entry_of(
    backup: DataBackup, entries: Sequence[DataEntry], manifest: Manifest, root: Path
) -> DataEntry:
    """As the configuration says today; without one, what the manifest has of it. The paths are
    those of the backup, the host is the imaged one."""
    known = next((entry for entry in entries if entry.name == backup.name), None)
    entry = known or DataEntry(backup.name, backup.engine, backup.repository, root=root)
    host = manifest.host or entry.host
    return replace(entry, engine=backup.engine, paths=backup.paths, host=host)


def _plan(
    backup: DataBackup, entry: DataEntry, target: Path, latest: bool, folder: bool
) -> BringPlan:
    refusals = list(_wrong_target(entry, target, folder))
    warnings = [] if entry.password or entry.engine not in _TOOLS else [_no_password(entry)]
    snapshot = backup.snapshot or ""
    try:
        snapshot = _snapshot(backup, entry, latest)
    except ImagerError as error:
        refusals.append(f"{entry.name}: {error.message}")
    return BringPlan(
        entry,
        snapshot,
        target,
        tuple(_overwritten(entry, target)),
        (*warnings, *_room(backup, target)),
        tuple(refusals),
    )


def _no_password(entry: DataEntry) -> str:
    return f"{entry.name}: no password is configured here; the repository must not need one"


def _snapshot(backup: DataBackup, entry: DataEntry, latest: bool) -> str:
    """Which one; that it is there. Raises ImagerError."""
    if entry.engine == "command" and "list" not in entry.commands and not latest:
        found = [backup.snapshot] if backup.snapshot else []
    else:
        found = [item.id for item in open_engine(entry).snapshots()]
    if latest:
        if not found:
            raise ImagerError("there is no snapshot in its repository")
        return found[-1]
    if backup.snapshot is None:
        raise ImagerError(f"it failed when the image was made ({backup.error}); try --latest")
    if backup.snapshot not in found:
        raise ImagerError(f"the paired snapshot {backup.snapshot} is gone; try --latest")
    return backup.snapshot


# --- where it goes ------------------------------------------------------------------------------


def _wrong_target(entry: DataEntry, target: Path, folder: bool) -> Iterator[str]:
    """Why data must not be written there: it would land on another filesystem than it shall."""
    if not target.is_dir():
        yield f"{target} is no folder"
        return
    if not folder and target != Path("/") and not target.is_mount():
        yield (
            f"nothing is mounted at {target}: the data would go to this system's own disk "
            "(--folder, if that is meant)"
        )
    yield from (
        f"{target / point.lstrip('/')} is not mounted, where the fstab wants {device}: "
        f"{path} would go to the filesystem below it"
        for path in entry.paths
        for device, point in _expected_mounts(target, path)
    )
    if entry.engine in _TOOLS and not (
        has_program(entry.root, entry.engine) or has_program(Path("/"), entry.engine)
    ):
        yield f"{entry.engine} is not installed"


def _expected_mounts(target: Path, path: str) -> Iterator[tuple[str, str]]:
    """(device, mount point) of the target's own fstab that a path lies below and is not mounted."""
    for line in read_fstab(target):
        below = f"{path.rstrip('/')}/".startswith(f"{line.point.rstrip('/')}/")
        if line.point != "/" and below and not (target / line.point.lstrip("/")).is_mount():
            yield line.device, line.point


class FstabLine(NamedTuple):
    """See fstab(5)."""

    device: str
    point: str
    kind: str
    options: str


def read_fstab(root: Path) -> list[FstabLine]:
    """A system's /etc/fstab, without swap, what is not from disks, and ``noauto``."""
    try:
        lines = (root / "etc/fstab").read_text(errors="replace").splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines if not line.lstrip().startswith("#")]
    lines_of = (FstabLine(*(*item, "defaults")[:4]) for item in words if len(item) >= 3)
    return [line for line in lines_of if line.point.startswith("/") and not _is_left_out(line)]


def _is_left_out(line: FstabLine) -> bool:
    return line.kind in _VIRTUAL or "noauto" in line.options.split(",")


def _overwritten(entry: DataEntry, target: Path) -> Iterator[str]:
    for path in entry.paths:
        there = target / path.lstrip("/")
        if there.is_dir() and not there.is_symlink():
            count, size, more = _contents(there)
            if count:
                yield f"{there}: {more}{count} files, {show_bytes(size)}"
        elif there.exists():
            yield f"{there}"


def _contents(folder: Path) -> tuple[int, int, str]:
    """Number and bytes of the files below; ``more`` when there are too many to count."""
    count = size = 0
    for at, _, names in os.walk(folder):
        for name in names:
            count += 1
            try:
                size += os.lstat(os.path.join(at, name)).st_size  # noqa: PTH118
            except OSError:
                continue
        if count >= _MOST_COUNTED:
            return count, size, "more than "
    return count, size, ""


def _room(backup: DataBackup, target: Path) -> Iterator[str]:
    if backup.size is None or not target.is_dir():
        return
    for path in backup.paths:
        place = target / path.lstrip("/")
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < backup.size:
            yield (
                f"{backup.name} has {show_bytes(backup.size)}, and {show_bytes(free)} are free at "
                f"{place}"
            )
            return
