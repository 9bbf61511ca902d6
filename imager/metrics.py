"""What Prometheus's node exporter reads of the jobs: one text file, replaced as a whole.

The format is Prometheus's text exposition format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imager.errors import UsageError
from imager.jobrecord import GOOD, RUNNING, JobRecord, JobRun, time_of
from imager.jobs import replace_file

RESULTS = (GOOD, "partial", "incomplete", "failed", "interrupted")


class Metric(NamedTuple):
    name: str
    help: str
    value: Callable[[JobRun], float | None]


_OF_LAST_RUN = (
    Metric("imager_job_last_run_timestamp_seconds", "When the last run ended.", lambda r: _at(r)),
    Metric("imager_job_success", "1 if the last run was good.", lambda r: int(r.result == GOOD)),
    Metric("imager_job_exit_code", "Exit code of the last run.", lambda r: r.exit_code),
    Metric("imager_job_duration_seconds", "How long it took.", lambda r: r.seconds),
    Metric("imager_job_read_bytes", "What it read.", lambda r: r.read_bytes),
    Metric("imager_job_stored_bytes", "What it added to the repository.", lambda r: r.stored_bytes),
    Metric(
        "imager_job_freeze_seconds",
        "How long filesystems stood still, if they did.",
        lambda r: None if r.freeze_milliseconds is None else r.freeze_milliseconds / 1000,
    ),
)
_OF_LAST_GOOD = (
    Metric(
        "imager_job_last_success_timestamp_seconds",
        "When the last run with an image without holes ended.",
        lambda r: _at(r),
    ),
    Metric(
        "imager_job_image_used_bytes",
        "What that image's disks have in use.",
        lambda r: r.used_bytes,
    ),
)


def textfile_of(table: Mapping[str, Any]) -> Path | None:
    """``textfile`` of ``[metrics]`` in imager.toml. Raises UsageError."""
    value = table.get("textfile")
    if value is None:
        return None
    if not isinstance(value, str) or not value.startswith("/") or not value.endswith(".prom"):
        raise UsageError("[metrics]: textfile must be an absolute path that ends with .prom")
    return Path(value)


def write_textfile(file: Path, records: Mapping[str, JobRecord]) -> None:
    """Replace the file; readable for the exporter. Raises ImagerError."""
    replace_file(file, render(records).encode(), mode=0o644)


def render(records: Mapping[str, JobRecord]) -> str:
    """All jobs, each by its last run that ended. Ages are for the reader to compute: ``time() -
    imager_job_last_success_timestamp_seconds``."""
    ended = {job: record.last_ended for job, record in records.items()}
    good = {job: record.last_good for job, record in records.items()}
    lines = []
    for metric in _OF_LAST_RUN:
        lines += _family(metric, ended)
    for metric in _OF_LAST_GOOD:
        lines += _family(metric, good)
    lines += _results(ended)
    return "".join(f"{line}\n" for line in lines)


def _family(metric: Metric, runs: Mapping[str, JobRun | None]) -> list[str]:
    samples = [
        _sample(metric.name, {"job": job, "name": run.lineage}, value)
        for job, run in runs.items()
        if run is not None and (value := metric.value(run)) is not None
    ]
    return [*_head(metric.name, metric.help), *samples] if samples else []


def _results(runs: Mapping[str, JobRun | None]) -> Iterable[str]:
    name = "imager_job_result"
    samples = [
        _sample(name, {"job": job, "name": run.lineage, "result": result}, run.result == result)
        for job, run in runs.items()
        if run is not None and run.result != RUNNING
        for result in RESULTS
    ]
    return [*_head(name, "1 for the result of the last run."), *samples] if samples else []


def _head(name: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} gauge"]


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    # "job" would clash with the label that Prometheus gives a target itself
    named = {"image_job" if key == "job" else key: text for key, text in labels.items()}
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in named.items())
    return f"{name}{{{inside}}} {int(value) if value == int(value) else value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _at(run: JobRun) -> float | None:
    moment = time_of(run.finished)
    return moment.timestamp() if moment else None
