"""Taking data backups beside an image, and dropping those that the retention rules leave out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from imager.data.engines import open_engine
from imager.data.model import DataBackup, DataEntry, backups_of, without_secrets
from imager.errors import ImagerError
from imager.progress import Progress
from imager.repository import Repository, utc_now
from imager.retention import Snapshot, judge


class DataRun:
    """The data backups of one image, from the first one to the commit and what follows it.

    ``before`` is called first, ``additions`` when the disks are stored, ``after`` when the image
    is committed.
    """

    def __init__(self, entries: Iterable[DataEntry], progress: Progress) -> None:
        self._entries = list(entries)
        self._progress = progress
        self.backups: list[DataBackup] = []
        self.failures: list[str] = []
        """What could not be removed; no backup is less for it."""

    def before(self) -> None:
        """Raises ImagerError when one that is required fails: no image is to be made then."""
        self.backups += back_up(self._entries, "before", self._progress)

    def additions(self) -> dict[str, Any]:
        """Run those that come after the image; all of them, for the manifest."""
        self.backups += back_up(self._entries, "after", self._progress)
        if not self.backups:
            return {}
        return {"data": [backup.to_json() for backup in self.backups]}

    def after(self, repository: Repository) -> None:
        """Drop old snapshots."""
        self.failures += drop_old(self._entries, repository, self._progress)

    @property
    def whole(self) -> bool:
        return all(backup.whole for backup in self.backups) and not self.failures


def back_up(entries: Iterable[DataEntry], when: str, progress: Progress) -> list[DataBackup]:
    """Run those of ``when`` ("before", "after"), one after the other; each one's result.

    A failure is in the result, and the others go on. Raises ImagerError for one that is
    ``required`` and runs before the image.
    """
    return [_back_up(entry, progress) for entry in entries if entry.when == when]


def _back_up(entry: DataEntry, progress: Progress) -> DataBackup:
    begun = DataBackup(
        entry.name,
        entry.engine,
        without_secrets(entry.repository),
        entry.paths,
        entry.when,
        started=utc_now(),
    )
    try:
        engine = open_engine(entry)
        taken = engine.back_up(progress)
    except ImagerError as error:
        if entry.required and entry.when == "before":
            raise ImagerError(
                f"data backup {entry.name} failed, so no image is made: {error.message}",
                hint=error.hint or "without required = true in imager.toml, the image is made",
            ) from error
        progress.note(f"DATA BACKUP {entry.name} FAILED: {error.message}")
        return replace(begun, finished=utc_now(), error=error.message)
    gone = [f"{path} is not there" for path in entry.paths if not Path(path).exists()]
    warnings = (*taken.warnings, *gone)  # restic ends well without them
    for text in warnings:
        progress.note(f"data backup {entry.name} is not whole: {text}")
    return replace(
        begun,
        snapshot=taken.snapshot,
        finished=utc_now(),
        size=taken.size,
        warnings=warnings,
        restore=tuple(engine.by_hand(taken.snapshot, entry.root)),
    )


# --- retention ----------------------------------------------------------------------------------


def drop_old(
    entries: Iterable[DataEntry], repository: Repository | None, progress: Progress
) -> list[str]:
    """Forget what the rules of each entry leave out, but never what an image of the repository
    names. Returns what failed; a data backup is not less for it."""
    failures = []
    ruled = [entry for entry in entries if entry.retention is not None]
    paired = paired_snapshots(repository) if repository and ruled else set()
    for entry in ruled:
        try:
            _drop_old(entry, paired, progress)
        except ImagerError as error:
            failures.append(f"old data backups of {entry.name} were not removed: {error.message}")
            progress.note(failures[-1])
    return failures


def paired_snapshots(repository: Repository) -> set[str]:
    """What images name. Raises IntegrityError when a manifest cannot be read: what it names is
    not known then."""

    def refuse(error: ImagerError) -> None:
        raise error

    return {
        backup.snapshot
        for manifest in repository.manifests(refuse)
        for backup in backups_of(manifest)
        if backup.snapshot
    }


def _drop_old(entry: DataEntry, paired: Collection[str], progress: Progress) -> None:
    assert entry.retention is not None
    engine = open_engine(entry)
    found = [
        Snapshot(item.id, entry.name, entry.host, (), item.time, True)
        for item in engine.snapshots()
    ]
    old = [verdict.snapshot.id for verdict in judge(found, entry.retention) if not verdict.kept]
    old = [snapshot for snapshot in old if snapshot not in paired]
    if old:
        engine.forget(old)
        progress.note(f"data backup {entry.name}: {len(old)} old snapshots removed")
