"""All that the kernel shows of a Btrfs from its top, each subvolume in its place."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from imager.allocation.btrfs.allocated import tree_root
from imager.allocation.btrfs.members import Members
from imager.allocation.btrfs.superblock import TreeRoot, read_superblock
from imager.allocation.checksum import crc32c
from imager.allocation.model import require
from imager.blocksource import BlockSource
from imager.errors import UnsupportedError
from imager.files.btrfs.compression import decompress
from imager.files.btrfs.trees import Trees
from imager.files.model import PIECE_BYTES, Entry, Piece

_TOP_TREE, _TOP_INODE = 5, 256
_LOST_SUBVOLUME = 2  # inode that the kernel gives one that a snapshot only mentions

_INODE_ITEM, _ATTRIBUTE, _NAME, _NAME_INDEX, _EXTENT = 1, 24, 84, 96, 108
_ROOT_ITEM, _ROOT_REFERENCE = 132, 156
_MAX = (1 << 64) - 1

# size, then links uid gid mode rdev, then atime, ctime and mtime as seconds and nanoseconds
_INODE = struct.Struct("<16xQ16xIIIIQ48xqIqIqI")
# kind, id and offset of what is named; sizes of data and name; type
_ENTRY = struct.Struct("<QBQQHHB")
# size of the content, compression, encryption, other encoding, type
_EXTENT_HEAD = struct.Struct("<8xQBBHB")
_EXTENT_PLACE = struct.Struct("<QQQQ")
_INLINE, _REGULAR, _UNWRITTEN = 0, 1, 2


class _Named(NamedTuple):
    name: bytes
    kind: int
    """Of key: an inode of this subvolume, or another subvolume."""
    number: int


class BtrfsReader:
    """A ``Reader``."""

    notes: tuple[str, ...] = ()

    def __init__(self, source: BlockSource) -> None:
        """Raises UnsupportedError with a log tree or several devices, NotRecognized, OSError."""
        superblock = read_superblock(source)
        superblock.check(source.size)
        if superblock.devices != 1:
            raise UnsupportedError(f"it lies on {superblock.devices} devices")
        if superblock.log_root:
            raise UnsupportedError("its log tree is in use: only the kernel can replay it")
        self._trees = Trees(superblock, Members(source, superblock, ()))
        self._superblock = superblock
        self._roots: dict[int, TreeRoot] = {}

    def top(self) -> Entry:
        return self._entry(_TOP_TREE, _TOP_INODE, "")

    def entries(self, folder: Entry) -> Iterator[Entry]:
        for named in self._named(folder):
            yield self._of(folder, named)

    def names(self, folder: Entry) -> Iterator[str]:
        return (os.fsdecode(named.name) for named in self._named(folder))

    def find(self, folder: Entry, name: str) -> Entry | None:
        tree, inode = folder.number
        wanted = os.fsencode(name)
        key = (inode, _NAME, _hash(wanted))
        if folder.is_folder and inode != _LOST_SUBVOLUME:
            for item in self._trees.search(self._root(tree), key, key):
                for named, _ in _parse_entries(item.data):
                    if named.name == wanted:
                        return self._of(folder, named)
        return None

    def target(self, link: Entry) -> str:
        require(0 < link.size <= 4096, "a symbolic link of an impossible length")
        content = bytearray(link.size)
        for offset, piece in self.pieces(link):
            content[offset : offset + len(piece)] = piece
        return os.fsdecode(bytes(content))

    def attributes(self, entry: Entry) -> Mapping[str, bytes]:
        tree, inode = entry.number
        found = {}
        low, high = (inode, _ATTRIBUTE, 0), (inode, _ATTRIBUTE, _MAX)
        for item in self._trees.search(self._root(tree), low, high):
            for named, value in _parse_entries(item.data):
                found[os.fsdecode(named.name)] = value
        return found

    def pieces(self, file: Entry) -> Iterator[Piece]:
        tree, inode = file.number
        low, high = (inode, _EXTENT, 0), (inode, _EXTENT, _MAX)
        for item in self._trees.search(self._root(tree), low, high):
            offset = item.key[2]
            if offset >= file.size:
                return
            for at, content in self._extent(item.data, file.size - offset):
                yield Piece(offset + at, content[: file.size - offset - at])

    # --- subvolumes and inodes ----------------------------------------------------------------

    def _root(self, tree: int) -> TreeRoot:
        found = self._roots.get(tree)
        if found is None:
            low, high = (tree, _ROOT_ITEM, 0), (tree, _ROOT_ITEM, _MAX)
            item = next(self._trees.search(self._superblock.root_tree, low, high), None)
            require(item is not None, f"there is no subvolume {tree}")
            assert item is not None
            found = self._roots[tree] = tree_root(item.data, tree)
        return found

    def _of(self, folder: Entry, named: _Named) -> Entry:
        name, tree = os.fsdecode(named.name), folder.number[0]
        if named.kind == _INODE_ITEM:
            return self._entry(tree, named.number, name)
        require(named.kind == _ROOT_ITEM, "a folder with an unknown kind of entry")
        reference = (tree, _ROOT_REFERENCE, named.number)
        if self._trees.find(self._superblock.root_tree, reference) is None:
            return folder._replace(
                name=name, number=(tree, _LOST_SUBVOLUME), mode=0o40755, uid=0, gid=0, links=1
            )
        return self._entry(named.number, _TOP_INODE, name)

    def _entry(self, tree: int, inode: int, name: str) -> Entry:
        raw = self._trees.find(self._root(tree), (inode, _INODE_ITEM, 0))
        require(raw is not None and len(raw) >= _INODE.size, f"there is no inode {inode}")
        assert raw is not None
        size, links, uid, gid, mode, rdev, *times = _INODE.unpack_from(raw)
        atime, ctime, mtime = (
            seconds * 1_000_000_000 + rest
            for seconds, rest in zip(times[::2], times[1::2], strict=True)
        )
        # The kernel's own form: 12 bits, then 20 (linux/kdev_t.h).
        device = os.makedev(rdev >> 20 & 0xFFF, rdev & 0xFFFFF)
        number = (tree, inode)
        return Entry(
            name, number, mode, uid, gid, size, links, atime, mtime, ctime, device if rdev else 0
        )

    def _named(self, folder: Entry) -> Iterator[_Named]:
        tree, inode = folder.number
        require(folder.is_folder, "no folder")
        if inode == _LOST_SUBVOLUME:
            return
        low, high = (inode, _NAME_INDEX, 0), (inode, _NAME_INDEX, _MAX)
        for item in self._trees.search(self._root(tree), low, high):
            for named, _ in _parse_entries(item.data):
                yield named

    # --- content ------------------------------------------------------------------------------

    def _extent(self, raw: bytes, wanted: int) -> Iterator[Piece]:
        """An extent item's content from its own start on; nothing for holes."""
        require(len(raw) >= _EXTENT_HEAD.size, "a damaged extent")
        length, compression, encryption, other, kind = _EXTENT_HEAD.unpack_from(raw)
        if encryption or other:
            raise UnsupportedError("it is encrypted, or encoded in an unknown way")
        sector = self._superblock.sector_size
        if kind == _INLINE:
            content = raw[_EXTENT_HEAD.size :]
            if compression:
                content = decompress(compression, content, length, sector)
            yield Piece(0, content[:length])
            return
        require(
            kind in (_REGULAR, _UNWRITTEN) and len(raw) >= _EXTENT_HEAD.size + _EXTENT_PLACE.size,
            "a damaged extent",
        )
        address, stored, offset, count = _EXTENT_PLACE.unpack_from(raw, _EXTENT_HEAD.size)
        if address == 0 or kind == _UNWRITTEN:
            return
        if compression:
            require(stored <= length + sector and offset + count <= length, "a damaged extent")
            content = decompress(compression, self._trees.read(address, stored), length, sector)
            yield Piece(0, content[offset : offset + count])
            return
        require(offset + count <= stored, "a damaged extent")
        for at in range(0, min(count, wanted), PIECE_BYTES):
            size = min(PIECE_BYTES, count - at)
            yield Piece(at, self._trees.read(address + offset + at, size))


def _parse_entries(raw: bytes) -> Iterator[tuple[_Named, bytes]]:
    """Those of one item, with the data behind each name: of attributes their value."""
    at = 0
    while at < len(raw):
        require(at + _ENTRY.size <= len(raw), "a damaged folder")
        number, kind, _, _, data_size, name_size, _ = _ENTRY.unpack_from(raw, at)
        at += _ENTRY.size
        end = at + name_size + data_size
        name = raw[at : at + name_size]
        require(end <= len(raw) and name_size > 0 and b"/" not in name, "a damaged folder")
        yield _Named(name, kind, number), raw[at + name_size : end]
        at = end


def _hash(name: bytes) -> int:
    """btrfs_name_hash."""
    return crc32c(0xFFFFFFFE, name)
