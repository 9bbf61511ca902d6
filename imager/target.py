"""Targets of a restore: a block device that nobody else uses, or a raw file.

Block devices are opened with O_EXCL, which fails while the kernel uses them, and written with
O_DIRECT. Everything here is positional and may be called from several threads.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path
from types import TracebackType
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
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)


class Target:
    """An open target. A context manager; leaving it does not sync, ``sync`` does."""

    def __init__(self, path: str, *, create_size: int | None = None) -> None:
        """``create_size``: length in bytes of the file to make where there is none.

        Raises RefusedError when the kernel uses the device, ImagerError otherwise.
        """
        self.path = path
        self.is_fresh = create_size is not None and not Path(path).exists()
        if self.is_fresh:
            assert create_size is not None
            _create_file(path, create_size)
        with FileSource(path) as source:
            self.is_device = source.is_device
            self.size = source.size
            self.logical_sector = source.logical_sector
        flags = os.O_RDWR | os.O_CLOEXEC
        if self.is_device:
            flags |= os.O_EXCL | os.O_DIRECT
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise RefusedError([f"{path} is in use by the kernel"]) from None
            raise ImagerError(f"cannot open {path} for writing: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def write(self, offset: int, content: memoryview) -> None:
        """Write all of ``content``. Raises ImagerError with the place when the target fails."""
        if self.is_device and (offset | len(content)) % self.logical_sector:
            self._write_edges(offset, content)
            return
        try:
            done = 0
            while done < len(content):
                done += os.pwrite(self._fd, content[done:], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL and self.is_device:
                self._write_bounced(offset, content)
                return
            raise self._failure("write", offset, error) from None

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole of ``view``; for devices both must be in multiples of sectors."""
        try:
            done = 0
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "it ends early")
                done += count
        except OSError as error:
            raise self._failure("read", offset, error) from None

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
        """Have following reads come from the disk. Devices are read with O_DIRECT anyway."""
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

    def _write_edges(self, offset: int, content: memoryview) -> None:
        """A range that isn't in whole sectors: the last bytes of an image file of odd size."""
        unit = self.logical_sector
        start, end = offset // unit * unit, -(-(offset + len(content)) // unit) * unit
        with aligned_buffer(end - start) as buffer:
            self.read_into(start, buffer)
            buffer[offset - start : offset - start + len(content)] = content
            self.write(start, buffer)

    def _write_bounced(self, offset: int, content: memoryview) -> None:
        """For devices that want more alignment of memory than our slices have."""
        with aligned_buffer(len(content)) as buffer:
            buffer[:] = content
            done = 0
            try:
                while done < len(buffer):
                    done += os.pwrite(self._fd, buffer[done:], offset + done)
            except OSError as error:
                raise self._failure("write", offset + done, error) from None

    def _failure(self, verb: str, offset: int, error: OSError) -> ImagerError:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if is_full else "mend the cause or use another disk"
        return ImagerError(
            f"cannot {verb} {self.path} at byte {offset}: {error.strerror}",
            hint=f"{remedy}, then run the restore again: it writes only what is missing",
        )


def _create_file(path: str, size: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ImagerError(f"cannot create {path}: {error.strerror}") from None
    try:
        os.truncate(fd, size)
    except OSError as error:
        raise ImagerError(f"cannot create {path} of {size} bytes: {error.strerror}") from None
    finally:
        os.close(fd)


_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
