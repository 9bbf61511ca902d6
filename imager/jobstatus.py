"""How the jobs of this machine stand: what is overdue, what failed, and what no job looks after."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from imager.config import repository_url
from imager.errors import ImagerError, IntegrityError
from imager.joblocks import job_runs
from imager.jobrecord import GOOD, RUNNING, JobRecord, JobRun, load_record, time_of
from imager.jobs import Job, job_names, load_job
from imager.jsonrecord import JsonRecord
from imager.listing import Summary, summaries
from imager.oncalendar import span_seconds, times_after
from imager.repository import Repository
from imager.retention import Snapshot

# A timer may be a minute late (AccuracySec=), a machine may have just booted.
_GRACE = timedelta(minutes=5)


@dataclass(frozen=True)
class DataAge(JsonRecord):
    """The newest whole data backup of a name that a job's runs made; age in seconds."""

    name: str
    snapshot: str
    finished: str
    age: int


@dataclass(frozen=True)
class JobStatus(JsonRecord):
    """``problems`` say what is wrong, none that all is well. Times UTC, ages in seconds.

    ``image`` is the newest image without holes; ``due`` when the one after it had to begin.
    """

    job: str
    calendar: str
    problems: tuple[str, ...] = ()
    running: bool = False
    result: str = ""
    last_run: str = ""
    image: str = ""
    created: str = ""
    age: int | None = None
    due: str = ""
    next: str = ""
    data: tuple[DataAge, ...] = ()

    @property
    def word(self) -> str:
        """The state in a word or two."""
        if self.problems:
            return self.problems[0].partition(":")[0]
        return "running" if self.running else "good"


@dataclass(frozen=True)
class Lineage(JsonRecord):
    """Images of this machine that no job makes."""

    repository: str
    name: str
    images: int
    newest: str
    created: str


@dataclass(frozen=True)
class Status(JsonRecord):
    jobs: tuple[JobStatus, ...]
    without_job: tuple[Lineage, ...]

    @property
    def good(self) -> bool:
        return not any(job.problems for job in self.jobs)


def read_status(now: datetime, extra_repositories: Iterable[str] = ()) -> Status:
    """All jobs, and the images of this host in their repositories and in ``extra_repositories``
    that are of no job. A job that cannot be judged has that as its problem."""
    found: list[JobStatus] = []
    repositories = {url: _Images(url) for url in extra_repositories}
    covered: set[tuple[str, str]] = set()
    for name in job_names():
        try:
            job = load_job(name)
        except ImagerError as error:
            found.append(JobStatus(name, "", (f"unreadable: {error.message}",)))
            continue
        record = load_record(name)
        url = repository_url(job.repo)
        images = repositories.setdefault(url, _Images(url))
        last_good = record.last_good
        lineage = last_good.lineage if last_good else job.image
        covered.add((url, lineage))
        found.append(_judge(job, record, images.newest_whole(lineage), images.problem, now))
    without = [
        lineage
        for images in repositories.values()
        for lineage in images.lineages()
        if (lineage.repository, lineage.name) not in covered
    ]
    return Status(tuple(found), tuple(without))


class _Group(NamedTuple):
    images: int
    newest: Snapshot
    newest_whole: Snapshot | None


class _Images:
    """This host's images in one repository, by their names; read when first asked for."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._groups: dict[str, _Group] | None = None
        self.problem = ""

    def newest_whole(self, name: str) -> Snapshot | None:
        group = self._read().get(name)
        return group.newest_whole if group else None

    def lineages(self) -> Iterator[Lineage]:
        for name, group in sorted(self._read().items()):
            newest = group.newest
            yield Lineage(self._url, name, group.images, newest.id, _text(newest.created))

    def _read(self) -> dict[str, _Group]:
        if self._groups is None:
            self._groups = {}
            host = socket.gethostname()
            try:
                for image in summaries(Repository.open(self._url), self._note_damage):
                    if image.host == host:
                        self._add(image)
            except ImagerError as error:
                self.problem = f"repository: {error.message}"
        return self._groups

    def _add(self, summary: Summary) -> None:
        assert self._groups is not None
        image = Snapshot.of(summary)
        before = self._groups.get(image.name)
        whole = image if image.whole else before.newest_whole if before else None
        self._groups[image.name] = _Group(before.images + 1 if before else 1, image, whole)

    def _note_damage(self, error: IntegrityError) -> None:
        self.problem = f"damaged: {error.message}"


def _judge(
    job: Job, record: JobRecord, image: Snapshot | None, trouble: str, now: datetime
) -> JobStatus:
    last, running = record.last, job_runs(job.name)
    ended = last if last and last.result == RUNNING and not running else record.last_ended
    problems = [trouble] if trouble else []
    problems += _problems_of_last(last, running)
    due = next_time = None
    try:
        next_time = next(iter(times_after(job.calendar, now)), None)
        since = image.created if image else time_of(record.added)
        due = next(iter(times_after(job.calendar, since)), None) if since else None
        if due and image and due + _slack(job, ended) < now:
            problems.append(f"overdue: since {_text(due)}")
    except ImagerError as error:
        problems.append(f"calendar: {error.message}")
    if image is None and last is not None and not running and not problems:
        problems.append(f"no image: {record.last_good.image if record.last_good else ''} is gone")
    return JobStatus(
        job=job.name,
        calendar=job.calendar,
        problems=tuple(problems),
        running=running,
        result=ended.result if ended else "",
        last_run=last.started if last else "",
        image=image.id if image else "",
        created=_text(image.created) if image else "",
        age=_age(image.created, now) if image else None,
        due=_text(due) if due else "",
        next=_text(next_time) if next_time else "",
        data=tuple(_data_ages(record, now)),
    )


def _problems_of_last(last: JobRun | None, running: bool) -> list[str]:
    if last is None:
        return ["never ran"]
    if last.result == RUNNING:
        return [] if running else ["interrupted: the run ended without a word"]
    if last.result != GOOD:
        return [f"{last.result}: {last.error.splitlines()[0] if last.error else ''}"]
    return [
        f"data: backup {item.name} is not whole{f': {item.error}' if item.error else ''}"
        for item in last.data
        if not item.whole
    ]


def _slack(job: Job, ended: JobRun | None) -> timedelta:
    """How long after its time a run has normally ended."""
    took = timedelta(seconds=2 * ended.seconds if ended else 0)
    return _GRACE + took + timedelta(seconds=span_seconds(job.random_delay))


def _data_ages(record: JobRecord, now: datetime) -> Iterator[DataAge]:
    seen = set()
    for run in record.runs:
        for item in run.data:
            finished = time_of(item.finished)
            if item.whole and finished and item.name not in seen:
                seen.add(item.name)
                yield DataAge(item.name, item.snapshot, item.finished, _age(finished, now))


def _age(moment: datetime, now: datetime) -> int:
    """Never negative: clocks of two machines differ."""
    return max(int((now - moment).total_seconds()), 0)


def _text(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
