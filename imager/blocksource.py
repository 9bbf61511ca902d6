"""Sources: disks, partitions and raw image files, read-only and by positional reads.

Block devices are read with O_DIRECT, because the page cache of a live device is not what is on
the disk. Files are read through the cache, and their holes are known by SEEK_DATA.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self

from imager.errors import SourceError
from imager.extents import Extent, Extents

# linux/fs.h: _IO(0x12, 104), _IO(0x12, 123), _IOR(0x12, 114, size_t)
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKGETSIZE64 = 0x80081272

# O_DIRECT wants memory, offset and length aligned; a page suits every device.
DIRECT_ALIGNMENT = 4096


class BlockSource(Protocol):
    """What the rest reads from. All offsets and sizes in bytes; reads are positional."""

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def logical_sector(self) -> int: ...

    @property
    def physical_sector(self) -> int: ...

    @property
    def is_device(self) -> bool: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer. Raises OSError (EIO) for unreadable sectors, SourceError for a
        range outside of the source."""

    def pread(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, any alignment; errors as in ``read_into``."""

    def data_extents(self) -> Extents:
        """What may be other than zero: all of a device, the data segments of a file."""


class FileSource:
    """A block device or a regular file as a ``BlockSource``. A context manager."""

    def __init__(self, path: str | Path, *, logical_sector: int | None = None) -> None:
        """``logical_sector`` in bytes: for files of disks that had other than 512; devices tell
        their own.

        Raises SourceError when it can't be opened or is neither device nor regular file.
        """
        self.path = str(path)
        self._fd = _open_source(self.path)
        try:
            self.is_device = _is_block_device(self._fd, self.path)
            self.size = _size(self._fd, self.is_device)
            self.logical_sector, self.physical_sector = _sectors(self._fd, self.is_device)
            if logical_sector is not None and not self.is_device:
                self.logical_sector = self.physical_sector = logical_sector
            if not self.is_device:
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._direct = self.is_device and _set_direct(self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._check_range(offset, len(buffer))
        if self._direct and (offset | len(buffer)) % self.logical_sector:
            buffer[:] = self.pread(offset, len(buffer))
            return
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"{self.path} ends early at byte {offset + done}")
            done += count

    def pread(self, offset: int, length: int) -> bytes:
        self._check_range(offset, length)
        if length == 0:
            return b""
        unit = self.logical_sector if self._direct else 1
        start = offset // unit * unit
        stop = min(-(-(offset + length) // unit) * unit, self.size)
        with aligned_buffer(stop - start) as buffer:
            self.read_into(start, buffer)
            return bytes(buffer[offset - start : offset - start + length])

    def data_extents(self) -> Extents:
        if self.is_device:
            return Extents.whole(self.size)
        return Extents.from_sorted(_data_segments(self._fd, self.size))

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise SourceError(
                f"read outside of {self.path}: {length} bytes at byte {offset}, "
                f"of a size of {self.size}"
            )


class PartSource:
    """A window of another source, for instance one partition. Does not own its parent."""

    def __init__(self, parent: BlockSource, offset: int, length: int) -> None:
        """``offset`` and ``length`` in bytes; raises SourceError outside of the parent."""
        if offset < 0 or length < 0 or offset + length > parent.size:
            raise SourceError(
                f"{parent.path} has {parent.size} bytes: no part of {length} bytes at {offset}"
            )
        self.parent = parent
        self.offset = offset
        self.size = length
        self.path = f"{parent.path}+{offset}" if offset else parent.path
        self.logical_sector = parent.logical_sector
        self.physical_sector = parent.physical_sector
        self.is_device = parent.is_device

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._check_range(offset, len(buffer))
        self.parent.read_into(self.offset + offset, buffer)

    def pread(self, offset: int, length: int) -> bytes:
        self._check_range(offset, length)
        return self.parent.pread(self.offset + offset, length)

    def data_extents(self) -> Extents:
        return self.parent.data_extents().clip(self.offset, self.size).shift(-self.offset)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise SourceError(
                f"read outside of {self.path}: {length} bytes at byte {offset}, "
                f"of a size of {self.size}"
            )


class aligned_buffer:
    """A page-aligned, zeroed buffer of ``length`` bytes for O_DIRECT, as a context manager."""

    def __init__(self, length: int) -> None:
        self._map = mmap.mmap(-1, max(length, 1))
        self._view = memoryview(self._map)
        self._part = self._view[:length]

    def __enter__(self) -> memoryview:
        return self._part

    def __exit__(self, *_: object) -> None:
        self._part.release()
        self._view.release()
        self._map.close()


def _open_source(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        hint = "run as root to read a disk" if error.errno == errno.EACCES else None
        raise SourceError(f"cannot open {path}: {error.strerror}", hint=hint) from None


def _is_block_device(fd: int, path: str) -> bool:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        raise SourceError(
            f"{path} is neither a block device nor a regular file",
            hint="name a disk (/dev/sda), a partition (/dev/sda1) or a raw image file",
        )
    return stat.S_ISBLK(mode)


def _size(fd: int, is_device: bool) -> int:
    if not is_device:
        return os.fstat(fd).st_size
    answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
    return int(struct.unpack("=Q", answer)[0])


def _sectors(fd: int, is_device: bool) -> tuple[int, int]:
    """Logical and physical sector size in bytes; files count as 512-byte disks."""
    if not is_device:
        return 512, 512
    logical, physical = (
        int(struct.unpack("=i", fcntl.ioctl(fd, request, bytes(4)))[0])
        for request in (_BLKSSZGET, _BLKPBSZGET)
    )
    return logical, physical


def _set_direct(fd: int) -> bool:
    """Turn on O_DIRECT; False where the device does not do it (some FUSE and network ones)."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return False
    return True


def _data_segments(fd: int, size: int) -> Iterator[Extent]:
    """Data segments by SEEK_DATA/SEEK_HOLE (lseek(2)); the whole file where unsupported."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind this offset
                return
            start, at = at, size
        yield Extent(start, at - start)
