"""Freezing: filesystems that write nothing for a while, and that surely go on afterwards.

FIFREEZE (ioctl of linux/fs.h) makes a filesystem complete on its disk, as if it were unmounted, and
lets all writers wait. A watchdog (``freezewatch``) thaws when this process ends or takes too long.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from imager import freezewatch
from imager.deviceuse import LiveFilesystem, disk_numbers_below, filesystem_of
from imager.errors import ImagerError
from imager.process import leave_running

# linux/fs.h: _IOWR('X', 119, int)
_FIFREEZE = 0xC0045877

LIMIT_SECONDS = 60.0

_START_SECONDS = 60.0
_MOST = freezewatch.FORGET - 1

# Writing out beforehand what is dirty keeps the freeze short; while it goes on, more gets dirty.
_SYNCS = 2


class FreezeLost(ImagerError):
    """Something thawed the filesystems before it was time: what was read is of several moments."""


class _Target(NamedTuple):
    filesystem: LiveFilesystem
    folder: int


class Freeze:
    """What is frozen, until ``end``. ``milliseconds`` is how long that was."""

    def __init__(self, targets: Sequence[_Target], orders: int, limit_seconds: float) -> None:
        self._targets = targets
        self._orders = orders
        self._limit = limit_seconds
        self._frozen: list[int] = []
        self._started: float | None = None
        self.milliseconds = 0
        self.frozen: list[str] = []
        """Mount points."""
        self.synced: list[str] = []
        """Mount points of filesystems that cannot be frozen; they were written out only."""

    def _begin(self) -> None:
        for _ in range(_SYNCS):
            for target in self._targets:
                _sync(target.folder)
        for n, target in enumerate(self._targets):
            self._freeze(n, target)

    def _freeze(self, n: int, target: _Target) -> None:
        point = target.filesystem.points[0]
        self._started = self._started or monotonic()
        self._order(n)
        self._frozen.append(n)
        try:
            fcntl.ioctl(target.folder, _FIFREEZE, 0)
        except OSError as error:
            self._frozen.remove(n)
            self._order(n + freezewatch.FORGET)
            if error.errno == errno.EOPNOTSUPP:
                _sync(target.folder)
                self.synced.append(point)
                return
            hint = None
            if error.errno == errno.EBUSY:
                hint = f"another program has frozen it; if it is gone: fsfreeze --unfreeze {point}"
            raise ImagerError(f"{point} cannot be frozen: {error.strerror}", hint=hint) from None
        self.frozen.append(point)

    def end(self) -> None:
        """Thaw; nothing the second time. Raises FreezeLost when not all of it was frozen until
        now."""
        lost = []
        while self._frozen:
            target = self._targets[self._frozen[-1]]
            try:
                fcntl.ioctl(target.folder, freezewatch.FITHAW, 0)
            except OSError:
                lost.append(target.filesystem.points[0])
            self._frozen.pop()
        if self._started is not None:
            self.milliseconds = int((monotonic() - self._started) * 1000)
            self._started = None
            with suppress(OSError):
                self._order(freezewatch.DONE)
        if lost:
            raise FreezeLost(
                f"{', '.join(lost)} did not stay frozen until all was read: there is no image",
                hint=f"the limit is {self._limit:g} seconds; see: imager capture --help",
            )

    def _order(self, order: int) -> None:
        os.write(self._orders, bytes([order]))


@contextmanager
def frozen(
    filesystems: Sequence[LiveFilesystem], *, limit_seconds: float = LIMIT_SECONDS
) -> Iterator[Freeze]:
    """Freeze these, in this order (``live_filesystems`` gives it), until the block or ``end``.

    Within it nothing may write to them: see ``written_here``. The watchdog ends it after the limit.
    Raises ImagerError when one can't be frozen, FreezeLost when it did not last.
    """
    if len(filesystems) > _MOST:
        raise ImagerError(f"{len(filesystems)} filesystems are too many to be frozen at once")
    with ExitStack() as stack:
        targets = [_Target(each, _open(each, stack)) for each in filesystems]
        orders = _start_watchdog([target.folder for target in targets], limit_seconds, stack)
        freeze = Freeze(targets, orders, limit_seconds)
        stack.enter_context(_no_bytecode())
        try:
            freeze._begin()
            yield freeze
        except BaseException:
            with suppress(FreezeLost):
                freeze.end()
            raise
        freeze.end()


def _open(filesystem: LiveFilesystem, stack: ExitStack) -> int:
    """A folder of it: a mount point under which no other mount is seen."""
    for point in filesystem.points:
        try:
            folder = os.open(point, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        if filesystem_of(folder) == filesystem.number:
            stack.callback(os.close, folder)
            return folder
        os.close(folder)
    raise ImagerError(
        f"{filesystem.device}, mounted at {filesystem.points[0]}, cannot be frozen: the mount "
        "point cannot be reached"
    )


def _start_watchdog(folders: Sequence[int], limit_seconds: float, stack: ExitStack) -> int:
    """The pipe for its orders; it has gone when the stack is left."""
    theirs, orders = os.pipe()
    answers, to_answers = os.pipe()
    try:
        # Isolated and without site-packages: nothing is read that is not of Python itself.
        command = [sys.executable, "-I", "-S", "-B", freezewatch.__file__, str(limit_seconds)]
        inherited = [theirs, to_answers, *folders]
        watchdog = leave_running([*command, *map(str, inherited)], inherit=inherited)
    except BaseException:
        for fd in (theirs, orders, answers, to_answers):
            os.close(fd)
        raise
    os.close(theirs)
    os.close(to_answers)
    stack.callback(watchdog.wait)
    stack.callback(os.close, orders)
    try:
        ready, _, _ = select.select([answers], [], [], _START_SECONDS)
        if not ready or os.read(answers, 1) != b"r":
            raise ImagerError("the watchdog that would thaw did not start: nothing was frozen")
    finally:
        os.close(answers)
    return orders


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """An import would otherwise write beside the module, and wait for the thaw forever."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _sync(folder: int) -> None:
    """syncfs(2). Raises ImagerError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(folder) != 0:
        raise ImagerError(f"writing out failed: {os.strerror(ctypes.get_errno())}")


def written_here(filesystems: Iterable[LiveFilesystem], repository: str) -> list[str]:
    """Why these must not be frozen: what imager itself writes to them meanwhile. The frozen
    filesystem would let it wait, and so it would never come to the thaw."""
    points = {each.number: each.points[0] for each in filesystems}
    below = set() if "://" in repository else disk_numbers_below(Path(repository))
    reasons = [
        f"the repository {repository} lies on {point}"
        for number, point in points.items()
        if number in below
    ]
    for fd, words in ((1, "standard output"), (2, "standard error")):
        with suppress(OSError):
            on = filesystem_of(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
            if on in points:
                reasons.append(f"{words} is written to a file on {points[on]}")
    return reasons
