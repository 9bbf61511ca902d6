"""One imaging run: what goes on from the hooks before an image to those after it."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from imager.belonging import missing_members
from imager.blocksource import BlockSource, FileSource
from imager.capture import DEFAULT_LEVEL, CaptureJob, SourceDisk, capture
from imager.data.backing import DataRun
from imager.data.model import DataEntry
from imager.data.settings import load_entries
from imager.deviceuse import device_numbers, disk_numbers_below, uses_of
from imager.diskidentity import disk_identity
from imager.errors import RefusedError, SourceError, UsageError
from imager.exclusion import leave_out
from imager.fingerprint import read_fingerprint
from imager.layout import read_layouts
from imager.manifest import Manifest
from imager.mapproof import all_hold, prove_disks, unproved
from imager.progress import Progress
from imager.repository import Repository


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

    def check(self) -> None:
        """Raises UsageError for contradictions."""
        if self.prove_map and self.all_blocks:
            raise UsageError(
                "--prove-map and --all-blocks: with all blocks there is nothing to prove"
            )
        if self.prove_map and self.consistency == "none":
            raise UsageError("--prove-map and --consistency none: what changes cannot be proved")
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
        writers = find_writers(job.paths, job.consistency)
        repository = opening()
        entries = data_entries(job.data, sources)
        disks = source_disks(sources)
        if job.prove_map:
            disks = prove_disks(disks, progress)
        disks = leave_out(disks, job.exclude_partitions, entries)
        beside = DataRun(entries, progress)
        beside.before()
        taking = CaptureJob(
            disks=tuple(disks),
            name=image_name(job.name, sources),
            note=job.note,
            level=job.level,
            all_blocks=job.all_blocks,
            consistency="none" if writers else "offline",
            hardware=read_fingerprint(),
            warnings=tuple(warnings_of(disks, repository, writers)),
            additions=beside.additions,
        )
        for text in taking.warnings:
            progress.note(f"warning: {text}")
        manifest = capture(taking, repository, progress)
        beside.after(repository)
    whole = beside.whole and all_hold(disk.layout for disk in disks) and not manifest.partial
    return Imaged(manifest, whole)


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


def data_entries(asked: bool | None, sources: Sequence[BlockSource]) -> list[DataEntry]:
    """A file is an image of some machine, most likely not of the one whose data this is."""
    if asked is False or (asked is None and not any(source.is_device for source in sources)):
        return []
    entries = load_entries()
    if asked and not entries:
        raise UsageError("--data: imager.toml has no data backups")
    return entries


def find_writers(paths: Iterable[str], asked: str) -> list[str]:
    """Who may be writing to the sources. Raises RefusedError unless that was asked for."""
    if asked not in ("auto", "offline", "none"):
        raise UsageError(f"--consistency {asked}: it can be auto, offline or none")
    writers = [
        f"{path}: {use.device} is {use.description}"
        for path in paths
        for use in uses_of(path)
        if use.writable and use.description != "in use as swap"
    ]
    if writers and asked != "none":
        raise RefusedError(
            writers,
            hint="unmount it, or remount it read-only; --consistency none captures a disk that "
            "changes meanwhile, at your own risk",
        )
    return writers


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
