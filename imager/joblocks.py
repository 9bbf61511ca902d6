"""Locks of this machine: a job runs once at a time, and so does a capture of a disk.

flock(2) on files in the run folder: the kernel gives them back however a process ends. Not on the
devices themselves, where a lock would stop udev.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from imager.deviceuse import device_numbers
from imager.errors import ImagerError


class JobBusy(ImagerError):
    """The job is running already."""


def run_folder() -> Path:
    """``IMAGER_RUN_DIR``, else /run/imager."""
    return Path(os.environ.get("IMAGER_RUN_DIR", "/run/imager"))


@contextmanager
def hold_job(name: str) -> Iterator[None]:
    """Raises JobBusy when another process runs it."""
    with ExitStack() as stack:
        if not _lock(_open(f"job-{name}", stack), wait=False):
            raise JobBusy(
                f"job {name} is running already: nothing was done", hint="see: imager status"
            )
        yield


def job_runs(name: str) -> bool:
    """Whether a process holds the job's lock now."""
    if not (run_folder() / f"job-{name}.lock").exists():
        return False
    with ExitStack() as stack:
        return not _lock(_open(f"job-{name}", stack), wait=False)


@contextmanager
def hold_disks(paths: Iterable[str], on_wait: Callable[[str], object]) -> Iterator[None]:
    """Wait until no other capture reads these disks, nor one of their partitions.

    ``on_wait`` is told when there is something to wait for.
    """
    names = sorted({name for path in paths for name in _disk_names(path)})
    with ExitStack() as stack:
        for name in names:  # in one order, so that two never wait for each other
            fd = _open(name, stack)
            if not _lock(fd, wait=False):
                on_wait(f"another capture reads {', '.join(paths)}: waiting for its end")
                _lock(fd, wait=True)
        yield


def _disk_names(path: str) -> set[str]:
    """One for each device that it shares bytes with; a regular file counts by itself too."""
    numbers = {f"device-{number.replace(':', '-')}" for number in device_numbers(path)}
    try:
        status = Path(path).stat()
    except OSError:
        return numbers  # the capture says what is wrong
    return numbers or {f"file-{status.st_dev:x}-{status.st_ino:x}"}


def _open(name: str, stack: ExitStack) -> int:
    folder = run_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ImagerError(f"{folder}/{name}.lock cannot be opened: {error.strerror}") from None
    stack.callback(os.close, fd)
    return fd


def _lock(fd: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
