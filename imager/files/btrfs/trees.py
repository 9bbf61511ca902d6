"""Ranges of keys in trees. Snapshots share nodes, so a node's owner says nothing here."""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from imager.allocation.btrfs.allocated import chunks_of
from imager.allocation.btrfs.digest import digest_of
from imager.allocation.btrfs.members import Members
from imager.allocation.btrfs.superblock import Superblock, TreeRoot
from imager.allocation.btrfs.tree import Item, Key
from imager.allocation.model import require
from imager.errors import NotRecognized

_MAX_LEVEL = 7
_HEADER = struct.Struct("<32s16sQQ16sQQIB")
_ITEM = struct.Struct("<QBQII")
_POINTER = struct.Struct("<QBQQQ")

_KEPT_NODES = 512


class _Node(NamedTuple):
    level: int
    keys: list[Key]
    children: list[tuple[int, int]]
    """Address and generation; of a leaf offset and size of the data."""
    raw: bytes


class Trees:
    """Reads items and data by logical address."""

    def __init__(self, superblock: Superblock, members: Members) -> None:
        """Raises NotRecognized when the chunk tree can't be read."""
        self._superblock = superblock
        self._members = members
        self._chunks = chunks_of(superblock, members)
        self._kept: OrderedDict[tuple[int, int], _Node] = OrderedDict()

    def search(self, root: TreeRoot, low: Key, high: Key) -> Iterator[Item]:
        """The items with keys from ``low`` to ``high``, both included, in order."""
        require(root.level <= _MAX_LEVEL, f"a tree of level {root.level}")
        yield from self._search(root.address, root.generation, root.level, low, high)

    def find(self, root: TreeRoot, key: Key) -> bytes | None:
        return next((item.data for item in self.search(root, key, key)), None)

    def read(self, address: int, length: int) -> bytes:
        """Data, of whichever copy can be read. Raises NotRecognized or OSError."""
        for raw in self._members.copies(self._chunks, address, length):
            return raw
        raise OSError(5, f"no copy of the data at {address} can be read")

    def _search(
        self, address: int, generation: int, level: int, low: Key, high: Key
    ) -> Iterator[Item]:
        node = self._node(address, generation, level)
        if level == 0:
            for n in range(bisect_left(node.keys, low), bisect_right(node.keys, high)):
                offset, size = node.children[n]
                yield Item(node.keys[n], node.raw[offset : offset + size])
            return
        first = max(bisect_right(node.keys, low) - 1, 0)
        for n in range(first, bisect_right(node.keys, high)):
            yield from self._search(*node.children[n], level - 1, low, high)

    def _node(self, address: int, generation: int, level: int) -> _Node:
        kept = self._kept.get((address, generation))
        if kept is not None:
            self._kept.move_to_end((address, generation))
            require(kept.level == level, f"the tree node at {address} is of another level")
            return kept
        doubt = NotRecognized(f"no copy of the tree node at {address} can be read")
        for raw in self._members.copies(self._chunks, address, self._superblock.node_size):
            try:
                node = self._parse(raw, address, generation, level)
            except NotRecognized as found:
                doubt = found
                continue
            self._kept[address, generation] = node
            if len(self._kept) > _KEPT_NODES:
                self._kept.popitem(last=False)
            return node
        raise doubt

    def _parse(self, raw: bytes, address: int, generation: int, level: int) -> _Node:
        superblock, where = self._superblock, f"the tree node at {address}"
        digest, fsid, own, _, _, own_generation, _, count, own_level = _HEADER.unpack_from(raw)
        computed = digest_of(superblock.digest_kind, raw[32:])
        require(digest[: len(computed)] == computed, f"{where} has a wrong checksum")
        require(
            (own, fsid, own_generation, own_level)
            == (address, superblock.metadata_fsid, generation, level),
            f"{where} is another one",
        )
        form = _POINTER if level else _ITEM
        end = _HEADER.size + count * form.size
        require(end <= len(raw), f"{where} has too many entries")
        entries = list(form.iter_unpack(raw[_HEADER.size : end]))
        keys = [entry[:3] for entry in entries]
        require(
            all(one < other for one, other in pairwise(keys)),
            f"{where} is not in order",
        )
        if level:
            return _Node(level, keys, [entry[3:] for entry in entries], raw)
        places = [(_HEADER.size + offset, size) for *_, offset, size in entries]
        require(
            all(end <= offset and offset + size <= len(raw) for offset, size in places),
            f"{where} has items outside of it",
        )
        return _Node(level, keys, places, raw)
