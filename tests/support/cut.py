"""Run imager until a certain system call, then die by SIGKILL, as if the power went.

Only calls that change a disk count, each before it is made. Without reaching it, the number of
calls is printed as the last line on standard error.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from imager import target
from imager.__main__ import main

_CALLS = ("write", "pwrite", "pwritev", "fsync", "ftruncate", "truncate", "link", "unlink", "mkdir")
_IOCTLS = (0x1277, 0x127F)  # linux/fs.h: BLKDISCARD, BLKZEROOUT


def _install(fatal: int) -> Callable[[], int]:
    counter = itertools.count(1)
    last, ioctl = [0], fcntl.ioctl

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if call is ioctl and arguments[1] not in _IOCTLS:
                return call(*arguments, **options)
            last[0] = next(counter)
            if last[0] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()
            return call(*arguments, **options)

        return wrapper

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    fcntl.ioctl = counted(ioctl)
    target._fallocate = counted(target._fallocate)  # type: ignore[assignment]
    return lambda: last[0]


if __name__ == "__main__":
    calls = _install(int(sys.argv.pop(1)))
    try:
        main()
    finally:
        print(f"\ncalls: {calls()}", file=sys.stderr)
