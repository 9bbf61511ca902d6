"""One imaging run: what goes on from the hooks before an image to those after it."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imager.belonging import missing_members
from imager.blocksource import BlockSource, FileSource
from imager.capture import DEFAULT_LEVEL, CaptureJob, SourceDisk, capture
from imager.consistency import (
    WORDS,
    Method,
    Moment,
    Situation,
    check_choice,
    choose,
    one_moment,
    refuse_writers,
    still,
)
from imager.data.backing import DataRun
from imager.data.model import DataEntry
from imager.data.settings import load_entries
from imager.deviceuse import device_numbers, disk_numbers_below
from imager.diskidentity import disk_identity
from imager.errors import SourceError, UsageError
from imager.exclusion import leave_out
from imager.fingerprint import read_fingerprint
from imager.freeze import LIMIT_SECONDS
from imager.hooks import HookRun, load_hooks
from imager.layout import read_layouts
from imager.manifest import Manifest
from imager.mapproof import all_hold, prove_disks, unproved
from imager.progress import Progress
from imager.repository import Repository
from imager.trackcapture import DiskTracker


@dataclass(frozen=True)
class ImagingJob:
    """What a run is asked for: the options of ``imager capture``."""

    paths: tuple[str, ...]
    name: str | None = None
    """Of the machine; else the host's, or the file's."""
    note: str = ""
    level: int = DEFAULT_LEVEL
    all_blocks: bool = False
    prove_map: bool = False
    consistency: str = "auto"
    data: bool | None = None
    """Whether the data backups run; None: for disks, not for files."""
    exclude_partitions: tuple[str, ...] = ()
    sector_size: int | None = None
    """In bytes, of image files."""
    hooks: bool | None = None
    """Whether the hooks run; None: for disks, not for files."""
    freeze_limit: float = LIMIT_SECONDS

    def check(self) -> None:
        """Raises UsageError for contradictions."""
        if self.prove_map and self.all_blocks:
            raise UsageError(
                "--prove-map and --all-blocks: with all blocks there is nothing to prove"
            )
        check_choice(self.consistency)
        if self.prove_map and self.consistency not in ("auto", "offline"):
            raise UsageError(
                f"--prove-map and --consistency {self.consistency}: what changes cannot be proved"
            )
        if len({Path(path).resolve() for path in self.paths}) != len(self.paths):
            raise UsageError("a source is named twice")


@dataclass(frozen=True)
class Imaged:
    """The image of a run. ``whole``: it has no holes, and nothing that belongs to it failed."""

    manifest: Manifest
    whole: bool


def run(job: ImagingJob, opening: Callable[[], Repository], progress: Progress) -> Imaged:
    """Make an image. Raises ImagerError when there is none; see also ``capture``.

    ``opening`` gives the repository: it is made, where it has to be, only when the sources are
    there and may be captured.
    """
    job.check()
    with _opened(job) as sources:
        situation = Situation.of(job.paths)
        if job.consistency == "offline" or job.prove_map:
            refuse_writers(situation)
        repository = opening()
        method = choose(job.consistency, situation, repository.store.url)
        return _Run(job, sources, situation, method, repository, progress).do()


class _Run:
    """One run, with its parts."""

    def __init__(
        self,
        job: ImagingJob,
        sources: Sequence[FileSource],
        situation: Situation,
        method: Method,
        repository: Repository,
        progress: Progress,
    ) -> None:
        self._job = job
        self._sources = sources
        self._situation = situation
        self._method = method
        self._repository = repository
        self._progress = progress
        self._name = image_name(job.name, sources)
        self._hardware = read_fingerprint()
        for_disks = any(source.is_device for source in sources)
        self._entries = data_entries(job.data, for_disks)
        wants_hooks = for_disks if job.hooks is None else job.hooks
        self._data = DataRun(self._entries, progress)
        self._hooks = HookRun(load_hooks() if wants_hooks else (), progress)
        self._hooks.about |= {
            "name": self._name,
            "disks": " ".join(job.paths),
            "consistency": WORDS[method],
            "repo": repository.store.url,
        }

    def do(self) -> Imaged:
        with self._hooks.around():
            self._data.before()
            with one_moment(
                self._method,
                self._situation,
                self._sources,
                self._hooks,
                limit_seconds=self._job.freeze_limit,
            ) as moment:
                disks = self._disks(moment.sources)
                manifest = self._capture(self._capture_job(disks, moment), moment)
            self._data.after(self._repository)
            self._hooks.about["image"] = manifest.id
        whole = self._data.whole and self._hooks.whole and not manifest.partial
        return Imaged(manifest, whole and all_hold(disk.layout for disk in disks))

    def _disks(self, sources: Sequence[BlockSource]) -> list[SourceDisk]:
        """As they are now."""
        disks = source_disks(sources)
        if self._job.prove_map:
            disks = prove_disks(disks, self._progress)
        return leave_out(disks, self._job.exclude_partitions, self._entries)

    def _capture(self, taking: CaptureJob, moment: Moment) -> Manifest:
        if self._method != "track":
            return capture(taking, self._repository, self._progress)
        live, limit = self._situation.live, self._job.freeze_limit
        return DiskTracker().capture(
            taking,
            lambda: moment.noting(still(live, self._hooks, limit_seconds=limit)),
            self._repository,
            self._progress,
        )

    def _capture_job(self, disks: Sequence[SourceDisk], moment: Moment) -> CaptureJob:
        writers = self._situation.writers if self._method == "none" else ()
        warnings = warnings_of(disks, self._repository, writers) + moment.warnings
        for text in warnings:
            self._progress.note(f"warning: {text}")
        return CaptureJob(
            disks=tuple(disks),
            name=self._name,
            note=self._job.note,
            level=self._job.level,
            all_blocks=self._job.all_blocks,
            consistency=WORDS[self._method],
            hardware=self._hardware,
            warnings=tuple(warnings),
            lasts=self._method in ("offline", "track", "none"),
            additions=lambda: self._additions(moment),
        )

    def _additions(self, moment: Moment) -> dict[str, Any]:
        """All is read and stored: the disks go on before anything else does."""
        found = moment.end()
        if self._hooks.results:
            found["hooks"] = [result.to_json() for result in self._hooks.results]
        return {**found, **self._data.additions()}


@contextmanager
def _opened(job: ImagingJob) -> Iterator[list[FileSource]]:
    with ExitStack() as stack:
        sources = [
            stack.enter_context(FileSource(path, logical_sector=job.sector_size))
            for path in job.paths
        ]
        for source in sources:
            if source.size == 0:
                raise SourceError(f"{source.path} is empty: there is nothing to capture")
        yield sources


def source_disks(sources: Sequence[BlockSource]) -> list[SourceDisk]:
    """The disks with their names and layouts, as they are now."""
    disks: list[SourceDisk] = []
    for source, layout in zip(sources, read_layouts(sources), strict=True):
        name = _disk_name(source, {disk.name for disk in disks})
        disks.append(SourceDisk(name, source, layout, disk_identity(source.path)))
    return disks


def _disk_name(source: BlockSource, taken: set[str]) -> str:
    """``sda``, or a file's name without its ending, made unique."""
    path = Path(source.path)
    stem = _clean(path.name if source.is_device else path.stem)
    candidates = [stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 3))]
    return next(name for name in candidates if name not in taken)


def image_name(name: str | None, sources: Sequence[BlockSource]) -> str:
    """As asked for, else the host's for disks and a file's for files. Raises UsageError."""
    if name is not None:
        if _clean(name) != name or not name:
            raise UsageError(f"--name {name}: letters, digits, dots, dashes, underscores only")
        return name
    return _clean(socket.gethostname()) if sources[0].is_device else _disk_name(sources[0], set())


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text) or "disk"


def data_entries(asked: bool | None, for_disks: bool) -> list[DataEntry]:
    """A file is an image of some machine, most likely not of the one whose data this is."""
    if asked is False or (asked is None and not for_disks):
        return []
    entries = load_entries()
    if asked and not entries:
        raise UsageError("--data: imager.toml has no data backups")
    return entries


def warnings_of(
    disks: Sequence[SourceDisk], repository: Repository, writers: Iterable[str]
) -> list[str]:
    """What the image is to keep a word about."""
    texts = missing_members(disks) + unproved(disks)
    texts += [f"captured while it changed: {text}" for text in writers]
    below = disk_numbers_below(Path(repository.store.url))
    for disk in disks:
        if disk.source.is_device and device_numbers(disk.source.path) & below:
            texts.append(f"the repository lies on {disk.source.path}: lost with it when it fails")
    return texts
