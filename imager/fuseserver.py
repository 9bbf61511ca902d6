"""Files in one folder, served through FUSE by this process until they are unmounted.

The kernel asks, functions answer. Whoever uses such a file waits for this process, so it must
never use one itself.
"""

from __future__ import annotations

import ctypes.util
import errno
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from imager.errors import ImagerError, ToolError

OnError = Callable[[str, ImagerError], object]
"""Is told the name of a file, and why some of its bytes can't be had."""


@dataclass(frozen=True)
class ServedFile:
    """``read`` and ``write`` get an offset first; offsets and sizes in bytes. What they raise,
    OSError or ImagerError, is an I/O error for whoever asks."""

    name: str
    size: int
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], int] | None = None

    @property
    def mode(self) -> int:
        return stat.S_IFREG | (0o400 if self.write is None else 0o600)


def serve_files(
    folder: Path,
    files: Sequence[ServedFile],
    *,
    source: str,
    on_ready: Callable[[], object],
    on_error: OnError = lambda name, error: None,
    in_pages: bool = True,
    leader: socket.socket | None = None,
) -> None:
    """Mount on ``folder`` and serve; returns when it is unmounted, or after SIGTERM or SIGINT.

    ``source`` is what mounts are listed with. ``in_pages``: the kernel keeps what it has read,
    and asks in several threads; else each read and write is passed on as it is, one at a time.
    ``leader``: once this connection is closed from the other side, also return as soon as nobody
    has a file open. Raises ToolError when FUSE does not work here.
    """
    library = ctypes.util.find_library("fuse3")
    if library:  # else the package takes FUSE 2, where there is one
        os.environ.setdefault("FUSE_LIBRARY_PATH", library)
    try:
        import mfusepy
    except (ImportError, OSError, AttributeError) as error:
        raise ToolError(
            f"FUSE does not work here: {error}",
            hint="install fuse3 (libfuse3) and the Python package mfusepy",
        ) from None
    by_path = {f"/{file.name}": file for file in files}
    users = _Users(led=leader is not None)
    now = time.time_ns()  # the files have no times of their own

    class Operations(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def init(self, path: str) -> None:
            on_ready()
            if leader is not None:  # by now libfuse handles signals
                threading.Thread(target=users.follow, args=(leader,), daemon=True).start()

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), now)
            owner = {"st_uid": os.geteuid(), "st_gid": os.getegid()}
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2, **owner, **times}
            file = by_path.get(path)
            if file is None:
                raise mfusepy.FuseOSError(errno.ENOENT)
            return {
                "st_mode": file.mode,
                "st_nlink": 1,
                "st_size": file.size,
                "st_blocks": -(-file.size // 512),
                **owner,
                **times,
            }

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *(file.name for file in files)]

        def open(self, path: str, flags: int) -> int:
            users.come()
            return 0

        def release(self, path: str, fh: int) -> int:
            users.go()
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            file = by_path[path]
            try:
                return file.read(offset, max(min(size, file.size - offset), 0))
            except ImagerError as error:
                on_error(file.name, error)
                raise mfusepy.FuseOSError(errno.EIO) from error

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            file = by_path[path]
            if file.write is None:
                raise mfusepy.FuseOSError(errno.EROFS)
            return file.write(offset, data)

        def flush(self, path: str, fh: int) -> int:
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            return 0

    options: dict[str, object] = {"foreground": True, "fsname": source, "subtype": "imager"}
    if in_pages:
        options["kernel_cache"] = True
    else:
        options |= {"nothreads": True, "direct_io": True}
    if all(file.write is None for file in files):
        options["ro"] = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # only then libfuse handles it
    try:
        mfusepy.FUSE(Operations(), str(folder), **options)
    except RuntimeError as error:
        raise ToolError(
            f"FUSE does not work here (fuse_main: {error})",
            hint="install fuse3, and run as root or with access to /dev/fuse",
        ) from None


class _Users:
    """Who has a file open, as a number; FUSE calls from several threads."""

    def __init__(self, *, led: bool) -> None:
        self._count = 0
        self._led = led
        self._is_left = False
        self._lock = threading.Lock()

    def come(self) -> None:
        with self._lock:
            self._count += 1

    def go(self) -> None:
        with self._lock:
            self._count -= 1
            self._end_if_alone()

    def follow(self, leader: socket.socket) -> None:
        """Until the leader closes the connection, also by being killed."""
        with suppress(OSError):
            while leader.recv(1):
                pass
        with self._lock:
            self._is_left = True
            self._end_if_alone()

    def _end_if_alone(self) -> None:
        if self._led and self._is_left and self._count == 0:
            os.kill(os.getpid(), signal.SIGTERM)  # which libfuse takes as: unmount and return
