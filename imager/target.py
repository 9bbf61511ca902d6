"""Targets of a restore: a block device that nobody else uses, or a raw file.

Block devices are opened with O_EXCL, which fails while the kernel uses them. Whole sectors go past
the page cache (O_DIRECT): what is read back comes from the disk, and copying into the cache cost
half of a restore's CPU time. Everything here is positional and may be called from several threads.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Self

from imager.blocksource import FileSource, aligned_buffer
from imager.errors import ImagerError, RefusedError
from imager.extents import Extents

# linux/fs.h: _IO(0x12, 119) and _IO(0x12, 127), each with u64 offset and length
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
# linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

# One ioctl over a whole slow disk could not be interrupted and showed no progress.
_ZEROING_STEP = 256 << 20
_FILE_ALIGNMENT = 4096  # suits O_DIRECT on any filesystem
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)

_Call = Callable[[int, list[memoryview], int], int]


class Target:
    """An open target. A context manager; leaving it does not sync, ``sync`` does."""

    def __init__(self, path: str, *, create_size: int | None = None) -> None:
        """``create_size``: length in bytes of the file to make, where there is none or an empty
        one.

        Raises RefusedError when the kernel uses the device, ImagerError otherwise.
        """
        self.path = path
        self.is_fresh = create_size is not None
        if create_size is not None:
            _create_file(path, create_size)
        with FileSource(path) as source:
            self.is_device = source.is_device
            self.size = source.size
            self.logical_sector = source.logical_sector
        self._unit = self.logical_sector if self.is_device else _FILE_ALIGNMENT
        self._fd = _open(path, os.O_EXCL if self.is_device else 0)
        self._direct_fd = _open_direct(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if self._direct_fd is not None:
            os.close(self._direct_fd)

    def write(self, offset: int, content: memoryview) -> None:
        """Write all of ``content``. Raises ImagerError with the place when the target fails."""
        self._transfer("write", os.pwritev, offset, content)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole of ``view``; errors as in ``write``."""
        self._transfer("read", os.preadv, offset, view)

    def _transfer(self, verb: str, call: _Call, offset: int, view: memoryview) -> None:
        fd = self._fd_for(offset, len(view))
        done = 0
        while done < len(view):
            try:
                count = call(fd, [view[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and fd != self._fd:
                    fd = self._fd  # the device wants more alignment of memory than slices have
                    continue
                raise self._failure(verb, offset + done, error) from None
            if count == 0:
                raise self._failure(verb, offset + done, OSError(errno.EIO, "it ends there"))
            done += count
            if done < len(view):
                fd = self._fd_for(offset + done, len(view) - done)

    def _fd_for(self, offset: int, length: int) -> int:
        """O_DIRECT is for whole sectors only."""
        if self._direct_fd is None or (offset | length) % self._unit:
            return self._fd
        return self._direct_fd

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, without writing where the target can do that itself."""
        for start in range(offset, offset + length, _ZEROING_STEP):
            step = min(_ZEROING_STEP, offset + length - start)
            if not (self._zero_device(start, step) if self.is_device else self._punch(start, step)):
                self._write_zeros(start, step)

    def discard(self, offset: int, length: int) -> None:
        """Tell the target that nothing in a range is needed; what it reads as afterwards is
        undefined on devices and zero in files."""
        if not self.is_device:
            self.zero(offset, length)
            return
        for start in range(offset, offset + length, _ZEROING_STEP):
            step = min(_ZEROING_STEP, offset + length - start)
            if not self._range_ioctl(_BLKDISCARD, start, step):
                self.zero(start, step)

    def data_extents(self) -> Extents:
        """What may be other than zero."""
        with FileSource(self.path) as source:
            return source.data_extents()

    def sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failure("sync", 0, error) from None

    def drop_cache(self) -> None:
        """Have following reads come from the disk, those past O_DIRECT too."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _zero_device(self, offset: int, length: int) -> bool:
        return self._range_ioctl(_BLKZEROOUT, offset, length)

    def _range_ioctl(self, request: int, offset: int, length: int) -> bool:
        """False when the device doesn't do it, or not for a range of that alignment."""
        try:
            fcntl.ioctl(self._fd, request, struct.pack("=QQ", offset, length))
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise self._failure("zero", offset, error) from None
        return True

    def _punch(self, offset: int, length: int) -> bool:
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if _fallocate(self._fd, mode, offset, length) == 0:
            return True
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return False
        raise self._failure("zero", offset, OSError(number, os.strerror(number)))

    def _write_zeros(self, offset: int, length: int) -> None:
        with aligned_buffer(min(length, 1 << 20)) as zeros:
            for start in range(offset, offset + length, len(zeros)):
                self.write(start, zeros[: min(len(zeros), offset + length - start)])

    def _failure(self, verb: str, offset: int, error: OSError) -> ImagerError:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if is_full else "mend the cause or use another disk"
        return ImagerError(
            f"cannot {verb} {self.path} at byte {offset}: {error.strerror}",
            hint=f"{remedy}, then run the restore again: it writes only what is missing",
        )


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise RefusedError([f"{path} is in use by the kernel"]) from None
        raise ImagerError(f"cannot open {path} for writing: {error.strerror}") from None


def _open_direct(path: str) -> int | None:
    """None where the filesystem doesn't do O_DIRECT."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None


def _create_file(path: str, size: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ImagerError(f"cannot create {path}: {error.strerror}") from None
    try:
        os.truncate(fd, size)
    except OSError as error:
        Path(path).unlink()
        raise ImagerError(f"cannot create {path} of {size} bytes: {error.strerror}") from None
    finally:
        os.close(fd)


_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
