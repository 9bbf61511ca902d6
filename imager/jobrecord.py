"""What became of a job's runs: ``jobs/NAME.json`` in the state folder, written atomically."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from imager.errors import FormatError
from imager.jobs import check_name, replace_file
from imager.jsonrecord import JsonRecord

_KEPT_RUNS = 30

GOOD = "good"
"""An image without holes, and the upkeep after it."""
PARTIAL = "partial"
INCOMPLETE = "incomplete"
"""There is an image, but what follows it (prune, gc) failed."""
FAILED = "failed"
INTERRUPTED = "interrupted"
RUNNING = "running"

IMAGED = (GOOD, INCOMPLETE)
"""Results with an image without holes."""


@dataclass(frozen=True)
class DataResult(JsonRecord):
    """A data backup that ran beside the image."""

    name: str
    snapshot: str = ""
    finished: str = ""
    whole: bool = True
    error: str = ""


@dataclass(frozen=True)
class JobRun(JsonRecord):
    """One run. Times are UTC as in manifests, sizes in bytes."""

    started: str
    result: str = RUNNING
    finished: str = ""
    exit_code: int | None = None
    image: str = ""
    lineage: str = ""
    host: str = ""
    repository: str = ""
    consistency: str = ""
    disk_bytes: int = 0
    used_bytes: int = 0
    read_bytes: int = 0
    stored_bytes: int = 0
    milliseconds: int = 0
    freeze_milliseconds: int | None = None
    data: tuple[DataResult, ...] = ()
    pruned: int = 0
    freed_bytes: int = 0
    error: str = ""

    @property
    def seconds(self) -> float:
        """Of the whole run, upkeep included."""
        return self.milliseconds / 1000


@dataclass(frozen=True)
class JobRecord(JsonRecord):
    """``runs``: the last ones, the newest first; a run that is under way is among them.

    ``last_gc`` is when the job last ran a gc, ``added`` when the job was added.
    """

    added: str = ""
    last_gc: str = ""
    last_good: JobRun | None = None
    runs: tuple[JobRun, ...] = ()

    @property
    def last(self) -> JobRun | None:
        return self.runs[0] if self.runs else None

    @property
    def last_ended(self) -> JobRun | None:
        return next((run for run in self.runs if run.result != RUNNING), None)

    def begin(self, run: JobRun) -> JobRecord:
        """One that was still running died without a word."""
        before = tuple(_died(item) for item in self.runs)
        return replace(self, runs=(run, *before)[:_KEPT_RUNS])

    def end(self, run: JobRun) -> JobRecord:
        """In the place of the run that began."""
        good = run if run.result in IMAGED else self.last_good
        return replace(self, last_good=good, runs=(run, *self.runs[1:]))


def _died(run: JobRun) -> JobRun:
    if run.result != RUNNING:
        return run
    return replace(run, result=INTERRUPTED, error="ended without a word: killed, or a power cut")


def state_folder() -> Path:
    """``IMAGER_STATE_DIR``, else /var/lib/imager."""
    return Path(os.environ.get("IMAGER_STATE_DIR", "/var/lib/imager"))


def load_record(job: str) -> JobRecord:
    """An empty one for a job that never ran, and for a file that is damaged."""
    file = _file(job)
    with suppress(FileNotFoundError, FormatError):
        return JobRecord.from_bytes(file.read_bytes(), str(file))
    return JobRecord()


def save_record(job: str, record: JobRecord) -> None:
    content = json.dumps(record.to_json(), indent=1, ensure_ascii=False).encode() + b"\n"
    replace_file(_file(job), content)


def remove_record(job: str) -> None:
    _file(job).unlink(missing_ok=True)


def time_of(text: str) -> datetime | None:
    """A time of a record or a manifest."""
    with suppress(ValueError):
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return None


def _file(job: str) -> Path:
    return state_folder() / "jobs" / f"{check_name(job)}.json"
