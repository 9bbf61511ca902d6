"""The superblock of a Btrfs, and its copies on a device.

Source: Linux include/uapi/linux/btrfs_tree.h (struct btrfs_super_block, btrfs_dev_item),
fs/btrfs/fs.h (feature bits), fs/btrfs/disk-io.c (btrfs_validate_super). Integers little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from imager.allocation.btrfs.digest import digest_of
from imager.allocation.model import read_if_inside, require
from imager.blocksource import BlockSource
from imager.errors import NotRecognized, UnsupportedError

MAGIC = b"_BHRfS_M"
SUPERBLOCK_SIZE = 4096  # bytes
SUPERBLOCKS = (64 << 10, 64 << 20, 256 << 30)  # bytes; the first is the one that is mounted

EXTENT_TREE_V2 = 1 << 13
BLOCK_GROUP_TREE = 1 << 3
_METADATA_UUID = 1 << 10
_KNOWN_INCOMPAT = {
    1 << 0: "mixed back references",
    1 << 1: "default subvolume",
    1 << 2: "mixed block groups",
    1 << 3: "lzo",
    1 << 4: "zstd",
    1 << 5: "big metadata",
    1 << 6: "extended inode references",
    1 << 7: "RAID5/6",
    1 << 8: "skinny metadata",
    1 << 9: "no holes",
    _METADATA_UUID: "metadata UUID",
    1 << 11: "RAID1 with 3 or 4 copies",
    1 << 16: "simple quota",
}
# Known by name, but they change where things lie.
_REFUSED_INCOMPAT = {
    1 << 12: "zoned devices",
    EXTENT_TREE_V2: "extent tree v2",
    1 << 14: "the RAID stripe tree",
}
_KNOWN_READ_ONLY_COMPAT = 1 << 0 | 1 << 1 | 1 << 2 | BLOCK_GROUP_TREE  # free space tree, verity
_MIXED_BACK_REFERENCES = 1 << 0

_FLAG_WRITTEN = 1 << 0
_FLAG_SEEDING = 1 << 32

_FIXED = struct.Struct("<16sQQ8s9Q5I")  # from fsid to sys_chunk_array_size
_FEATURES = struct.Struct("<4QHBBB")  # from chunk_root_generation to log_root_level
_DEVICE = struct.Struct("<QQQ")  # devid, total_bytes, bytes_used
_CHUNK_ARRAY = 0x32B
_CHUNK_ARRAY_SIZE = 2048


@dataclass(frozen=True)
class DeviceItem:
    """One device of the filesystem (struct btrfs_dev_item); sizes in bytes."""

    id: int
    size: int
    allotted: int
    uuid: bytes
    fsid: bytes

    SIZE = 98

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Raises NotRecognized when it is too short."""
        require(len(raw) >= cls.SIZE, "a device item is cut short")
        number, size, allotted = _DEVICE.unpack_from(raw)
        return cls(number, size, allotted, uuid=raw[66:82], fsid=raw[82:98])


@dataclass(frozen=True)
class TreeRoot:
    """Where a tree starts: a logical byte address, and what its first node must say."""

    address: int
    level: int
    generation: int
    owner: int


@dataclass(frozen=True)
class Superblock:
    """The fields that the map needs. Sizes and addresses in bytes."""

    fsid: bytes
    metadata_fsid: bytes
    """What tree nodes and device items carry."""
    flags: int
    generation: int
    root: int
    root_level: int
    chunk_root: int
    chunk_root_level: int
    chunk_root_generation: int
    log_root: int
    log_root_level: int
    used: int
    """By all devices together, counting each logical byte once."""
    devices: int
    sector_size: int
    node_size: int
    incompat: int
    read_only_compat: int
    digest_kind: int
    device: DeviceItem
    chunk_array: bytes

    @classmethod
    def parse(cls, raw: bytes, offset: int) -> Self:
        """``raw`` was read at ``offset``. Raises NotRecognized unless it is sound."""
        require(len(raw) == SUPERBLOCK_SIZE and raw[0x40:0x48] == MAGIC, "no superblock")
        fields = _FIXED.unpack_from(raw, 0x20)
        fsid, place, flags, _, generation, root, chunk_root, log_root, _, _, used, _, devices = (
            fields[:13]
        )
        sector_size, node_size, leaf_size, _, array_size = fields[13:]
        chunk_generation, _, read_only_compat, incompat, kind, *levels = _FEATURES.unpack_from(
            raw, 0xA4
        )
        digest = digest_of(kind, raw[32:])
        require(raw[: len(digest)] == digest, "the checksum of the superblock is wrong")
        require(place == offset, "the superblock is not where it says")
        require(leaf_size == node_size, "nodes and leaves differ in size")
        require(array_size <= _CHUNK_ARRAY_SIZE, "the system chunk array is too long")
        return cls(
            fsid=fsid,
            metadata_fsid=raw[0x23B:0x24B] if incompat & _METADATA_UUID else fsid,
            flags=flags,
            generation=generation,
            root=root,
            root_level=levels[0],
            chunk_root=chunk_root,
            chunk_root_level=levels[1],
            chunk_root_generation=chunk_generation,
            log_root=log_root,
            log_root_level=levels[2],
            used=used,
            devices=devices,
            sector_size=sector_size,
            node_size=node_size,
            incompat=incompat,
            read_only_compat=read_only_compat,
            digest_kind=kind,
            device=DeviceItem.parse(raw[0xC9 : 0xC9 + DeviceItem.SIZE]),
            chunk_array=raw[_CHUNK_ARRAY : _CHUNK_ARRAY + array_size],
        )

    def check(self, source_size: int) -> None:
        """Raises UnsupportedError for features that are not known, NotRecognized for values that
        can't be."""
        self._check_features()
        require(_is_page(self.sector_size), f"a sector size of {self.sector_size}")
        require(
            _is_page(self.node_size) and self.node_size >= self.sector_size,
            f"a node size of {self.node_size}",
        )
        require(not self.flags & _FLAG_SEEDING, "it is a seed device")
        require(not self.flags & ~_FLAG_WRITTEN, f"superblock flags {self.flags:#x}")
        require(self.device.fsid == self.metadata_fsid, "the superblock is of two filesystems")
        require(self.device.id > 0, "a device replacement has not ended")
        require(
            SUPERBLOCKS[0] + SUPERBLOCK_SIZE <= self.device.size <= source_size,
            f"it says that it has {self.device.size} bytes, but there are only {source_size}",
        )

    def _check_features(self) -> None:
        for bit, name in _REFUSED_INCOMPAT.items():
            if self.incompat & bit:
                raise UnsupportedError(f"it uses {name}")
        unknown = self.incompat & ~sum(_KNOWN_INCOMPAT)
        if unknown:
            raise UnsupportedError(f"unknown incompat feature bits {unknown:#x}")
        unknown = self.read_only_compat & ~_KNOWN_READ_ONLY_COMPAT
        if unknown:
            raise UnsupportedError(f"unknown compat_ro feature bits {unknown:#x}")
        if not self.incompat & _MIXED_BACK_REFERENCES:
            raise UnsupportedError("its back references are of the old kind")

    @property
    def root_tree(self) -> TreeRoot:
        return TreeRoot(self.root, self.root_level, self.generation, 1)

    @property
    def chunk_tree(self) -> TreeRoot:
        return TreeRoot(self.chunk_root, self.chunk_root_level, self.chunk_root_generation, 3)


def read_superblock(source: BlockSource) -> Superblock:
    """The first superblock, which is the one that the kernel mounts.

    Raises NotRecognized when it is not sound, or when a later copy is newer: the kernel writes
    all of them in one go, so that then nobody can say which one counts. A copy that is older or
    damaged says nothing (after an fsync only the first is written).
    """
    first, *copies = SUPERBLOCKS
    superblock = Superblock.parse(read_if_inside(source, first, SUPERBLOCK_SIZE), first)
    for offset in copies:
        try:
            copy = Superblock.parse(read_if_inside(source, offset, SUPERBLOCK_SIZE), offset)
        except NotRecognized:
            continue
        if (copy.fsid, copy.device.uuid) == (superblock.fsid, superblock.device.uuid):
            require(
                copy.generation <= superblock.generation,
                f"the superblock at byte {offset} is newer than the first",
            )
    return superblock


def _is_page(size: int) -> bool:
    """Sizes of sectors and nodes: powers of two from 4 to 64 KiB."""
    return 4096 <= size <= 65536 and size & (size - 1) == 0
