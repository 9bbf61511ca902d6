"""Reads a filesystem that the kernel has mounted, as the other readers read theirs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import ENODATA, ENOTSUP, ENXIO
from pathlib import Path

from imager.files.model import PIECE_BYTES, Entry, Piece


class MountedReader:
    """A ``Reader``. Nobody else changes what it reads: the mount is private and read-only."""

    def __init__(self, folder: Path, note: str) -> None:
        self.notes = (note,)
        self._folder = folder
        self._paths: dict[tuple[int, int], Path] = {}
        """Of each entry one path, since others that lead to it show the same."""

    def top(self) -> Entry:
        return self._entry(self._folder, "")

    def entries(self, folder: Entry) -> Iterator[Entry]:
        for path in self._path(folder).iterdir():
            yield self._entry(path, path.name)

    def names(self, folder: Entry) -> Iterator[str]:
        return (path.name for path in self._path(folder).iterdir())

    def find(self, folder: Entry, name: str) -> Entry | None:
        try:
            return self._entry(self._path(folder) / name, name)
        except FileNotFoundError:
            return None

    def target(self, link: Entry) -> str:
        return str(self._path(link).readlink())

    def attributes(self, entry: Entry) -> Mapping[str, bytes]:
        path = self._path(entry)
        try:
            names = os.listxattr(path, follow_symlinks=False)
            return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
        except OSError as error:
            if error.errno in (ENOTSUP, ENODATA):
                return {}
            raise

    def pieces(self, file: Entry) -> Iterator[Piece]:
        with _opened(self._path(file)) as descriptor:
            at = 0
            while at < file.size:
                try:
                    at = os.lseek(descriptor, at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == ENXIO:  # only a hole is left
                        return
                    raise
                end = os.lseek(descriptor, at, os.SEEK_HOLE)
                while at < end:
                    content = os.pread(descriptor, min(PIECE_BYTES, end - at), at)
                    if not content:
                        return
                    yield Piece(at, content)
                    at += len(content)

    def _path(self, entry: Entry) -> Path:
        return self._paths[entry.number]

    def _entry(self, path: Path, name: str) -> Entry:
        info = path.lstat()
        number = (info.st_dev, info.st_ino)
        self._paths[number] = path
        is_device = stat.S_ISBLK(info.st_mode) or stat.S_ISCHR(info.st_mode)
        return Entry(
            name,
            number,
            info.st_mode,
            info.st_uid,
            info.st_gid,
            info.st_size,
            info.st_nlink,
            info.st_atime_ns,
            info.st_mtime_ns,
            info.st_ctime_ns,
            info.st_rdev if is_device else 0,
        )


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
