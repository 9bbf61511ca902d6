"""A repository in a local folder.

An object is written to ``tmp/``, fsynced, linked to its name (which fails if that exists), and its
folder is fsynced: after a power cut it is there as a whole or not at all.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Self

from imager.errors import ImagerError, ObjectExists, ObjectMissing
from imager.store.base import check_name, is_name

_TEMPORARY = "tmp"
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1  # linux/fs.h

# Written at once: large enough for a disk to stream. The alignment suits any sector size.
_CHUNK_SIZE = 2 << 20
_ALIGNMENT = 4096

_LEFTOVER_SECONDS = 24 * 3600


class LocalStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.url = str(self.folder)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._fail(name, error)
        try:
            wanted = os.fstat(fd).st_size - offset if length is None else length
            return _read_fully(fd, offset, max(wanted, 0))
        except OSError as error:
            self._fail(name, error)
        finally:
            os.close(fd)

    def size(self, name: str) -> int:
        try:
            return self._path(name).stat().st_size
        except OSError as error:
            self._fail(name, error)

    def names(self, folder: str) -> Iterator[str]:
        check_name(folder)
        try:
            entries = sorted(os.scandir(self.folder / folder), key=_sort_key)
        except FileNotFoundError:
            return
        except OSError as error:
            self._fail(folder, error)
        for entry in entries:
            name = f"{folder}/{entry.name}"
            if not is_name(name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self.names(name)
            else:
                yield name

    def writer(self, name: str) -> LocalWriter:
        return LocalWriter(self, check_name(name))

    def create(self, name: str, content: bytes) -> None:
        with self.writer(name) as writer:
            writer.write(content)
            writer.commit()

    def delete(self, name: str) -> None:
        try:
            self._path(name).unlink()
            sync_folder(self._path(name).parent)
        except OSError as error:
            self._fail(name, error)

    def clear_leftovers(self) -> None:
        """Remove what interrupted writers left: files that nobody wrote to for a day.

        By the clock of the filesystem, which on a network folder is another machine's.
        """
        folder = self.folder / _TEMPORARY
        if not folder.is_dir():
            return
        with suppress(OSError):
            mark = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
            mark.touch()
            now = mark.stat().st_mtime
            mark.unlink()
            for file in folder.iterdir():
                if now - file.stat().st_mtime > _LEFTOVER_SECONDS:
                    file.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / check_name(name)

    def _fail(self, name: str, error: OSError) -> NoReturn:
        where = f"{self.url}/{name}"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise ObjectMissing(f"{where} is missing") from None
        if isinstance(error, FileExistsError):
            raise ObjectExists(f"{where} exists already") from None
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = (
                "make room or use another repository, then run the command again: it goes on "
                "from what is stored"
            )
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "run as a user that may write there, or name another repository with --repo"
        raise ImagerError(f"{where}: {error.strerror}", hint=hint) from error


class LocalWriter:
    """An object under construction; see ``ObjectWriter``.

    Large objects go past the page cache (O_DIRECT): they are not read again soon, and copying
    them there cost a sixth of a capture's CPU time. One chunk is written by a thread of its own
    while the next one fills.
    """

    def __init__(self, store: LocalStore, name: str) -> None:
        self._store = store
        self._name = name
        self._final = store.folder / name
        self._temporary = store.folder / _TEMPORARY / f"{os.getpid()}-{secrets.token_hex(8)}"
        self._length = 0
        try:
            self._temporary.parent.mkdir(parents=True, exist_ok=True)
            self._fd = _create(self._temporary)
        except OSError as error:
            store._fail(name, error)
        self._chunk, self._spare = (mmap.mmap(-1, _CHUNK_SIZE) for _ in range(2))
        self._filled = 0
        self._flusher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flusher")
        self._flushing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write(self, content: bytes | bytearray | memoryview) -> None:
        rest = memoryview(content)
        self._length += len(rest)
        while rest:
            part = rest[: _CHUNK_SIZE - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == _CHUNK_SIZE:
                self._await_flush()
                self._flushing = self._flusher.submit(self._flush, self._chunk, _CHUNK_SIZE)
                self._chunk, self._spare, self._filled = self._spare, self._chunk, 0

    def commit(self) -> None:
        self._await_flush()
        try:
            self._flush_tail()
            os.fsync(self._fd)
            self._close()
            _make_folders(self._final.parent)
            _link_new(self._temporary, self._final)
            sync_folder(self._final.parent)
        except OSError as error:
            self._store._fail(self._name, error)

    def discard(self) -> None:
        self._flusher.shutdown()
        with suppress(OSError):  # an earlier error matters more; gc removes what stays in tmp/
            self._temporary.unlink(missing_ok=True)
        self._close()

    def _await_flush(self) -> None:
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            flushing.result()

    def _flush(self, chunk: mmap.mmap, length: int) -> None:
        """Write a chunk, ``length`` of it, which O_DIRECT wants to be in whole sectors."""
        done = 0
        with memoryview(chunk) as view:
            while done < length:
                try:
                    done += os.write(self._fd, view[done:length])
                except OSError as error:
                    self._store._fail(self._name, error)

    def _flush_tail(self) -> None:
        padded = -(-self._filled // _ALIGNMENT) * _ALIGNMENT
        self._chunk[self._filled : padded] = bytes(padded - self._filled)
        self._flush(self._chunk, padded)
        os.ftruncate(self._fd, self._length)

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _sort_key(entry: os.DirEntry[str]) -> str:
    """Sorts by the whole names below, not by folder."""
    return f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name


def _create(path: Path) -> int:
    """A new file, with O_DIRECT where the filesystem does that."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # some filesystems create it before they refuse
    return os.open(path, flags, 0o600)


def _read_fully(fd: int, offset: int, length: int) -> bytes:
    content = os.pread(fd, length, offset)
    if len(content) == length or not content:
        return content
    parts = [content]
    done = len(content)
    while done < length and (part := os.pread(fd, length - done, offset + done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _make_folders(folder: Path) -> None:
    if not folder.is_dir():
        _make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _link_new(temporary: Path, final: Path) -> None:
    """Give the file its name, failing with FileExistsError if the name is taken."""
    try:
        os.link(temporary, final)
        temporary.unlink()
    except OSError as error:
        # FAT, exFAT and some network folders have no hard links
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        _rename_new(temporary, final)


def _rename_new(temporary: Path, final: Path) -> None:
    """renameat2(2) with RENAME_NOREPLACE."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(
        _AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(final), _RENAME_NOREPLACE
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(final))
