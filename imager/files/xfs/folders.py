"""What is in a folder. The index of hashes behind the names is not needed to list them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imager.allocation.model import require
from imager.files.xfs.inode import LOCAL, Inode, Volume

# Where the index begins in a folder's address space (XFS_DIR2_LEAF_OFFSET); names are below.
_INDEX_START = 32 << 30  # bytes

_UNUSED = 0xFFFF


def names(volume: Volume, folder: Inode) -> Iterator[tuple[int, bytes]]:
    """Inode and name, without ``.`` and ``..``. Raises NotRecognized."""
    if folder.data.format == LOCAL:
        yield from _short(folder.data.raw[: folder.entry.size], volume.has_kinds)
        return
    for block in _blocks(volume, folder):
        for number, name in _entries(volume, block):
            if name not in (b".", b".."):
                yield number, name


def _short(raw: bytes, has_kinds: bool) -> Iterator[tuple[int, bytes]]:
    """The form that fits into an inode: a header with the parent, then the entries."""
    require(len(raw) >= 6, "a damaged folder")
    count, wide = raw[0], 8 if raw[1] else 4
    at = 2 + wide
    for _ in range(raw[1] or count):
        require(at < len(raw), "a damaged folder")
        length = raw[at]
        name = raw[at + 3 : at + 3 + length]
        at += 3 + length + has_kinds
        require(length > 0 and at + wide <= len(raw), "a damaged folder")
        yield int.from_bytes(raw[at : at + wide], "big"), name
        at += wide


def _blocks(volume: Volume, folder: Inode) -> Iterator[bytes]:
    """The folder's blocks with names; each may lie in several pieces."""
    unit, size = volume.folder_blocks, volume.block_size
    end = _INDEX_START // size
    pending: list[bytes] = []
    for run in volume.runs(folder.data):
        if run.logical >= end:
            break
        require(run.is_written, "a folder with unwritten blocks")
        for n in range(run.length):
            require((run.logical + n) % unit == len(pending), "a folder with holes in its blocks")
            pending.append(volume.read(run.start + n))
            if len(pending) == unit:
                yield b"".join(pending)
                pending = []
    require(not pending, "a folder that is cut off")


def _entries(volume: Volume, block: bytes) -> Iterator[tuple[int, bytes]]:
    magic = block[:4]
    at, end = (64 if volume.is_new else 16), len(block)
    if magic in (b"XD2B", b"XDB3"):  # the only block: its index is at its end
        (count,) = struct.unpack_from(">I", block, end - 8)
        end -= 8 + 8 * count
    else:
        require(magic in (b"XD2D", b"XDD3"), "a damaged folder")
    require(at <= end, "a damaged folder")
    while at + 8 <= end:
        tag, length = struct.unpack_from(">HH", block, at)
        if tag == _UNUSED:
            require(length >= 8 and length % 8 == 0, "a damaged folder")
            at += length
            continue
        (number,) = struct.unpack_from(">Q", block, at)
        length = block[at + 8]
        name = block[at + 9 : at + 9 + length]
        require(length > 0 and b"/" not in name, "a damaged folder")
        at += (8 + 1 + length + volume.has_kinds + 2 + 7) // 8 * 8
        require(at <= end, "a damaged folder")
        yield number, name
