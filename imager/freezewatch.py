"""The watchdog of ``freeze``: thaws what a capture froze, whatever becomes of the capture.

A program of its own that imports nothing of imager: it is started before anything is frozen, gets
the open folders of the filesystems, and opens nothing from then on. Orders come through a pipe:
``n`` "number n is being frozen", ``n + FORGET`` "it is not after all", ``DONE`` "all is thawed".
The end of the pipe without ``DONE``, or the limit of time, makes it thaw.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from pathlib import Path

# linux/fs.h: _IOWR('X', 120, int)
FITHAW = 0xC0045878

FORGET, DONE = 0x80, 0xFF

# After the limit, until the capture ends: it may have been in the middle of freezing another one.
_AGAIN_SECONDS = 0.2


def main() -> None:
    """Arguments: the limit in seconds, the pipes of orders and of answers, and the folders."""
    limit = float(sys.argv[1])
    orders, answers, *folders = map(int, sys.argv[2:])
    _outlive()
    os.write(answers, b"r")
    os.close(answers)
    _watch(orders, folders, limit)


def _outlive() -> None:
    """What ends the capture is not for the watchdog: neither signals to all of a service or a
    terminal, nor a lack of memory."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for path, text in (
        ("/sys/fs/cgroup/cgroup.procs", str(os.getpid())),
        ("/proc/self/oom_score_adj", "-1000"),
    ):
        with contextlib.suppress(OSError):
            Path(path).write_text(text)


def _watch(orders: int, folders: list[int], limit: float) -> None:
    begun: set[int] = set()
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        readable, _, _ = select.select([orders], [], [], left)
        if not readable:
            _thaw(folders, begun)
            deadline = time.monotonic() + _AGAIN_SECONDS
            continue
        received = os.read(orders, 256)
        if not received:
            _thaw(folders, begun)
            return
        for order in received:
            if order == DONE:
                return
            if order >= FORGET:
                begun.discard(order - FORGET)
            else:
                begun.add(order)
                deadline = time.monotonic() + limit if deadline is None else deadline


def _thaw(folders: list[int], begun: set[int]) -> None:
    """The last one first: a filesystem on another one's file can't be thawed before that."""
    for n in sorted(begun, reverse=True):
        with contextlib.suppress(OSError):  # it is thawed already
            fcntl.ioctl(folders[n], FITHAW, 0)


if __name__ == "__main__":
    main()
