"""One inode's block map, for the journal: extent tree or indirect blocks.

Source: Linux Documentation/filesystems/ext4/{inodes,ifork}.rst, fs/ext4/inode.c (checksums).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from imager.allocation.checksum import crc32c
from imager.allocation.ext.blocks import Blocks
from imager.allocation.ext.layout import Superblock
from imager.allocation.model import require

_EXTENTS_FLAG = 0x80000
_EXTENT_MAGIC = 0xF30A
_EXTENT_MAX_DEPTH = 5
_EXTENT_MAX_LENGTH = 32768  # longer ones are unwritten

# 4 GiB of 4 KiB blocks, four times the largest journal that mke2fs makes unasked.
MAX_MAPPED_BLOCKS = 1 << 20
_EXTENT_MAX_NODES = MAX_MAPPED_BLOCKS // 256  # bounds time; one holds 84 extents or more


class Run(NamedTuple):
    """``length`` file blocks from ``logical`` lie on disk from ``physical``."""

    logical: int
    physical: int
    length: int

    @property
    def end(self) -> int:
        return self.logical + self.length


class FileBlocks:
    """The blocks of one file without holes, in file order."""

    def __init__(self, blocks: Blocks, runs: list[Run]) -> None:
        self._blocks = blocks
        self.runs = runs
        self._starts = [run.logical for run in runs]

    @property
    def count(self) -> int:
        """Blocks from the file's start to its first hole or end."""
        return self.runs[-1].end if self.runs else 0

    def read(self, index: int) -> bytes:
        """One block of the file. Raises NotRecognized behind its end, OSError."""
        require(0 <= index < self.count, f"no block {index} in the file")
        run = self.runs[bisect_right(self._starts, index) - 1]
        return self._blocks.read(run.physical + index - run.logical)


def open_inode(blocks: Blocks, superblock: Superblock, number: int) -> FileBlocks:
    """Finds, checks and maps an inode. Raises NotRecognized for any doubt, OSError."""
    raw = _read_inode(blocks, superblock, number)
    if superblock.journal_backup and number == superblock.journal_inode:
        require(
            raw[0x28:0x64] == superblock.journal_backup[:60],
            "the journal's inode differs from its copy in the superblock",
        )
    seed = _check_inode(superblock, number, raw)
    (flags,) = struct.unpack_from("<I", raw, 0x20)
    if flags & _EXTENTS_FLAG:
        mapped = _extent_runs(blocks, superblock, seed, raw[0x28:0x64])
    else:
        mapped = _pointer_runs(blocks, superblock, raw[0x28:0x64])
    return FileBlocks(blocks, _without_holes(mapped))


def _read_inode(blocks: Blocks, superblock: Superblock, number: int) -> bytes:
    require(0 < number <= superblock.inodes_count, f"no inode {number}")
    group_index, position = divmod(number - 1, superblock.inodes_per_group)
    table_index, slot = divmod(group_index, superblock.descriptors_per_block)
    descriptors = blocks.read(superblock.descriptor_block(table_index))
    at = slot * superblock.descriptor_size
    group = superblock.group(group_index, descriptors[at : at + superblock.descriptor_size])
    block, offset = divmod(position * superblock.inode_size, superblock.block_size)
    return blocks.read(group.inode_table + block)[offset : offset + superblock.inode_size]


def _check_inode(superblock: Superblock, number: int, raw: bytes) -> int:
    """Checks the inode's checksum, and returns the seed for its extent blocks."""
    if not superblock.has_metadata_checksums:
        return 0
    seed = crc32c(superblock.checksum_seed, number.to_bytes(4, "little") + raw[0x64:0x68])
    bare = bytearray(raw)
    bare[0x7C:0x7E] = bytes(2)
    stored = int.from_bytes(raw[0x7C:0x7E], "little")
    mask = 0xFFFF
    if len(raw) > 128 and int.from_bytes(raw[0x80:0x82], "little") >= 4:
        bare[0x82:0x84] = bytes(2)
        stored |= int.from_bytes(raw[0x82:0x84], "little") << 16
        mask = 0xFFFFFFFF
    require(crc32c(seed, bare) & mask == stored, f"the checksum of inode {number} is wrong")
    return seed


def _without_holes(mapped: Iterator[Run]) -> list[Run]:
    """Runs joined where they continue each other, up to the first hole."""
    runs: list[Run] = []
    for run in mapped:
        last = runs[-1] if runs else Run(0, run.physical, 0)
        if run.logical != last.end:
            break
        if runs and run.physical == last.physical + last.length:
            runs[-1] = Run(last.logical, last.physical, last.length + run.length)
        else:
            runs.append(run)
    return runs


def _extent_runs(blocks: Blocks, superblock: Superblock, seed: int, root: bytes) -> Iterator[Run]:
    """Leaves of an extent tree, left to right; each index block is read at most once."""
    waiting = [(root, _node_depth(root))]
    seen: set[int] = set()
    while waiting:
        node, depth = waiting.pop()
        entries = _node_entries(node, depth)
        if depth == 0:
            yield from map(_leaf_run, entries)
            continue
        for entry in reversed(entries):
            _, low, high = struct.unpack_from("<IIH", entry)
            place = low | high << 32
            require(
                place not in seen and len(seen) < _EXTENT_MAX_NODES,
                "an extent tree with a loop, or too big",
            )
            seen.add(place)
            child = blocks.read(place)
            _check_extent_block(superblock, seed, child)
            waiting.append((child, depth - 1))


def _node_depth(node: bytes) -> int:
    (depth,) = struct.unpack_from("<H", node, 6)
    require(depth <= _EXTENT_MAX_DEPTH, "an extent tree that is too deep")
    return int(depth)


def _node_entries(node: bytes, depth: int) -> list[bytes]:
    magic, count, most, stored_depth = struct.unpack_from("<4H", node)
    require(
        magic == _EXTENT_MAGIC
        and count <= most <= (len(node) - 12) // 12
        and stored_depth == depth,
        "a damaged extent tree",
    )
    return [node[at : at + 12] for at in range(12, 12 + 12 * count, 12)]


def _leaf_run(entry: bytes) -> Run:
    logical, length, high, low = struct.unpack("<IHHI", entry)
    require(0 < length <= _EXTENT_MAX_LENGTH, "an empty or unwritten extent")
    return Run(logical, low | high << 32, length)


def _check_extent_block(superblock: Superblock, seed: int, node: bytes) -> None:
    if not superblock.has_metadata_checksums:
        return
    tail = 12 + 12 * int.from_bytes(node[4:6], "little")
    require(
        tail + 4 <= len(node)
        and crc32c(seed, node[:tail]) == int.from_bytes(node[tail : tail + 4], "little"),
        "the checksum of an extent block is wrong",
    )


def _pointer_runs(blocks: Blocks, superblock: Superblock, root: bytes) -> Iterator[Run]:
    """Twelve direct pointers, then trees of one to three levels of indirect blocks."""
    for logical, physical in enumerate(_pointers(blocks, superblock, root)):
        if physical == 0 or logical >= MAX_MAPPED_BLOCKS:
            return
        yield Run(logical, physical, 1)


def _pointers(blocks: Blocks, superblock: Superblock, root: bytes) -> Iterator[int]:
    pointers = struct.unpack("<15I", root)
    yield from pointers[:12]
    for level, pointer in enumerate(pointers[12:], start=1):
        yield from _indirect(blocks, superblock, pointer, level)


def _indirect(blocks: Blocks, superblock: Superblock, pointer: int, level: int) -> Iterator[int]:
    if level == 0 or pointer == 0:
        yield pointer
        return
    for (child,) in struct.iter_unpack("<I", blocks.read(pointer)):
        yield from _indirect(blocks, superblock, child, level - 1)
