"""Export: a disk of an image as a file that other programs read.

A raw file is written by the restore engine, every other by ``qemu-img``, which reads our own NBD
server. The file gets its name when it is whole and on the disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from imager.errors import ImagerError, IntegrityError, RefusedError, UsageError
from imager.imagesource import ImageSource
from imager.manifest import Disk, Manifest
from imager.plan import RestoreOptions, plan_restore
from imager.process import run
from imager.progress import Progress
from imager.repository import Repository
from imager.restore import restore
from imager.serve import ImageServer

# Options of qemu-img, by format.
FORMATS: dict[str, list[str]] = {
    "raw": [],
    "qcow2": [],
    "vmdk": ["-o", "subformat=monolithicSparse"],
    "vhdx": ["-o", "subformat=dynamic"],
    "vdi": [],
}

# Of an error in what it compares, qemu-img(1).
_DIFFERS = 1


@dataclass(frozen=True)
class ExportJob:
    manifest: Manifest
    disk: Disk
    path: Path
    format: str = "raw"
    force: bool = False
    """A file of that name is replaced, when the new one is whole."""
    verify: bool = False
    """Compare the file with the image at the end."""

    def check(self) -> None:
        """Raises UsageError, RefusedError."""
        if self.format not in FORMATS:
            raise UsageError(f"unknown format {self.format}", hint=f"there are: {_known()}")
        if os.path.lexists(self.path) and not (self.force and self.path.is_file()):
            how = "--force replaces it" if self.path.is_file() else "imager restore writes to disks"
            raise RefusedError([f"{self.path} is there already"], hint=how)
        if not self.path.absolute().parent.is_dir():
            raise UsageError(f"there is no folder {self.path.absolute().parent}")


def _known() -> str:
    return ", ".join(FORMATS)


def export(job: ExportJob, open_repository: Callable[[], Repository], progress: Progress) -> None:
    """Raises UsageError, RefusedError, ImagerError; IntegrityError when the file or the image is
    damaged. Then no file has appeared."""
    job.check()
    with _unnamed(job.path) as path:
        if job.format == "raw":
            _write_raw(job, open_repository(), path, progress)
        if job.format != "raw" or job.verify:
            with _served(job, open_repository) as uri:
                if job.format != "raw":
                    progress.note(f"qemu-img writes {job.path}")
                    _convert(job, uri, path)
                if job.verify:
                    progress.note(f"comparing {job.path} with the image")
                    _compare(job, uri, path)
        _sync(path)
        path.rename(job.path)
    _sync(job.path.absolute().parent)


@contextmanager
def _unnamed(path: Path) -> Iterator[Path]:
    """A name beside the file's own, which is free again if it does not come to that."""
    part = path.absolute().with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def _write_raw(job: ExportJob, repository: Repository, path: Path, progress: Progress) -> None:
    plan = plan_restore(repository, job.manifest, job.disk, str(path), RestoreOptions())
    restore(repository, job.manifest, job.disk, plan, progress)


@contextmanager
def _served(job: ExportJob, open_repository: Callable[[], Repository]) -> Iterator[str]:
    """The URI of the disk, as long as the block lasts. Raises what reading it raised."""
    failed: list[Exception] = []
    with (
        tempfile.TemporaryDirectory(prefix="imager-export-") as folder,
        ImageSource(open_repository(), job.disk) as source,
        ImageServer(
            {"disk": source},
            Path(folder) / "nbd",
            on_error=lambda name, error: failed.append(error),
        ),
    ):
        try:
            yield f"nbd+unix:///disk?socket={folder}/nbd"
        except ImagerError:
            if failed and isinstance(failed[0], ImagerError):
                raise failed[0] from None
            raise


def _convert(job: ExportJob, uri: str, path: Path) -> None:
    options = FORMATS[job.format]
    run(
        ["qemu-img", "convert", "-f", "raw", "-O", job.format, *options, "-W", "--", uri, str(path)]
    )


def _compare(job: ExportJob, uri: str, path: Path) -> None:
    command = ["qemu-img", "compare", "-f", job.format, "-F", "raw", "--", str(path), uri]
    done = run(command, accept=(0, _DIFFERS))
    if done.returncode == _DIFFERS:
        said = done.stdout.decode(errors="replace").strip()
        raise IntegrityError(f"{job.path} is not what the image holds: {said}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
