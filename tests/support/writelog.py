"""A FUSE file that records every write and flush, to stop a disk at any moment of its past.

``recorded_file`` mounts one; this module run as a program serves it. ``crashed`` then rebuilds what
a power failure may have left: all that was flushed, and of the later writes any part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.fuseserver import SERVED_NAME, served_file

_RECORD = struct.Struct("<qQ")  # offset in bytes, or -1 for a flush; length
_FLUSH = -1


class Write(NamedTuple):
    """What reached the disk; ``offset`` is -1 for a flush."""

    offset: int
    data: bytes

    @property
    def is_flush(self) -> bool:
        return self.offset == _FLUSH


@contextlib.contextmanager
def recorded_file(backing: Path, log: Path) -> Iterator[Path]:
    """The path of the mounted file; its reads and writes are passed to ``backing``."""
    with served_file("tests.support.writelog", backing, str(log)) as path:
        yield path


def read_log(log: Path) -> list[Write]:
    writes, content, at = [], log.read_bytes(), 0
    while at < len(content):
        offset, length = _RECORD.unpack_from(content, at)
        at += _RECORD.size
        writes.append(Write(offset, content[at : at + length]))
        at += length
    return writes


def crashed(image: Path, writes: list[Write], chance: random.Random) -> None:
    """Writes to ``image`` what is on the disk when it stops after these writes."""
    flushes = [index for index, write in enumerate(writes) if write.is_flush]
    flushed = flushes[-1] if flushes else 0
    share = chance.choice((0, 0.5, 1))  # of what still was in the disk's cache
    with image.open("r+b") as file:
        for index, write in enumerate(writes):
            if not write.is_flush and (index < flushed or chance.random() < share):
                file.seek(write.offset)
                file.write(write.data)


def _serve(backing: str, folder: str, log: str) -> None:
    import mfusepy

    class Recorded(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def __init__(self) -> None:
            self.fd = os.open(backing, os.O_RDWR)
            self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
            if path != f"/{SERVED_NAME}":
                raise mfusepy.FuseOSError(errno.ENOENT)
            size = os.fstat(self.fd).st_size
            return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": size}

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", SERVED_NAME]

        def open(self, path: str, flags: int) -> int:
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return os.pread(self.fd, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            os.write(self.log, _RECORD.pack(offset, len(data)) + data)
            return os.pwrite(self.fd, data, offset)

        def fsync(self, path: str, datasync: int, fh: int) -> None:
            os.write(self.log, _RECORD.pack(_FLUSH, 0))

    mfusepy.FUSE(Recorded(), folder, foreground=True, nothreads=True, direct_io=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
