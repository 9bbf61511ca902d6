"""Leaves of a Btrfs, to be changed on disk: for features that no mkfs here makes, and for damage.

Everything for filesystems on one device.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from imager.allocation.btrfs.allocated import _Commit
from imager.allocation.btrfs.chunks import ChunkMap
from imager.allocation.btrfs.digest import digest_of
from imager.allocation.btrfs.members import Members
from imager.allocation.btrfs.superblock import SUPERBLOCK_SIZE, SUPERBLOCKS, read_superblock
from imager.allocation.btrfs.tree import Item, Key
from imager.blocksource import FileSource

HEADER_SIZE, ITEM = 101, struct.Struct("<QBQII")


class Node(NamedTuple):
    """A tree node: its address, and where its copies lie in the image."""

    address: int
    owner: int
    level: int
    places: tuple[int, ...]
    raw: bytes

    @property
    def items(self) -> list[Item]:
        count = int.from_bytes(self.raw[96:100], "little")
        entries = ITEM.iter_unpack(self.raw[HEADER_SIZE : HEADER_SIZE + count * ITEM.size])
        return [
            Item((a, b, c), self.raw[HEADER_SIZE + offset :][:size])
            for a, b, c, offset, size in entries
        ]


def nodes(image: Path) -> list[Node]:
    """All nodes that are found by their headers."""
    with FileSource(image) as source:
        superblock = read_superblock(source)
        chunks = _Commit(superblock, Members(source, superblock, ())).chunks
        return list(_found(source, superblock.node_size, superblock.metadata_fsid, chunks))


def _found(source: FileSource, size: int, fsid: bytes, chunks: ChunkMap) -> Iterator[Node]:
    for chunk in chunks.chunks:
        if chunk.kind == 1:  # data
            continue
        for address in range(chunk.start, chunk.end - size + 1, size):
            copies = [pieces[0][0].offset for pieces in chunk.copies_of(address, size)]
            raw = source.pread(copies[0], size)
            if raw[32:48] == fsid and raw[48:56] == address.to_bytes(8, "little"):
                owner = int.from_bytes(raw[88:96], "little")
                yield Node(address, owner, raw[100], tuple(copies), raw)


def newest(image: Path, owner: int, level: int = 0) -> Node:
    """The tree's node of the highest generation."""
    found = [node for node in nodes(image) if (node.owner, node.level) == (owner, level)]
    return max(found, key=lambda node: int.from_bytes(node.raw[80:88], "little"))


def write_node(image: Path, node: Node, raw: bytes) -> None:
    """With a sound checksum, in all copies."""
    with FileSource(image) as source:
        kind = read_superblock(source).digest_kind
    digest = digest_of(kind, raw[32:])
    with image.open("r+b") as file:
        for place in node.places:
            file.seek(place)
            file.write(digest + raw[len(digest) :])


def write_leaf(image: Path, node: Node, items: list[Item], owner: int | None = None) -> None:
    header = bytearray(node.raw[:HEADER_SIZE])
    header[88:96] = (node.owner if owner is None else owner).to_bytes(8, "little")
    header[96:100] = len(items).to_bytes(4, "little")
    at = len(node.raw) - HEADER_SIZE
    entries, data = b"", b""
    for key, content in items:
        at -= len(content)
        entries += ITEM.pack(*key, at, len(content))
        data = content + data
    free = bytes(len(node.raw) - HEADER_SIZE - len(entries) - len(data))
    write_node(image, node, bytes(header) + entries + free + data)


def replace_item(image: Path, node: Node, key: Key, data: bytes) -> None:
    items = [Item(k, data if k == key else d) for k, d in node.items]
    assert items != node.items
    write_leaf(image, node, items)


def patch_superblock(image: Path, offset: int, content: bytes, copy: int = 0) -> None:
    """Puts bytes into one of the superblock's copies, with a sound CRC-32C."""
    with image.open("r+b") as file:
        file.seek(SUPERBLOCKS[copy])
        raw = bytearray(file.read(SUPERBLOCK_SIZE))
        raw[offset : offset + len(content)] = content
        raw[:4] = digest_of(0, bytes(raw[32:]))
        file.seek(SUPERBLOCKS[copy])
        file.write(raw)


def use_block_group_tree(image: Path) -> None:
    """What ``btrfstune --convert-to-block-group-tree`` of later versions does, on a filesystem
    fresh from mkfs: the accounts move from the extent tree into a tree of their own. It gets the
    node of the UUID tree, which the kernel makes anew."""
    extent_tree, uuid_tree, group_tree, inline_reference, block_group = 2, 9, 11, 176, 192
    roots, extents, uuids = (newest(image, owner) for owner in (1, extent_tree, uuid_tree))
    groups = [item for item in extents.items if item.key[1] == block_group]
    assert groups
    renamed = [
        Item((group_tree, *key[1:]) if key[:2] == (uuid_tree, 132) else key, data)
        for key, data in roots.items
    ]
    old, new = (struct.pack("<BQ", inline_reference, tree) for tree in (uuid_tree, group_tree))
    rest = [
        Item(key, data.replace(old, new) if key[0] == uuids.address else data)
        for key, data in extents.items
        if key[1] != block_group
    ]
    write_leaf(image, roots, sorted(renamed))
    write_leaf(image, extents, rest)
    write_leaf(image, uuids, groups, owner=group_tree)
    for copy, offset in enumerate(SUPERBLOCKS):
        if offset < image.stat().st_size:
            patch_superblock(image, 0xB4, bytes([1 | 2 | 8]), copy)
