"""Inodes, and where their forks' blocks lie."""

from __future__ import annotations

import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from imager.allocation.model import require
from imager.allocation.xfs.layout import Superblock
from imager.blocksource import BlockSource
from imager.files.model import Entry

DEVICE, LOCAL, EXTENTS, BTREE = 0, 1, 2, 3
"""How a fork is kept."""

_NEW_LITERAL, _OLD_LITERAL = 176, 100
_BIGTIME, _MANY_EXTENTS = 0x8, 0x10
_BIGTIME_OFFSET_NS = (1 << 31) * 1_000_000_000

# magic mode version format onlink uid gid nlink projid(2), 8 bytes with flushiter or the count of
# extents, atime mtime ctime, size blocks extsize nextents anextents forkoff aformat; to 84 bytes
_CORE = struct.Struct(">2sHBBHIIIHH8s8s8s8sQQIIHBB")

_MAX_LEVELS = 9
_READ_AT_ONCE = 64 << 10  # bytes of neighbouring inodes
_KEPT_CHUNKS = 256


class Run(NamedTuple):
    """``length`` blocks of a fork from ``logical``; ``start`` as a block address."""

    logical: int
    start: int
    length: int
    is_written: bool


@dataclass(frozen=True)
class Fork:
    format: int
    raw: bytes
    count: int
    """Of extents, when they are in ``raw``."""


@dataclass(frozen=True)
class Inode:
    entry: Entry
    data: Fork
    attributes: Fork | None


class Volume:
    """Blocks and inodes of the filesystem."""

    def __init__(self, source: BlockSource, superblock: Superblock, raw: bytes) -> None:
        self._source = source
        self.superblock = superblock
        self.block_size = superblock.block_size
        (self.root,) = struct.unpack_from(">Q", raw, 56)
        (self._inode_size, self._inodes_per_block) = struct.unpack_from(">HH", raw, 104)
        self._inode_log = raw[123]
        self.folder_blocks = 1 << raw[192]
        """Blocks of a folder's block."""
        self.is_new = superblock.has_checksums
        features = superblock.incompat & 1 if self.is_new else superblock.features2 & 0x200
        self.has_kinds = bool(features)
        """Whether folders have each entry's kind beside its name."""
        require(
            256 <= self._inode_size <= 2048
            and self._inodes_per_block == self.block_size // self._inode_size
            and 1 << self._inode_log == self._inodes_per_block
            and raw[192] + superblock.block_log <= 16,
            "impossible sizes of inodes or folders",
        )
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def read(self, start: int, count: int = 1) -> bytes:
        """Blocks by address: the allocation group in the high bits."""
        at = self._place(start, count)
        return self._source.pread(at, count * self.block_size)

    def _place(self, start: int, count: int) -> int:
        group, block = divmod(start, 1 << self.superblock.group_log)
        require(
            group < self.superblock.group_count
            and 0 < count <= self.superblock.blocks_in(group) - block,
            f"{count} blocks at {start} are not inside of the filesystem",
        )
        return self.superblock.group_start(group) + block * self.block_size

    # --- inodes -------------------------------------------------------------------------------

    def inode(self, number: int, name: str) -> Inode:
        """Raises NotRecognized for what is none in use."""
        raw = self._inode_bytes(number)
        fields = _CORE.unpack_from(raw)
        magic, mode, version, format, old_links, uid, gid, links, _, _, wide = fields[:11]
        atime, mtime, ctime, size, _, _, extents, more_extents, offset, more_format = fields[11:]
        require(
            magic == b"IN" and mode != 0 and version in (1, 2, 3) and format <= BTREE,
            f"there is no inode {number}",
        )
        flags, literal = 0, _OLD_LITERAL
        if version == 3:
            (flags,) = struct.unpack_from(">Q", raw, 120)
            (own,) = struct.unpack_from(">Q", raw, 152)
            require(own == number, f"inode {number} says that it is {own}")
            literal = _NEW_LITERAL
        if flags & _MANY_EXTENTS:
            more_extents = extents
            (extents,) = struct.unpack(">Q", wide)
        split = literal + offset * 8 if offset else len(raw)
        require(split <= len(raw), f"the forks of inode {number} are larger than it")
        data = Fork(format, raw[literal:split], extents)
        entry = Entry(
            name,
            (0, number),
            mode,
            uid,
            gid,
            size,
            old_links if version == 1 else links,
            _time(atime, flags),
            _time(mtime, flags),
            _time(ctime, flags),
            _device(data.raw) if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
        )
        more = Fork(more_format, raw[split:], more_extents) if offset else None
        return Inode(entry, data, more)

    def _inode_bytes(self, number: int) -> bytes:
        block, slot = divmod(number, self._inodes_per_block)
        at = self._place(block, 1)
        chunk = at // _READ_AT_ONCE
        kept = self._kept.get(chunk)
        if kept is None:
            start = chunk * _READ_AT_ONCE
            length = min(_READ_AT_ONCE, self._source.size - start)
            kept = self._kept[chunk] = self._source.pread(start, length)
            if len(self._kept) > _KEPT_CHUNKS:
                self._kept.popitem(last=False)
        offset = at % _READ_AT_ONCE + slot * self._inode_size
        return kept[offset : offset + self._inode_size]

    # --- forks --------------------------------------------------------------------------------

    def runs(self, fork: Fork) -> Iterator[Run]:
        """Ascending; what is unwritten too. Raises NotRecognized."""
        at = 0
        records = (
            _records(fork.raw, 0, fork.count)
            if fork.format == EXTENTS
            else self._tree(fork.raw, None)
        )
        for run in records:
            require(run.logical >= at and run.length > 0, "extents that are not in order")
            at = run.logical + run.length
            yield run

    def _tree(self, node: bytes, level: int | None) -> Iterator[Run]:
        """From the root in the inode, a shorter form, down to the leaves."""
        if level is None:
            own_level, count = struct.unpack_from(">HH", node)
            start, most = 4, (len(node) - 4) // 16
            require(0 < own_level <= _MAX_LEVELS and 0 < count <= most, "a damaged extent tree")
        else:
            magic, own_level, count = struct.unpack_from(">4sHH", node)
            start = 72 if self.is_new else 24
            most = (len(node) - start) // 16
            require(
                magic == (b"BMA3" if self.is_new else b"BMAP")
                and own_level == level
                and count <= most,
                "a damaged extent tree",
            )
        if own_level == 0:
            yield from _records(node, start, count)
            return
        for n in range(count):
            (child,) = struct.unpack_from(">Q", node, start + 8 * most + 8 * n)
            yield from self._tree(self.read(child), own_level - 1)


def _records(raw: bytes, start: int, count: int) -> Iterator[Run]:
    """128 bits: unwritten 1, logical 54, start 52, count 21."""
    require(start + 16 * count <= len(raw), "more extents than fit")
    for at in range(start, start + 16 * count, 16):
        high, low = struct.unpack_from(">QQ", raw, at)
        yield Run(
            (high & ((1 << 63) - 1)) >> 9,
            (high & 0x1FF) << 43 | low >> 21,
            low & 0x1FFFFF,
            not high >> 63,
        )


def _time(raw: bytes, flags: int) -> int:
    if flags & _BIGTIME:
        return int.from_bytes(raw, "big") - _BIGTIME_OFFSET_NS
    seconds, nanoseconds = struct.unpack(">ii", raw)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def _device(raw: bytes) -> int:
    """As System V had it: 14 and 18 bits (linux/kdev_t.h)."""
    (number,) = struct.unpack_from(">I", raw)
    return os.makedev(number >> 18 & 0x3FFF, number & 0x3FFFF)
