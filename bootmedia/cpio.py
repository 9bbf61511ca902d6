"""Layers of an initramfs: a tree of files, written as a cpio archive in the kernel's format.

The format "newc" and how archives follow one another: Linux
Documentation/driver-api/early-userspace/buffer-format.rst and init/initramfs.c.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import zstandard

from imager.errors import ImagerError, SourceError, UsageError

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
MAX_NAME_BYTES = 4096
"""With the closing zero: the kernel's PATH_MAX."""

_LARGEST = 0xFFFF_FFFF  # eight hex digits

# The kernel reserves a window of this size (2^n bytes) while it unpacks: less than 128 MiB.
_WINDOW_LOG = 23
# zstd's output depends on how the input is cut into jobs, not on the number of workers.
_JOB_BYTES = 8 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Folder:
    path: str
    mode: int = 0o755


@dataclass(frozen=True)
class File:
    """``content`` is the file's bytes, or the place where they are when the layer is written."""

    path: str
    mode: int
    content: bytes | Path


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    path: str
    target: str


@dataclass(frozen=True)
class Node:
    """A device; ``mode`` includes its type, S_IFCHR or S_IFBLK."""

    path: str
    mode: int
    major: int
    minor: int


Entry = Folder | File | Link | Node


class Tree:
    """Entries by path, relative to the root; each has its parents.

    A path holds one thing: adding the same again is fine, something else is refused.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._implied: set[str] = set()

    def add(self, entry: Entry) -> None:
        """Raises ImagerError when the path, or a parent of it, is another thing already."""
        path = _relative(entry.path)
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            self._add_parent(str(parent))
        known = self._entries.get(path)
        entry = replace(entry, path=path)
        if known is not None and known != entry and path not in self._implied:
            raise ImagerError(f"two different things at /{path}: {known} and {entry}")
        if path in self._implied and not isinstance(entry, Folder):
            raise ImagerError(f"/{path} is a folder already, and can't be {entry}")
        self._implied.discard(path)
        self._entries[path] = entry

    def _add_parent(self, path: str) -> None:
        known = self._entries.get(path)
        if known is None:
            self._entries[path] = Folder(path)
            self._implied.add(path)
        elif not isinstance(known, Folder):
            raise ImagerError(f"/{path} is not a folder but {known}")

    def get(self, path: str) -> Entry | None:
        return self._entries.get(_relative(path))

    def __contains__(self, path: str) -> bool:
        return _relative(path) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Parents first, else in order of names."""
        for path in sorted(self._entries, key=lambda path: path.split("/")):
            yield self._entries[path]


def _relative(path: str) -> str:
    parts = PurePosixPath(path).parts
    if parts and parts[0] == "/":
        parts = parts[1:]
    if not parts or ".." in parts or "\0" in path:
        raise UsageError(f"{path!r} is no path of a file below the root")
    relative = "/".join(parts)
    if len(os.fsencode(relative)) >= MAX_NAME_BYTES or relative == TRAILER:
        raise UsageError(f"an initramfs can't hold the name {relative[:80]!r}")
    return relative


# --- writing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerInfo:
    """``size`` of the compressed file and ``unpacked_size`` of the archive within, in bytes."""

    size: int
    unpacked_size: int
    sha256: str


def write_layer(tree: Tree, path: Path, *, level: int = 6, sentinel: str, epoch: int) -> LayerInfo:
    """Write a zstd compressed archive that ends with the empty file ``sentinel/SENTINEL``.

    The same tree gives the same bytes, with any number of processors. All files belong to root
    and have the time ``epoch`` (seconds since 1970). ``level`` is zstd's, 1 to 22.
    Raises SourceError when a file can't be read as it was.
    """
    with path.open("wb") as file:
        output = _Compressed(file, level)
        archive = _Archive(output, epoch)
        for entry in tree:
            archive.add(entry)
        archive.finish(sentinel, known=tree)
        output.finish()
    return LayerInfo(output.size, archive.size, output.hash.hexdigest())


def _compressor(level: int) -> zstandard.ZstdCompressor:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        window_log=_WINDOW_LOG,
        threads=os.cpu_count() or 1,
        job_size=_JOB_BYTES,
        write_checksum=True,
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


class _Compressed:
    """Compresses into a file; counts and hashes what comes out."""

    def __init__(self, file: BinaryIO, level: int) -> None:
        self._file = file
        self._compressor = _compressor(level).compressobj()
        self.size = 0
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._put(self._compressor.compress(data))

    def finish(self) -> None:
        self._put(self._compressor.flush())

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)
        self.hash.update(data)


class _Archive:
    """A cpio archive, written member by member; ``size`` in bytes so far."""

    def __init__(self, output: _Compressed, epoch: int) -> None:
        self._output = output
        self._epoch = min(max(epoch, 0), _LARGEST)
        self._inode = 0
        self.size = 0

    def add(self, entry: Entry) -> None:
        match entry:
            case Folder(path, mode):
                self._header(path, stat.S_IFDIR | mode, links=2)
            case Link(path, target):
                raw = os.fsencode(target)
                self._header(path, stat.S_IFLNK | 0o777, size=len(raw))
                self._content(raw)
            case Node(path, mode, major, minor):
                self._header(path, mode, device=(major, minor))
            case File(path, mode, bytes() as content):
                self._header(path, stat.S_IFREG | mode, size=len(content))
                self._content(content)
            case File(path, mode, Path() as source):
                self._copy(path, stat.S_IFREG | mode, source)

    def finish(self, sentinel: str, *, known: Tree) -> None:
        if "sentinel" not in known:
            self.add(Folder("sentinel"))
        self.add(File(f"sentinel/{sentinel}", 0o444, b""))
        self._inode = -1  # so that the trailer has 0
        self._header(TRAILER, 0)

    def _header(
        self,
        path: str,
        mode: int,
        *,
        size: int = 0,
        links: int = 1,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        if size > _LARGEST:
            raise SourceError(f"/{path}: {size} bytes are more than an initramfs can hold")
        self._inode += 1
        name = os.fsencode(path) + b"\0"
        owner = group = check = 0
        on_device = (0, 0)
        known = (self._inode, mode, owner, group, links, self._epoch, size)
        fields = (*known, *on_device, *device, len(name), check)
        self._write(MAGIC + b"".join(b"%08X" % value for value in fields) + name)
        self._align()

    def _content(self, content: bytes) -> None:
        self._write(content)
        self._align()

    def _copy(self, path: str, mode: int, source: Path) -> None:
        try:
            with source.open("rb") as file:
                size = left = os.fstat(file.fileno()).st_size
                self._header(path, mode, size=size)
                while left and (chunk := file.read(min(left, _CHUNK))):
                    self._write(chunk)
                    left -= len(chunk)
                changed = left > 0 or file.read(1) != b""
        except OSError as error:
            raise SourceError(f"can't read {source}: {error.strerror}") from None
        if changed:
            raise SourceError(f"{source} changed while it was read", hint="try again")
        self._align()

    def _align(self) -> None:
        self._write(bytes(-self.size % 4))

    def _write(self, data: bytes) -> None:
        self._output.write(data)
        self.size += len(data)
