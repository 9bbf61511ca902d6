"""Reads ext2, ext3 and ext4: all that their kernel driver shows, journals in use too.

Source: Linux Documentation/filesystems/ext4/ (inodes, ifork, directory, attributes, inlinedata)
and fs/ext4/. All integers little-endian. A journal in use is replayed in memory, as for the
allocation map. Checksums are left to the image's own: what is read is what was on the disk.
"""

from __future__ import annotations

import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

from imager.allocation.ext.allocated import journal_overlay
from imager.allocation.ext.blocks import NOTHING, Blocks
from imager.allocation.ext.layout import (
    STATE_ERROR,
    STATE_VALID,
    SUPERBLOCK_OFFSET,
    SUPERBLOCK_SIZE,
    Superblock,
)
from imager.allocation.model import require
from imager.blocksource import BlockSource
from imager.errors import NotRecognized, UnsupportedError
from imager.files.model import PIECE_BYTES, Entry, Piece, acl_attribute

_ROOT_INODE = 2

_FLAG_ENCRYPTED, _FLAG_EXTENTS, _FLAG_INLINE = 0x800, 0x80000, 0x10000000

_EXTENT_MAGIC = 0xF30A
_MAX_DEPTH = 5
_MAX_WRITTEN = 32768  # longer extents are allocated, and read as zeros

_ATTRIBUTE_MAGIC = 0xEA020000
_NAMESPACES = {1: "user.", 4: "trusted.", 6: "security.", 7: "system."}
_ACLS = {2: "system.posix_acl_access", 3: "system.posix_acl_default"}
_SYSTEM = 7
_INLINE_NAME = b"data"  # the rest of inline content, in the system namespace

# mode uid size atime ctime mtime dtime gid links blocks flags osd1 block generation acl size_high
# faddr blocks_high acl_high uid_high gid_high checksum; to 128 bytes
_INODE = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHH")
# extra size, checksum, then the extra bits of ctime, mtime, atime
_EXTRA = struct.Struct("<HHIII")

_KEPT_BLOCKS = 4096
_READ_AT_ONCE = 16  # neighbouring blocks of an inode table


class _Inode(NamedTuple):
    entry: Entry
    flags: int
    block: bytes
    acl: int
    """The block with more attributes, or 0."""
    raw: bytes


class _Run(NamedTuple):
    """``length`` blocks of a file from ``logical``."""

    logical: int
    physical: int
    length: int


class ExtReader:
    """A ``Reader``."""

    def __init__(self, source: BlockSource) -> None:
        """Raises NotRecognized, UnsupportedError or OSError when it can't be read rightly."""
        self._superblock = Superblock.parse(source.pread(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE))
        self._superblock.check(source.size)
        self._blocks = Blocks(source, self._superblock)
        notes = []
        if self._superblock.needs_recovery:
            self._blocks = _replayed(source, self._superblock, self._blocks)
            notes.append("its journal was in use; it is replayed in memory")
        elif self._superblock.state & STATE_ERROR:
            notes.append("it is marked as having errors")
        elif not self._superblock.state & STATE_VALID:
            notes.append("it was in use or not unmounted cleanly")
        self.notes = tuple(notes)
        self._size = self._superblock.block_size
        self._tables: dict[int, int] = {}
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def top(self) -> Entry:
        return self._inode(_ROOT_INODE, "").entry

    def entries(self, folder: Entry) -> Iterator[Entry]:
        for number, name in self._names(folder):
            yield self._inode(number, os.fsdecode(name)).entry

    def names(self, folder: Entry) -> Iterator[str]:
        return (os.fsdecode(name) for _, name in self._names(folder))

    def find(self, folder: Entry, name: str) -> Entry | None:
        wanted = os.fsencode(name)
        for number, found in self._names(folder):
            if found == wanted:
                return self._inode(number, name).entry
        return None

    def target(self, link: Entry) -> str:
        inode = self._again(link)
        self._refuse_encrypted(inode)
        require(0 < link.size <= 4096, "a symbolic link of an impossible length")
        if link.size < 60 and not inode.flags & (_FLAG_EXTENTS | _FLAG_INLINE):
            return os.fsdecode(inode.block[: link.size])
        content = bytearray(link.size)
        for offset, piece in self._content(inode):
            content[offset : offset + len(piece)] = piece
        return os.fsdecode(bytes(content))

    def attributes(self, entry: Entry) -> Mapping[str, bytes]:
        found: dict[str, bytes] = {}
        for index, name, value in self._attributes(self._again(entry)):
            if index in _ACLS:
                found[_ACLS[index]] = _acl(value)
            elif index in _NAMESPACES and (index, name) != (_SYSTEM, _INLINE_NAME):
                found[_NAMESPACES[index] + os.fsdecode(name)] = value
        return found

    def pieces(self, file: Entry) -> Iterator[Piece]:
        inode = self._again(file)
        self._refuse_encrypted(inode)
        yield from self._content(inode)

    # --- inodes -------------------------------------------------------------------------------

    def _again(self, entry: Entry) -> _Inode:
        return self._inode(entry.number[1], entry.name)

    def _inode(self, number: int, name: str) -> _Inode:
        superblock = self._superblock
        if not 0 < number <= superblock.inodes_count:
            raise NotRecognized(f"no inode {number}")
        group, position = divmod(number - 1, superblock.inodes_per_group)
        block, offset = divmod(position * superblock.inode_size, self._size)
        last = superblock.inode_table_blocks
        raw = self._table_block(self._table(group), block, last)
        raw = raw[offset : offset + superblock.inode_size]
        mode, uid, size, atime, ctime, mtime, _, gid, links, _, flags, _, content, *high = (
            _INODE.unpack_from(raw)
        )
        _, acl, size_high, _, _, acl_high, uid_high, gid_high, _, _ = high
        extra = (0, 0, 0)
        if len(raw) > 128:
            extra_size, _, *more = _EXTRA.unpack_from(raw, 128)
            # ctime, mtime and atime at 132, 136 and 140
            extra = tuple(  # type: ignore[assignment]
                bits if extra_size >= 8 + 4 * n else 0 for n, bits in enumerate(more)
            )
        kind = mode & 0xF000
        if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            size |= size_high << 32
        rdev = _device(content) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        entry = Entry(
            name,
            (0, number),
            mode,
            uid | uid_high << 16,
            gid | gid_high << 16,
            size,
            links,
            _time(atime, extra[2]),
            _time(mtime, extra[1]),
            _time(ctime, extra[0]),
            rdev,
        )
        return _Inode(entry, flags, content, acl | acl_high << 32, raw)

    def _table(self, group: int) -> int:
        """The first block of a group's inode table."""
        found = self._tables.get(group)
        if found is None:
            superblock = self._superblock
            index, slot = divmod(group, superblock.descriptors_per_block)
            descriptors = self._blocks.read(superblock.descriptor_block(index))
            at = slot * superblock.descriptor_size
            raw = descriptors[at : at + superblock.descriptor_size]
            found = self._tables[group] = superblock.group(group, raw).inode_table
        return found

    def _table_block(self, table: int, block: int, count: int) -> bytes:
        """One of an inode table's blocks; its neighbours are likely to be wanted too."""
        found = self._kept.get(table + block)
        if found is None:
            first = block // _READ_AT_ONCE * _READ_AT_ONCE
            blocks = min(_READ_AT_ONCE, count - first)
            raw = self._blocks.read(table + first, blocks)
            for n in range(blocks):
                self._kept[table + first + n] = raw[n * self._size : (n + 1) * self._size]
            found = self._kept[table + block]
            while len(self._kept) > _KEPT_BLOCKS:
                self._kept.popitem(last=False)
        return found

    def _refuse_encrypted(self, inode: _Inode) -> None:
        if inode.flags & _FLAG_ENCRYPTED:
            raise UnsupportedError("it is encrypted (fscrypt): the key is not in the image")

    # --- folders ------------------------------------------------------------------------------

    def _names(self, folder: Entry) -> Iterator[tuple[int, bytes]]:
        """An index of hashes hides in entries without an inode, so a plain walk finds all."""
        inode = self._again(folder)
        require(inode.entry.is_folder, "no folder")
        self._refuse_encrypted(inode)
        if inode.flags & _FLAG_INLINE:
            yield from _records(inode.block[4:], self._size)
            yield from _records(self._inline_rest(inode), self._size)
            return
        for run in self._runs(inode):
            for first in range(0, run.length, _READ_AT_ONCE):
                count = min(_READ_AT_ONCE, run.length - first)
                raw = self._blocks.read(run.physical + first, count)
                for at in range(0, len(raw), self._size):
                    yield from _records(raw[at : at + self._size], self._size)

    # --- content ------------------------------------------------------------------------------

    def _content(self, inode: _Inode) -> Iterator[Piece]:
        size = inode.entry.size
        if inode.flags & _FLAG_INLINE:
            yield Piece(0, (inode.block + self._inline_rest(inode))[:size])
            return
        most = max(PIECE_BYTES // self._size, 1)
        for run in self._runs(inode):
            for first in range(0, run.length, most):
                offset = (run.logical + first) * self._size
                if offset >= size:  # allocated beforehand, behind the file's end
                    return
                raw = self._blocks.read(run.physical + first, min(most, run.length - first))
                yield Piece(offset, raw[: size - offset])

    def _inline_rest(self, inode: _Inode) -> bytes:
        for index, name, value in self._attributes(inode):
            if (index, name) == (_SYSTEM, _INLINE_NAME):
                return value
        return b""

    def _runs(self, inode: _Inode) -> Iterator[_Run]:
        """Where a file's written blocks lie, ascending up to its size."""
        blocks = -(-inode.entry.size // self._size)
        mapped = (
            self._extents(inode.block, None)
            if inode.flags & _FLAG_EXTENTS
            else _joined(self._pointed(inode.block, blocks))
        )
        at = 0
        for run in mapped:
            if run.logical < at or run.length <= 0:
                raise NotRecognized("the extents of a file are not in order")
            at = run.logical + run.length
            if run.logical >= blocks:
                return
            yield run._replace(length=min(run.length, blocks - run.logical))

    def _extents(self, node: bytes, depth: int | None) -> Iterator[_Run]:
        magic, count, most, own_depth = struct.unpack_from("<4H", node)
        require(
            magic == _EXTENT_MAGIC
            and own_depth == (own_depth if depth is None else depth)
            and own_depth <= _MAX_DEPTH
            and count <= most <= (len(node) - 12) // 12,
            "a damaged extent tree",
        )
        for at in range(12, 12 + 12 * count, 12):
            if own_depth == 0:
                logical, length, high, low = struct.unpack_from("<IHHI", node, at)
                if length <= _MAX_WRITTEN:
                    yield _Run(logical, low | high << 32, length)
            else:
                _, low, high = struct.unpack_from("<IIH", node, at)
                yield from self._extents(self._blocks.read(low | high << 32), own_depth - 1)

    def _pointed(self, root: bytes, blocks: int) -> Iterator[tuple[int, int]]:
        """(logical, physical) of the blocks that pointers name: twelve direct ones, then trees."""
        pointers = struct.unpack("<15I", root)
        yield from ((n, pointer) for n, pointer in enumerate(pointers[:12]) if pointer)
        first, fan = 12, self._size // 4
        for level, pointer in enumerate(pointers[12:], start=1):
            if first >= blocks:
                return
            yield from self._below(pointer, level, first, blocks)
            first += fan**level

    def _below(self, pointer: int, level: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        if pointer == 0 or first >= end:
            return
        if level == 0:
            yield first, pointer
            return
        step = (self._size // 4) ** (level - 1)
        for n, (child,) in enumerate(struct.iter_unpack("<I", self._blocks.read(pointer))):
            if child:
                yield from self._below(child, level - 1, first + n * step, end)

    # --- attributes ---------------------------------------------------------------------------

    def _attributes(self, inode: _Inode) -> Iterator[tuple[int, bytes, bytes]]:
        """Namespace, name and value; first those in the inode, then those of its block."""
        raw = inode.raw
        if len(raw) > 128:
            start = 128 + int.from_bytes(raw[128:130], "little")
            if start + 4 <= len(raw) and raw[start : start + 4] == self._attribute_magic:
                yield from self._attribute_list(raw[start + 4 :], 0)
        if inode.acl:
            block = self._blocks.read(inode.acl)
            require(block[:4] == self._attribute_magic, "a damaged block of attributes")
            yield from self._attribute_list(block, 32)

    @cached_property
    def _attribute_magic(self) -> bytes:
        return _ATTRIBUTE_MAGIC.to_bytes(4, "little")

    def _attribute_list(self, raw: bytes, at: int) -> Iterator[tuple[int, bytes, bytes]]:
        """Values lie at offsets from the start of ``raw``, its entries from ``at`` on."""
        while at + 16 <= len(raw) and raw[at : at + 4] != bytes(4):
            length, index, offset, inode, size = struct.unpack_from("<BBHII", raw, at)
            name = raw[at + 16 : at + 16 + length]
            at += 16 + (length + 3) // 4 * 4
            if inode:
                value = self._value_inode(inode, size)
            else:
                require(offset + size <= len(raw), "an attribute outside of its block")
                value = raw[offset : offset + size]
            yield index, name, value

    def _value_inode(self, number: int, size: int) -> bytes:
        """A large value in an inode of its own (feature ea_inode)."""
        inode = self._inode(number, "")
        require(inode.entry.size == size <= 1 << 20, "an attribute of another size")
        content = bytearray(size)
        for offset, piece in self._content(inode):
            content[offset : offset + len(piece)] = piece
        return bytes(content)


def _replayed(source: BlockSource, superblock: Superblock, blocks: Blocks) -> Blocks:
    """With the journal laid over them. Raises UnsupportedError when it can't be."""
    try:
        overlay = journal_overlay(blocks, superblock)
    except (NotRecognized, UnsupportedError) as doubt:
        raise UnsupportedError(
            f"its journal can't be replayed in memory: {doubt.message}"
        ) from None
    return blocks if overlay is NOTHING else Blocks(source, superblock, overlay)


def _records(raw: bytes, block_size: int) -> Iterator[tuple[int, bytes]]:
    """Inode and name of the entries in one block of a folder, without ``.`` and ``..``."""
    at, end = 0, len(raw)
    while at + 8 <= end:
        number, length, name_length = struct.unpack_from("<IHB", raw, at)
        if length in (0, 0xFFFF) and block_size == 1 << 16:
            length = 1 << 16
        if number:
            name = raw[at + 8 : at + 8 + name_length]
            if name_length + 8 > length or at + length > end or not name or b"/" in name:
                raise NotRecognized("a damaged folder")
            if name not in (b".", b".."):
                yield number, name
        if length < 8:
            if number == 0 and not any(raw[at:]):  # inline folders end with nothing
                return
            raise NotRecognized("a damaged folder")
        at += length


def _joined(pairs: Iterator[tuple[int, int]]) -> Iterator[_Run]:
    run: _Run | None = None
    for logical, physical in pairs:
        if run and (logical, physical) == (run.logical + run.length, run.physical + run.length):
            run = run._replace(length=run.length + 1)
            continue
        if run:
            yield run
        run = _Run(logical, physical, 1)
    if run:
        yield run


def _time(seconds: int, extra: int) -> int:
    """Two more bits of the seconds, then nanoseconds: (1 << 32) is added to a signed number."""
    signed = seconds - (1 << 32) if seconds & 0x80000000 else seconds
    return (signed + ((extra & 3) << 32)) * 1_000_000_000 + (extra >> 2)


def _device(block: bytes) -> int:
    """Old: 8 bits each; new: 12 and 20 (linux/kdev_t.h)."""
    old, new = struct.unpack_from("<II", block)
    if old:
        return os.makedev(old >> 8 & 0xFF, old & 0xFF)
    return os.makedev((new & 0xFFF00) >> 8, (new & 0xFF) | (new >> 12 & 0xFFF00))


def _acl(raw: bytes) -> bytes:
    """Stored with ids only where there are any (fs/ext4/acl.h), version 1."""
    require(raw[:4] == b"\1\0\0\0", "an unknown version of access control lists")
    entries, at = [], 4
    while at < len(raw):
        require(at + 4 <= len(raw), "a damaged access control list")
        tag, permissions = struct.unpack_from("<HH", raw, at)
        at += 4
        id = 0
        if tag in (0x02, 0x08):
            require(at + 4 <= len(raw), "a damaged access control list")
            (id,) = struct.unpack_from("<I", raw, at)
            at += 4
        entries.append((tag, permissions, id))
    try:
        return acl_attribute(entries)
    except ValueError as error:
        raise NotRecognized(str(error)) from None
