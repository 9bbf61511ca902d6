"""Import: what other imaging programs stored becomes an image like any other."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from imager.blocksource import FileSource
from imager.capture import DEFAULT_LEVEL, CaptureJob, SourceDisk, capture
from imager.clonezilla import assemble, is_clonezilla
from imager.diskidentity import DiskIdentity
from imager.errors import SourceError, UsageError
from imager.foreign import RAW, decompressor_for, kind_of, make_raw, read_head
from imager.layout import read_layouts
from imager.manifest import Manifest
from imager.progress import Progress
from imager.repository import Repository


@dataclass(frozen=True)
class ImportJob:
    path: Path
    name: str
    note: str = ""
    level: int = DEFAULT_LEVEL
    sector_size: int | None = None
    """Of the disk, in bytes, if other than 512; files don't tell."""
    scratch: Path | None = None
    """A folder for what is unpacked, sparse; else TMPDIR, else /var/tmp."""


@dataclass(frozen=True)
class _RawDisk:
    """A disk as a raw file, and how it was stored."""

    name: str
    path: Path
    kind: str


def import_image(job: ImportJob, repository: Repository, progress: Progress) -> Manifest:
    """Store it as an image; the manifest says what it was made of (``imported``).

    Raises UnsupportedError naming what can't be imported, SourceError, ToolError.
    """
    if not job.path.exists():
        raise SourceError(f"there is no {job.path}")
    if not (job.path.is_file() or job.path.is_dir()):
        raise UsageError(f"{job.path} is neither a file nor a folder", hint="imager capture")
    with _raw_disks(job, progress) as disks, _sources(job, disks) as captured:
        imported = {
            "from": job.path.name,
            "kind": "clonezilla" if job.path.is_dir() else disks[0].kind,
            "disks": {disk.name: disk.kind for disk in disks},
        }
        capturing = CaptureJob(
            disks=captured,
            name=job.name,
            note=job.note,
            level=job.level,
            additions=lambda: {"imported": imported},
        )
        return capture(capturing, repository, progress)


@contextmanager
def _raw_disks(job: ImportJob, progress: Progress) -> Iterator[list[_RawDisk]]:
    """What can't be read as it is, is unpacked to files that last as long as the block."""
    if job.path.is_file():
        head = read_head(job.path)
        if decompressor_for(head) is None and kind_of(head, str(job.path)) == RAW:
            yield [_RawDisk(_disk_name(job.path), job.path, RAW)]
            return
    elif not is_clonezilla(job.path):
        raise UsageError(
            f"{job.path} is no folder of Clonezilla", hint="to import one file, name that file"
        )
    with tempfile.TemporaryDirectory(prefix="imager-import-", dir=_scratch(job)) as folder:
        scratch = Path(folder)
        if job.path.is_dir():
            yield [
                _RawDisk(disk.name, disk.path, disk.kind)
                for disk in assemble(job.path, scratch, progress)
            ]
            return
        target = scratch / "disk"
        progress.note(f"unpacking {job.path} to {scratch}")
        kind = make_raw([job.path], target, scratch)
        yield [_RawDisk(_disk_name(job.path), target, kind)]


def _scratch(job: ImportJob) -> str:
    if job.scratch is not None and not job.scratch.is_dir():
        raise UsageError(f"there is no folder {job.scratch}")
    return str(job.scratch or os.environ.get("TMPDIR") or "/var/tmp")


# Of a file of a disk; what is before the first of them is its name.
_ENDINGS = {"gz", "xz", "zst", "bz2", "lz4", "raw", "img", "dd", "bin", "iso"}
_ENDINGS |= {"qcow2", "vmdk", "vhdx", "vhd", "vdi"}


def _disk_name(path: Path) -> str:
    """``web.img.gz`` is the disk web."""
    words = path.name.split(".")
    while len(words) > 1 and words[-1].lower() in _ENDINGS:
        words.pop()
    name = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in ".".join(words))
    return name.strip(".-") or "disk"


@contextmanager
def _sources(job: ImportJob, disks: list[_RawDisk]) -> Iterator[tuple[SourceDisk, ...]]:
    with ExitStack() as stack:
        sources = [
            stack.enter_context(FileSource(disk.path, logical_sector=job.sector_size))
            for disk in disks
        ]
        for source, disk in zip(sources, disks, strict=True):
            if not source.size:
                raise SourceError(f"{job.path}: disk {disk.name} is empty")
        yield tuple(
            SourceDisk(disk.name, source, layout, DiskIdentity(size=source.size))
            for disk, source, layout in zip(disks, sources, read_layouts(sources), strict=True)
        )
