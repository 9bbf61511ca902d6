"""B-trees: nodes are checked like the kernel does, and walked in key order.

Source: Linux include/uapi/linux/btrfs_tree.h (struct btrfs_header, btrfs_item, btrfs_key_ptr),
fs/btrfs/tree-checker.c, fs/btrfs/disk-io.c (btrfs_verify_level_key).

A walk can't loop: each step goes one level down, and each node must start with the very key that
its parent has for it, so that none can be reached twice. Nor may trees together have more nodes
than there is room for, should they share some.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from imager.allocation.btrfs.chunks import ChunkMap
from imager.allocation.btrfs.digest import digest_of
from imager.allocation.btrfs.members import Members
from imager.allocation.btrfs.superblock import Superblock, TreeRoot
from imager.allocation.model import require
from imager.errors import NotRecognized

_MAX_LEVEL = 7
_HEADER = struct.Struct("<32s16sQQ16sQQIB")
_ITEM = struct.Struct("<QBQII")
_POINTER = struct.Struct("<QBQQQ")

Key = tuple[int, int, int]
"""objectid, type, offset"""

LAST_KEY: Key = (1 << 64, 0, 0)


class Item(NamedTuple):
    """An entry of a leaf."""

    key: Key
    data: bytes


class _Pointer(NamedTuple):
    key: Key
    address: int
    generation: int


class _Expected(NamedTuple):
    """What the parent says of a node, and its first key where there is a parent."""

    root: TreeRoot
    first: Key | None
    end: Key


class Trees:
    """Reads the trees of a filesystem through its chunks."""

    def __init__(self, superblock: Superblock, members: Members, chunks: ChunkMap) -> None:
        self._superblock = superblock
        self._members = members
        self._chunks = chunks
        self._most_nodes = sum(chunk.length for chunk in chunks.chunks) // superblock.node_size

    def walk(self, root: TreeRoot, visited: array[int]) -> Iterator[Item]:
        """All items in key order; the addresses of the tree's nodes are added to ``visited``.

        Raises NotRecognized for a node of which no copy is sound, MemberMissing when there may
        be one on a device that is not at hand.
        """
        require(root.level <= _MAX_LEVEL, f"a tree of level {root.level}")
        waiting = [_Expected(root, None, LAST_KEY)]
        while waiting:
            expected = waiting.pop()
            raw, count = self._node(expected)
            visited.append(expected.root.address)
            require(len(visited) <= self._most_nodes, "trees share nodes")
            if expected.root.level == 0:
                yield from _items(raw, count, expected)
            else:
                waiting += reversed(list(_children(raw, count, expected)))

    def _node(self, expected: _Expected) -> tuple[bytes, int]:
        """A sound copy of a node and how many entries it has."""
        address = expected.root.address
        size = self._superblock.node_size
        require(address % self._superblock.sector_size == 0, f"a tree node at {address}")
        doubt = NotRecognized(f"no copy of the tree node at {address} can be read")
        for raw in self._members.copies(self._chunks, address, size):
            try:
                return raw, self._check(raw, expected)
            except NotRecognized as found:
                doubt = found
        raise doubt

    def _check(self, raw: bytes, expected: _Expected) -> int:
        superblock, root = self._superblock, expected.root
        count: int
        digest, fsid, address, _, _, generation, owner, count, level = _HEADER.unpack_from(raw)
        where = f"the tree node at {root.address}"
        computed = digest_of(superblock.digest_kind, raw[32:])
        require(digest[: len(computed)] == computed, f"{where} has a wrong checksum")
        require(address == root.address, f"{where} is for another place")
        require(fsid == superblock.metadata_fsid, f"{where} is of another filesystem")
        require(generation == root.generation, f"{where} is of another generation")
        require(level == root.level, f"{where} is of another level")
        require(owner == root.owner, f"{where} is of another tree")
        entry = _POINTER.size if level else _ITEM.size
        require(count <= (len(raw) - _HEADER.size) // entry, f"{where} has too many entries")
        require(count > 0 or (level == 0 and expected.first is None), f"{where} is empty")
        return count


def _children(raw: bytes, count: int, expected: _Expected) -> Iterator[_Expected]:
    entries = raw[_HEADER.size : _HEADER.size + count * _POINTER.size]
    pointers = [
        _Pointer((a, b, c), address, generation)
        for a, b, c, address, generation in _POINTER.iter_unpack(entries)
    ]
    _check_keys([pointer.key for pointer in pointers], expected)
    level, owner = expected.root.level - 1, expected.root.owner
    ends = [*(pointer.key for pointer in pointers[1:]), expected.end]
    for (key, address, generation), end in zip(pointers, ends, strict=True):
        yield _Expected(TreeRoot(address, level, generation, owner), key, end)


def _items(raw: bytes, count: int, expected: _Expected) -> Iterator[Item]:
    """Data lies from the node's end downwards, without gaps, in the order of the items."""
    head = _HEADER.size
    entries = list(_ITEM.iter_unpack(raw[head : head + count * _ITEM.size]))
    _check_keys([entry[:3] for entry in entries], expected)
    end = len(raw)
    for a, b, c, offset, size in entries:
        start = head + offset
        require(
            start + size == end and start >= head + count * _ITEM.size,
            f"the tree node at {expected.root.address} has its items in the wrong place",
        )
        yield Item((a, b, c), raw[start:end])
        end = start


def _check_keys(keys: list[Key], expected: _Expected) -> None:
    require(
        all(one < other for one, other in pairwise(keys))
        and (expected.first is None or keys[0] == expected.first)
        and (not keys or keys[-1] < expected.end),
        f"the tree node at {expected.root.address} has keys in the wrong order",
    )
