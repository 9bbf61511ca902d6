"""One run of a job: capture, keep what the rules say, record what happened, and tell."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

from imager.data.model import backups_of
from imager.errors import ImagerError
from imager.gc import collect
from imager.imaging import Imaged
from imager.joblocks import hold_disks, hold_job
from imager.jobrecord import (
    FAILED,
    GOOD,
    INCOMPLETE,
    INTERRUPTED,
    PARTIAL,
    DataResult,
    JobRecord,
    JobRun,
    load_record,
    save_record,
    time_of,
)
from imager.jobs import Job
from imager.manifest import Manifest
from imager.progress import Progress
from imager.repository import Repository, utc_now
from imager.retention import prune

_GC_EVERY = {"always": timedelta(0), "weekly": timedelta(days=7)}
# A weekly gc follows a job, whose time varies.
_GC_EARLY = timedelta(hours=12)

PARTIAL_CODE = 5
_INTERRUPTED_CODE = 130


@dataclass(frozen=True)
class Capturing:
    """How a job captures: given by the command line, which knows all of a capture's settings."""

    paths: Callable[[Job], list[str]]
    repository: Callable[[Job], Repository]
    take: Callable[[Job, list[str], Repository, Progress], Imaged]


OnEnd = Callable[[Job, JobRun, JobRun | None], object]
"""Is told of a run that ended, and of the one before it."""


def run_job(job: Job, capturing: Capturing, progress: Progress, on_end: OnEnd) -> JobRun:
    """Capture, prune, gc; the run as it is recorded then. Never two of a job at once.

    Raises JobBusy. Any failure of the run itself is in its result, ``error`` and ``exit_code``.
    KeyboardInterrupt is recorded, and raised again.
    """
    with hold_job(job.name):
        record = load_record(job.name)
        before = record.last_ended
        run = JobRun(utc_now(), host=socket.gethostname(), repository=job.repo)
        record = record.begin(run)
        save_record(job.name, record)
        running = _Run(job, record, run, capturing, progress)
        try:
            running.do()
        finally:
            record = running.ended()
            save_record(job.name, record)
            assert record.last is not None
            on_end(job, record.last, before)
    return record.last


class _Run:
    """What is known of a run while it goes on."""

    def __init__(
        self,
        job: Job,
        record: JobRecord,
        run: JobRun,
        capturing: Capturing,
        progress: Progress,
    ) -> None:
        self._job = job
        self._record = record
        self._run = run
        self._capturing = capturing
        self._progress = progress
        self._started = monotonic()

    def do(self) -> None:
        with self._recorded(FAILED):
            manifest, repository = self._capture()
        if self._run.image:
            with self._recorded(INCOMPLETE):
                self._prune(repository, manifest)
                self._collect(repository)

    def ended(self) -> JobRecord:
        milliseconds = int((monotonic() - self._started) * 1000)
        self._run = replace(self._run, finished=utc_now(), milliseconds=milliseconds)
        return self._record.end(self._run)

    @contextmanager
    def _recorded(self, result: str) -> Iterator[None]:
        """What goes wrong within is the result of the run."""
        try:
            yield
        except KeyboardInterrupt:
            self._note(INTERRUPTED, "interrupted", _INTERRUPTED_CODE)
            raise
        except ImagerError as error:
            text = f"{error.message}; {error.hint}" if error.hint else error.message
            self._note(result, text, error.exit_code)
        except OSError as error:
            self._note(result, f"{error.filename or 'a file'}: {error.strerror or error}", 1)
        except Exception as error:
            self._note(result, f"internal error: {type(error).__name__}: {error}", 1)
            raise

    def _note(self, result: str, text: str, code: int) -> None:
        if self._run.image and self._run.error:
            text = f"{self._run.error}\n{text}"
        if self._run.result == PARTIAL and result == INCOMPLETE:
            result, code = PARTIAL, PARTIAL_CODE  # the holes weigh more
        self._run = replace(self._run, result=result, error=text, exit_code=code)

    def _capture(self) -> tuple[Manifest, Repository]:
        paths = self._capturing.paths(self._job)
        repository = self._capturing.repository(self._job)
        self._run = replace(self._run, repository=repository.store.url)
        with hold_disks(paths, self._progress.note):
            imaged = self._capturing.take(self._job, paths, repository, self._progress)
        manifest, counts = imaged.manifest, imaged.manifest.statistics
        self._run = replace(
            self._run,
            result=PARTIAL if manifest.partial else GOOD,
            exit_code=PARTIAL_CODE if manifest.partial else 0,
            error="some sectors could not be read" if manifest.partial else "",
            image=manifest.id,
            lineage=manifest.name,
            host=manifest.host,
            consistency=str(manifest.document.get("consistency", "")),
            disk_bytes=_count(counts, "disk_bytes"),
            used_bytes=_count(counts, "used_bytes"),
            read_bytes=_count(counts, "read_bytes"),
            stored_bytes=_count(counts, "stored_bytes"),
            freeze_milliseconds=_freeze_milliseconds(manifest),
            data=tuple(_data_results(manifest)),
        )
        if not imaged.whole and not manifest.partial:
            text = "the image is there, but a hook, a data backup or a proof failed"
            self._note(INCOMPLETE, text, PARTIAL_CODE)
        return manifest, repository

    def _prune(self, repository: Repository, manifest: Manifest) -> None:
        if (rules := self._job.keep.rules) is not None:
            removed = prune(repository, rules, name=manifest.name, host=manifest.host)
            self._run = replace(self._run, pruned=len(removed))

    def _collect(self, repository: Repository) -> None:
        every = _GC_EVERY.get(self._job.gc)
        last = time_of(self._record.last_gc)
        now = datetime.now(UTC)
        if every is None or (last is not None and now - last < every - _GC_EARLY):
            return
        result = collect(repository, self._progress)
        self._record = replace(self._record, last_gc=utc_now())
        self._run = replace(self._run, freed_bytes=result.deleted_bytes)


def _count(counts: dict[str, Any], key: str) -> int:
    value = counts.get(key)
    return value if type(value) is int and value >= 0 else 0


def _freeze_milliseconds(manifest: Manifest) -> int | None:
    """How long the filesystems stood still, where they did."""
    freeze = manifest.document.get("freeze")
    return _count(freeze, "milliseconds") if isinstance(freeze, dict) else None


def _data_results(manifest: Manifest) -> Iterator[DataResult]:
    for backup in backups_of(manifest):
        yield DataResult(
            backup.name, backup.snapshot or "", backup.finished, backup.whole, backup.error or ""
        )
