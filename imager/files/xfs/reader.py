"""All that the kernel's driver shows of a clean XFS."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping

from imager.allocation.model import require
from imager.allocation.xfs.layout import SMALLEST_SECTOR, Superblock
from imager.allocation.xfs.log import Log
from imager.blocksource import BlockSource
from imager.errors import UnsupportedError
from imager.files.model import PIECE_BYTES, Entry, Piece
from imager.files.xfs.attributes import attributes
from imager.files.xfs.folders import names
from imager.files.xfs.inode import LOCAL, Inode, Volume

_LINK_HEADER = 56
_MAX_LINK = 1024  # bytes
_MAX_LINK_BLOCKS = 4  # of 512 bytes, with a header


class XfsReader:
    """A ``Reader``."""

    notes: tuple[str, ...] = ()

    def __init__(self, source: BlockSource) -> None:
        """Raises UnsupportedError when its log is in use, NotRecognized, OSError."""
        raw = source.pread(0, SMALLEST_SECTOR)
        superblock = Superblock.parse(raw)
        superblock.check(source.size)
        if not Log(source, superblock).is_clean:
            raise UnsupportedError("its log is in use: only the kernel can recover it")
        self._volume = Volume(source, superblock, raw)

    def top(self) -> Entry:
        return self._volume.inode(self._volume.root, "").entry

    def entries(self, folder: Entry) -> Iterator[Entry]:
        for number, name in self._names(folder):
            yield self._volume.inode(number, os.fsdecode(name)).entry

    def names(self, folder: Entry) -> Iterator[str]:
        return (os.fsdecode(name) for _, name in self._names(folder))

    def find(self, folder: Entry, name: str) -> Entry | None:
        wanted = os.fsencode(name)
        for number, found in self._names(folder):
            if found == wanted:
                return self._volume.inode(number, name).entry
        return None

    def target(self, link: Entry) -> str:
        inode = self._again(link)
        require(0 < link.size <= _MAX_LINK, "a symbolic link of an impossible length")
        if inode.data.format == LOCAL:
            return os.fsdecode(inode.data.raw[: link.size])
        content = bytearray()
        for run in self._volume.runs(inode.data):
            blocks = min(run.length, _MAX_LINK_BLOCKS)
            content += self._link_part(self._volume.read(run.start, blocks), len(content))
        require(len(content) >= link.size, "a symbolic link that is cut off")
        return os.fsdecode(bytes(content[: link.size]))

    def attributes(self, entry: Entry) -> Mapping[str, bytes]:
        return attributes(self._volume, self._again(entry))

    def pieces(self, file: Entry) -> Iterator[Piece]:
        inode = self._again(file)
        if inode.data.format == LOCAL:
            yield Piece(0, inode.data.raw[: file.size])
            return
        size = self._volume.block_size
        most = PIECE_BYTES // size
        for run in self._volume.runs(inode.data):
            for first in range(0, run.length if run.is_written else 0, most):
                offset = (run.logical + first) * size
                if offset >= file.size:  # allocated beforehand
                    return
                blocks = min(most, run.length - first, -(-(file.size - offset) // size))
                raw = self._volume.read(run.start + first, blocks)
                yield Piece(offset, raw[: file.size - offset])

    def _names(self, folder: Entry) -> Iterator[tuple[int, bytes]]:
        inode = self._again(folder)
        require(inode.entry.is_folder, "no folder")
        return names(self._volume, inode)

    def _again(self, entry: Entry) -> Inode:
        return self._volume.inode(entry.number[1], entry.name)

    def _link_part(self, extent: bytes, done: int) -> bytes:
        """Each extent, not each block, begins with a header."""
        if not self._volume.is_new:
            return extent
        magic, offset, count = struct.unpack_from(">4sII", extent)
        require(magic == b"XSLM" and offset == done, "a damaged symbolic link")
        return extent[_LINK_HEADER : _LINK_HEADER + count]
