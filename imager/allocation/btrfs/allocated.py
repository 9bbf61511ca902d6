"""The allocation map of one device of a Btrfs.

Used are: the first MiB, the copies of the superblock, what lies behind the filesystem's end, and
this device's part of every extent in the extent tree. That tree is complete with each commit. What
an fsync has written since is only in log trees: their nodes and the data that they refer to are
added, which makes the map the union of before and after a replay.

The backup roots in the superblock are older commits, of which nothing may be left; they are not
followed.

Every doubt is an error here, and the caller takes it as "all of it". Where the metadata lies on a
device that is not at hand, all that is allotted to chunks on this one counts as used.

Source: Linux include/uapi/linux/btrfs_tree.h, fs/btrfs/extent-tree.c, fs/btrfs/tree-log.c.
"""

from __future__ import annotations

import heapq
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from imager.allocation.btrfs.chunks import (
    CHUNK_ITEM,
    Chunk,
    ChunkMap,
    DeviceExtent,
    system_chunks,
)
from imager.allocation.btrfs.members import MemberMissing, Members
from imager.allocation.btrfs.superblock import (
    BLOCK_GROUP_TREE,
    SUPERBLOCK_SIZE,
    SUPERBLOCKS,
    DeviceItem,
    Superblock,
    TreeRoot,
    read_superblock,
)
from imager.allocation.btrfs.tree import Item, Trees
from imager.allocation.model import AllocationMap, Companion, Filesystem, require
from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

_RESERVED = 1 << 20  # bytes; never allotted to chunks, boot loaders may use it

# objectids
_EXTENT_TREE, _DEVICE_TREE, _BLOCK_GROUP_TREE = 2, 4, 11
_BALANCE, _TREE_LOG, _TREE_RELOCATION = (1 << 64) - 4, (1 << 64) - 6, (1 << 64) - 8

# key types
_EXTENT_DATA = 108
_ROOT_ITEM = 132
_EXTENT_ITEM, _METADATA_ITEM = 168, 169
_BLOCK_GROUP_ITEM = 192
_DEVICE_EXTENT, _DEVICE_ITEM = 204, 216
_TEMPORARY_ITEM, _DEVICE_REPLACE = 248, 250
_BACK_REFERENCES = (176, 178, 182, 184)  # to tree blocks and data, keyed or shared

# Items of the root tree that a running or paused balance leaves in it.
_BALANCING = ((_BALANCE, _TEMPORARY_ITEM), (_TREE_RELOCATION, _ROOT_ITEM))

_ROOT = struct.Struct("<160xQQQ54xB")  # generation, root_dirid, bytenr; level
_DEVICE_EXTENT_FIELDS = struct.Struct("<QQQQ")  # chunk tree, chunk objectid, chunk offset, length
_BLOCK_GROUP_FIELDS = struct.Struct("<QQQ")  # used, chunk objectid, flags
_FILE_EXTENT = struct.Struct("<QQBBHBQQ")  # up to disk_num_bytes
_FILE_EXTENT_TYPE, _INLINE = 20, b"\0"
_REPLACE_STATE = struct.Struct("<32xQ")
_REPLACE_OVER = (0, 2, 3)  # never started, finished, cancelled

Stripes = list[tuple[DeviceExtent, Chunk, int]]


def allocation_map(
    source: BlockSource, filesystem: Filesystem, companions: Sequence[Companion]
) -> AllocationMap:
    """``companions``: other devices of the same filesystem.

    Raises NotRecognized or UnsupportedError for any doubt, OSError for unreadable sectors.
    """
    superblock = read_superblock(source)
    superblock.check(source.size)
    members = Members(source, superblock, companions)
    commit = _Commit(superblock, members)
    stripes = commit.own_stripes()
    always = _always_used(superblock, source.size)
    try:
        logical = commit.used(stripes)
        logged = _LogTrees(superblock, commit.trees, commit.chunks).used()
    except MemberMissing as missing:
        allotted = [extent[:2] for extent, _, _ in stripes]
        reason = f"{filesystem.kind}: {missing}; what is allotted to chunks is kept whole"
        return AllocationMap(_merged(always, allotted), "all", reason)
    in_stripes = _in_stripes(stripes, _merged(logical, logged))
    used = _merged(always, in_stripes)
    if any(chunk.profile.parity for _, chunk, _ in stripes):
        return AllocationMap(used, "all", f"{filesystem.kind}: RAID5/6 chunks are kept whole")
    if logged:
        reason = f"{filesystem.kind}: its log tree waits to be replayed"
        return AllocationMap(used, "union", reason)
    return AllocationMap(used, "exact")


def chunks_of(superblock: Superblock, members: Members) -> ChunkMap:
    """Where all that has a logical address lies. Raises NotRecognized."""
    return _Commit(superblock, members).chunks


def _always_used(superblock: Superblock, source_size: int) -> Extents:
    end = superblock.device.size
    copies = [(at, SUPERBLOCK_SIZE) for at in SUPERBLOCKS if at + SUPERBLOCK_SIZE <= end]
    return Extents([(0, min(_RESERVED, end)), *copies, (end, source_size - end)])


def _in_stripes(stripes: Stripes, logical: Extents) -> Iterator[tuple[int, int]]:
    """This device's part of logical ranges, ascending, in bytes."""
    for _, chunk, index in stripes:
        yield from chunk.used_in_stripe(index, logical)


def _merged(one: Iterable[tuple[int, int]], other: Iterable[tuple[int, int]]) -> Extents:
    """The union of two ascending lists, without a copy of them as tuples."""
    return Extents.from_sorted(heapq.merge(one, other))


class _Group(NamedTuple):
    """A block group: the accounts of one chunk."""

    length: int
    used: int


class _Commit:
    """The trees as of the last commit."""

    def __init__(self, superblock: Superblock, members: Members) -> None:
        """Raises NotRecognized, MemberMissing if the chunk tree can't be had."""
        self._superblock = superblock
        self._nodes = array("Q")
        bootstrap = Trees(superblock, members, system_chunks(superblock))
        self.chunks = self._read_chunks(bootstrap)
        self.trees = Trees(superblock, members, self.chunks)

    def own_stripes(self) -> Stripes:
        """What this device holds of chunks, ascending by their place on it."""
        device = self._superblock.device
        stripes = self.chunks.device_extents(device.id)
        for (offset, length, _), chunk, index in stripes:
            require(chunk.stripes[index].uuid == device.uuid, "a chunk is on another device")
            require(offset + length <= device.size, "a chunk ends behind its device")
        allotted = sum(extent.length for extent, _, _ in stripes)
        require(allotted == device.allotted, f"{allotted} bytes are allotted, not as it says")
        return stripes

    def used(self, stripes: Stripes) -> Extents:
        """Used logical ranges. Raises NotRecognized when the trees contradict each other."""
        roots = self._read_roots()
        self._check_devices(roots[_DEVICE_TREE], [extent for extent, _, _ in stripes])
        groups: dict[int, _Group] = {}
        used = Extents.from_sorted(self._read_extents(roots[_EXTENT_TREE], groups))
        if self._superblock.read_only_compat & BLOCK_GROUP_TREE:
            for item in self.trees.walk(roots[_BLOCK_GROUP_TREE], self._nodes):
                require(item.key[1] == _BLOCK_GROUP_ITEM, f"a block group tree with {item.key}")
                _add_group(groups, item)
        self._check_accounts(used, groups)
        return used

    def _read_chunks(self, trees: Trees) -> ChunkMap:
        """Raises NotRecognized when devices are not as the superblock has them."""
        superblock = self._superblock
        devices, chunks = {}, []
        for (_, type_, offset), data in trees.walk(superblock.chunk_tree, self._nodes):
            if type_ == _DEVICE_ITEM:
                devices[offset] = DeviceItem.parse(data)
            elif type_ == CHUNK_ITEM:
                chunks.append(Chunk.parse(offset, data, superblock.sector_size))
            else:
                raise NotRecognized(f"a chunk tree with items of type {type_}")
        require(len(devices) == superblock.devices, f"{len(devices)} devices, not as it says")
        require(
            all(device.fsid == superblock.metadata_fsid for device in devices.values()),
            "it has seed devices",
        )
        require(
            devices.get(superblock.device.id) == superblock.device,
            "the superblock and the chunk tree differ about this device",
        )
        return ChunkMap(chunks)

    def _read_roots(self) -> dict[int, TreeRoot]:
        """The trees that the root tree names; a balance at work is a doubt."""
        wanted = {_EXTENT_TREE, _DEVICE_TREE}
        if self._superblock.read_only_compat & BLOCK_GROUP_TREE:
            wanted.add(_BLOCK_GROUP_TREE)
        roots = {}
        for (objectid, type_, _), data in self.trees.walk(self._superblock.root_tree, self._nodes):
            require((objectid, type_) not in _BALANCING, "a balance is at work")
            if type_ == _ROOT_ITEM and objectid in wanted:
                roots[objectid] = tree_root(data, objectid)
        require(roots.keys() == wanted, "a tree is missing in the root tree")
        return roots

    def _check_devices(self, root: TreeRoot, expected: list[DeviceExtent]) -> None:
        """The device tree says the same as the chunks; no device is being replaced."""
        found = []
        for (objectid, type_, offset), data in self.trees.walk(root, self._nodes):
            if type_ == _DEVICE_REPLACE:
                (state,) = _fields(_REPLACE_STATE, data)
                require(state in _REPLACE_OVER, "a device is being replaced")
            elif type_ == _DEVICE_EXTENT and objectid == self._superblock.device.id:
                _, _, chunk, length = _fields(_DEVICE_EXTENT_FIELDS, data)
                found.append(DeviceExtent(offset, length, chunk))
        require(found == expected, "the device tree and the chunk tree differ")

    def _read_extents(self, root: TreeRoot, groups: dict[int, _Group]) -> Iterator[tuple[int, int]]:
        """Extents of data and tree nodes as ascending (address, length); fills ``groups``."""
        end, sector_size = 0, self._superblock.sector_size
        for item in self.trees.walk(root, self._nodes):
            start, type_, length = item.key
            if type_ == _METADATA_ITEM:
                length = self._superblock.node_size
            elif type_ != _EXTENT_ITEM:
                if type_ == _BLOCK_GROUP_ITEM:
                    _add_group(groups, item)
                else:
                    require(type_ in _BACK_REFERENCES, f"an extent item of type {type_}")
                continue
            require(
                start >= end
                and length > 0
                and (start | length) % sector_size == 0
                and start + length < 1 << 63,
                f"an odd extent at {start}",
            )
            end = start + length
            yield start, length

    def _check_accounts(self, used: Extents, groups: dict[int, _Group]) -> None:
        """Every chunk has a block group that counts the same; what was read is in use."""
        require(
            {start: group.length for start, group in groups.items()}
            == {chunk.start: chunk.length for chunk in self.chunks.chunks},
            "the block groups are not those of the chunks",
        )
        for start, group in groups.items():
            counted = sum(extent.length for extent in used.within(start, group.length))
            require(
                counted == group.used,
                f"the block group at {start} counts {group.used} bytes, its extents {counted}",
            )
        total = sum(group.used for group in groups.values())
        require(total == used.total == self._superblock.used, "the used bytes do not add up")
        size = self._superblock.node_size
        require(
            all(used.covers(address, size) for address in self._nodes),
            "the extent tree calls a tree node free",
        )


class _LogTrees:
    """What was synced since the last commit (fs/btrfs/tree-log.c)."""

    def __init__(self, superblock: Superblock, trees: Trees, chunks: ChunkMap) -> None:
        self._superblock = superblock
        self._trees = trees
        self._chunks = chunks

    def used(self) -> Extents:
        """Logical ranges: the logs' nodes, and the data that they refer to. Empty without one."""
        superblock = self._superblock
        if not superblock.log_root:
            return Extents()
        root = TreeRoot(
            superblock.log_root, superblock.log_root_level, superblock.generation + 1, _TREE_LOG
        )
        nodes = array("Q")
        data: list[tuple[int, int]] = []
        for (_, type_, _), raw in self._trees.walk(root, nodes):
            require(type_ == _ROOT_ITEM, f"a log root tree with items of type {type_}")
            log = tree_root(raw, _TREE_LOG)
            data += filter(None, map(self._extent, self._trees.walk(log, nodes)))
        return Extents([*((address, superblock.node_size) for address in nodes), *data])

    def _extent(self, item: Item) -> tuple[int, int] | None:
        """Where a file's extent lies, unless it is a hole or in the leaf itself."""
        if item.key[1] != _EXTENT_DATA:
            return None
        if item.data[_FILE_EXTENT_TYPE : _FILE_EXTENT_TYPE + 1] == _INLINE:
            return None
        *_, address, length = _fields(_FILE_EXTENT, item.data)
        if address == 0:
            return None
        self._chunks.chunk_of(address, length)
        return address, length


def tree_root(data: bytes, owner: int) -> TreeRoot:
    generation, _, address, level = _fields(_ROOT, data)
    return TreeRoot(address, level, generation, owner)


def _fields(form: struct.Struct, data: bytes) -> tuple[int, ...]:
    """Of an item that may be longer. Raises NotRecognized when it is shorter."""
    require(len(data) >= form.size, f"an item of {len(data)} bytes is cut short")
    return form.unpack_from(data)


def _add_group(groups: dict[int, _Group], item: Item) -> None:
    start, _, length = item.key
    used, _, _ = _fields(_BLOCK_GROUP_FIELDS, item.data)
    groups[start] = _Group(length, used)
