"""A FUSE file with faults: bad sectors that answer EIO, or bytes that read back other than written.

``faulty_file`` mounts one; this module run as a program serves it. Reads and writes are passed to
a file elsewhere, without a page cache in between.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.fuseserver import SERVED_NAME, served_file


@contextlib.contextmanager
def faulty_file(
    backing: Path,
    *,
    bad: Sequence[tuple[int, int]] = (),
    flipped: Sequence[int] = (),
    delay: float = 0,
) -> Iterator[Path]:
    """The path of the mounted file.

    ``bad``: ranges in bytes that can't be read; ``flipped``: bytes of which a bit reads wrongly;
    ``delay``: seconds that each reading and writing takes.
    """
    faults = json.dumps({"bad": list(bad), "flipped": list(flipped), "delay": delay})
    with served_file("tests.support.fusefile", backing, faults) as path:
        yield path


def _serve(backing: str, folder: str, faults: dict[str, Any]) -> None:
    import mfusepy

    class Faulty(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def __init__(self) -> None:
            self.fd = os.open(backing, os.O_RDWR)

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
            for start, length in faults["bad"]:
                if start < offset + size and start + length > offset:
                    raise mfusepy.FuseOSError(errno.EIO)
            time.sleep(faults["delay"])
            content = bytearray(os.pread(self.fd, size, offset))
            for at in faults["flipped"]:
                if offset <= at < offset + len(content):
                    content[at - offset] ^= 1
            return bytes(content)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            time.sleep(faults["delay"])
            return os.pwrite(self.fd, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> None:
            os.ftruncate(self.fd, length)

        def fsync(self, path: str, datasync: int, fh: int) -> None:
            os.fsync(self.fd)

    mfusepy.FUSE(Faulty(), folder, foreground=True, nothreads=True, direct_io=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
