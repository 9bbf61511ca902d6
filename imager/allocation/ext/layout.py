"""The ext2/3/4 superblock and group descriptors: bytes to values, and where things lie.

Source: Linux fs/ext4/ext4.h and Documentation/filesystems/ext4/. All integers little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

from imager.allocation.checksum import crc16, crc32c
from imager.allocation.model import require
from imager.errors import NotRecognized, UnsupportedError

SUPERBLOCK_OFFSET = 1024  # bytes; the boot block lies before it
SUPERBLOCK_SIZE = 1024

MAGIC = 0xEF53
STATE_VALID, STATE_ERROR = 1, 2
CHECKSUM_CRC32C = 1

# 64 TiB of 4 KiB blocks; bounds memory when a damaged superblock claims tiny groups.
MAX_GROUPS = 1 << 19

COMPAT_HAS_JOURNAL = 0x4
COMPAT_SPARSE_SUPER2 = 0x200

INCOMPAT_RECOVER = 0x4
INCOMPAT_JOURNAL_DEV = 0x8
INCOMPAT_META_BG = 0x10
INCOMPAT_64BIT = 0x80
INCOMPAT_MMP = 0x100
INCOMPAT_CSUM_SEED = 0x2000
# filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir,
# inline_data, encrypt, casefold
INCOMPAT_KNOWN = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x3E000 & ~0x1000

RO_COMPAT_SPARSE_SUPER = 0x1
RO_COMPAT_GDT_CSUM = 0x10
RO_COMPAT_BIGALLOC = 0x200
RO_COMPAT_METADATA_CSUM = 0x400
# sparse_super, large_file, btree_dir, huge_file, uninit_bg, dir_nlink, extra_isize, quota,
# bigalloc, metadata_csum, read-only, project, verity, orphan_present
RO_COMPAT_KNOWN = 0x7F | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x8000 | 0x10000

_GROUP_BLOCK_UNINIT = 0x2

# block and inode bitmap, inode table, free clusters, flags, bitmap checksum, checksum
_DESCRIPTOR_LOW = "IIIH4xH4xH4xH"
_DESCRIPTOR_HIGH = "IIIH10xH6x"
_DESCRIPTOR_CHECKSUM_OFFSET = 0x1E


class Group(NamedTuple):
    """One group descriptor. Places are block numbers."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_clusters: int
    flags: int
    bitmap_checksum: int


@dataclass(frozen=True)
class Superblock:
    """What the map needs of a superblock. Counts in blocks unless the name says otherwise."""

    raw: bytes
    inodes_count: int
    blocks_count: int
    free_blocks: int
    first_data_block: int
    block_size: int
    cluster_size: int
    blocks_per_group: int
    clusters_per_group: int
    inodes_per_group: int
    state: int
    revision: int
    inode_size: int
    copy_in_group: int
    compat: int
    incompat: int
    ro_compat: int
    uuid: bytes
    label: bytes
    reserved_gdt_blocks: int
    journal_inode: int
    journal_device: int
    journal_backup: bytes
    descriptor_size: int
    first_meta_bg: int
    mmp_block: int
    checksum_type: int
    backup_groups: tuple[int, int]

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """From the 1024 bytes at 1024. Raises NotRecognized without magic or sane block size."""

        def at(offset: int, code: str) -> int:
            return int(struct.unpack_from(f"<{code}", raw, offset)[0])

        require(len(raw) == SUPERBLOCK_SIZE and at(0x38, "H") == MAGIC, "no ext superblock")
        require(at(0x18, "I") <= 6, "the superblock's block size is above 64 KiB")
        require(at(0x20, "I") > 0, "the superblock has empty groups")
        revision, incompat, ro_compat = at(0x4C, "I"), at(0x60, "I"), at(0x64, "I")
        wide = incompat & INCOMPAT_64BIT
        bigalloc = ro_compat & RO_COMPAT_BIGALLOC
        log_cluster_size = at(0x1C, "I") if bigalloc else at(0x18, "I")
        require(log_cluster_size <= 20, "the superblock's cluster size is above 1 GiB")
        return cls(
            raw=raw,
            inodes_count=at(0x0, "I"),
            blocks_count=at(0x4, "I") | (at(0x150, "I") << 32 if wide else 0),
            free_blocks=at(0xC, "I") | (at(0x158, "I") << 32 if wide else 0),
            first_data_block=at(0x14, "I"),
            block_size=1024 << at(0x18, "I"),
            cluster_size=1024 << log_cluster_size,
            blocks_per_group=at(0x20, "I"),
            clusters_per_group=at(0x24, "I") if bigalloc else at(0x20, "I"),
            inodes_per_group=at(0x28, "I"),
            state=at(0x3A, "H"),
            revision=revision,
            inode_size=at(0x58, "H") if revision else 128,
            copy_in_group=at(0x5A, "H"),
            compat=at(0x5C, "I"),
            incompat=incompat,
            ro_compat=ro_compat,
            uuid=raw[0x68:0x78],
            label=raw[0x78:0x88],
            reserved_gdt_blocks=at(0xCE, "H"),
            journal_inode=at(0xE0, "I"),
            journal_device=at(0xE4, "I"),
            journal_backup=raw[0x10C:0x150] if raw[0xFD] == 1 else b"",
            descriptor_size=at(0xFE, "H") if wide else 32,
            first_meta_bg=at(0x104, "I"),
            mmp_block=at(0x168, "Q"),
            checksum_type=raw[0x175],
            backup_groups=(at(0x24C, "I"), at(0x250, "I")),
        )

    # --- features -----------------------------------------------------------------------------

    @property
    def has_metadata_checksums(self) -> bool:
        return bool(self.ro_compat & RO_COMPAT_METADATA_CSUM)

    @property
    def has_descriptor_checksums(self) -> bool:
        return bool(self.ro_compat & (RO_COMPAT_GDT_CSUM | RO_COMPAT_METADATA_CSUM))

    @property
    def has_journal(self) -> bool:
        return bool(self.compat & COMPAT_HAS_JOURNAL)

    @property
    def needs_recovery(self) -> bool:
        return bool(self.incompat & INCOMPAT_RECOVER)

    @cached_property
    def checksum_seed(self) -> int:
        """CRC-32C register that every metadata checksum starts from."""
        if self.incompat & INCOMPAT_CSUM_SEED:
            return int.from_bytes(self.raw[0x270:0x274], "little")
        return crc32c(0xFFFFFFFF, self.uuid)

    # --- geometry -----------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes."""
        return self.blocks_count * self.block_size

    @property
    def blocks_per_cluster(self) -> int:
        return self.cluster_size // self.block_size

    @property
    def own_block(self) -> int:
        """The block that holds this superblock."""
        return SUPERBLOCK_OFFSET // self.block_size

    @property
    def group_count(self) -> int:
        return -(-(self.blocks_count - self.first_data_block) // self.blocks_per_group)

    @property
    def descriptors_per_block(self) -> int:
        return self.block_size // self.descriptor_size

    @property
    def descriptor_block_count(self) -> int:
        return -(-self.group_count // self.descriptors_per_block)

    @property
    def inode_table_blocks(self) -> int:
        """Blocks of one group's inode table."""
        return -(-self.inodes_per_group * self.inode_size // self.block_size)

    def first_block(self, group: int) -> int:
        return self.first_data_block + group * self.blocks_per_group

    def clusters_in(self, group: int) -> int:
        """Clusters of a group; the last group may be short."""
        blocks = min(self.blocks_per_group, self.blocks_count - self.first_block(group))
        return -(-blocks // self.blocks_per_cluster)

    def has_superblock(self, group: int) -> bool:
        """Whether a group starts with a superblock (fs/ext4/balloc.c: ext4_bg_has_super)."""
        if group == 0:
            return True
        if self.compat & COMPAT_SPARSE_SUPER2:
            return group in self.backup_groups
        if group == 1 or not self.ro_compat & RO_COMPAT_SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def descriptor_block(self, index: int) -> int:
        """Where the ``index``-th block of group descriptors lies (descriptor_loc in super.c)."""
        if not self.incompat & INCOMPAT_META_BG or index < self.first_meta_bg:
            return self.own_block + 1 + index
        group = index * self.descriptors_per_block
        if group == 0:
            return self.own_block + 1
        return self.first_block(group) + self.has_superblock(group)

    def overhead_blocks(self, group: int) -> int:
        """Superblock, descriptor and reserved descriptor blocks at a group's start
        (ext4_num_base_meta_blocks in balloc.c)."""
        has_superblock = self.has_superblock(group)
        meta_group, position = divmod(group, self.descriptors_per_block)
        if self.incompat & INCOMPAT_META_BG and meta_group >= self.first_meta_bg:
            return has_superblock + (position in (0, 1, self.descriptors_per_block - 1))
        if not has_superblock:
            return 0
        boot_block = self.own_block if group == 0 and self.first_data_block == 0 else 0
        uses_meta_bg = self.incompat & INCOMPAT_META_BG
        descriptors = self.first_meta_bg if uses_meta_bg else self.descriptor_block_count
        return boot_block + 1 + descriptors + self.reserved_gdt_blocks

    # --- checks -------------------------------------------------------------------------------

    def check(self, source_size: int) -> None:
        """Raises UnsupportedError for unknown features, NotRecognized for any inconsistency."""
        self._check_features()
        self._check_checksum()
        self._check_geometry()
        require(
            self.size <= source_size,
            f"the filesystem has {self.size} bytes, the source only {source_size}",
        )

    def _check_features(self) -> None:
        require(self.revision <= 1, f"unknown revision {self.revision}")
        require(
            self.revision == 1 or not (self.compat or self.incompat or self.ro_compat),
            "features in a revision 0 filesystem",
        )
        if self.incompat & INCOMPAT_JOURNAL_DEV:
            raise UnsupportedError("an external journal device")
        for name, flags, known in (
            ("incompat", self.incompat, INCOMPAT_KNOWN),
            ("ro_compat", self.ro_compat, RO_COMPAT_KNOWN),
        ):
            if flags & ~known:
                raise UnsupportedError(f"unknown {name} feature bits {flags & ~known:#x}")

    def _check_checksum(self) -> None:
        if not self.has_metadata_checksums:
            return
        require(self.checksum_type == CHECKSUM_CRC32C, "unknown checksum type")
        stored = int.from_bytes(self.raw[0x3FC:], "little")
        require(
            crc32c(0xFFFFFFFF, self.raw[:0x3FC]) == stored, "the superblock's checksum is wrong"
        )

    def _check_geometry(self) -> None:
        bigalloc = bool(self.ro_compat & RO_COMPAT_BIGALLOC)
        bits = self.block_size * 8
        require(
            self.first_data_block == (self.block_size == 1024 and not bigalloc),
            "wrong first data block",
        )
        require(self.first_data_block < self.blocks_count, "no blocks")
        require(
            self.clusters_per_group * self.blocks_per_cluster == self.blocks_per_group
            and self.clusters_per_group % 8 == 0
            and 0 < self.clusters_per_group <= bits,
            "impossible group size",
        )
        require(self.group_count <= MAX_GROUPS, f"more than {MAX_GROUPS} groups")
        require(
            128 <= self.inode_size <= self.block_size and _is_power(self.inode_size, 2),
            "impossible inode size",
        )
        require(
            0 < self.inodes_per_group <= bits
            and self.inodes_count == self.group_count * self.inodes_per_group,
            "impossible inode count",
        )
        smallest = 64 if self.incompat & INCOMPAT_64BIT else 32
        require(
            smallest <= self.descriptor_size <= self.block_size
            and _is_power(self.descriptor_size, 2),
            "impossible descriptor size",
        )
        require(self.first_meta_bg <= self.descriptor_block_count, "impossible first_meta_bg")
        require(self.reserved_gdt_blocks <= self.block_size // 4, "too many reserved blocks")
        require(self.copy_in_group == 0, "the primary superblock says it is a copy")

    # --- group descriptors --------------------------------------------------------------------

    def groups(self, table: bytes) -> Iterator[Group]:
        """Parses and checks all descriptors in ``table``; they start at its start.

        Raises NotRecognized for a wrong checksum or a place outside of the filesystem.
        """
        for index, group in enumerate(self._parse_groups(table)):
            self._check_group(index, group)
            if self.has_descriptor_checksums:
                at = index * self.descriptor_size
                self._check_descriptor(index, table[at : at + self.descriptor_size])
            yield group

    def group(self, index: int, raw: bytes) -> Group:
        """Parses and checks one descriptor; errors as ``groups``."""
        group = self._parse_group(next(self._descriptor_format.iter_unpack(raw)))
        self._check_group(index, group)
        if self.has_descriptor_checksums:
            self._check_descriptor(index, raw)
        return group

    def is_uninitialized(self, group: Group) -> bool:
        """Whether the group's block bitmap was never written: only its metadata is used."""
        return self.has_descriptor_checksums and bool(group.flags & _GROUP_BLOCK_UNINIT)

    @cached_property
    def _descriptor_format(self) -> struct.Struct:
        if self.descriptor_size < 64:
            return struct.Struct(f"<{_DESCRIPTOR_LOW}{self.descriptor_size - 32}x")
        return struct.Struct(f"<{_DESCRIPTOR_LOW}{_DESCRIPTOR_HIGH}{self.descriptor_size - 64}x")

    def _parse_groups(self, table: bytes) -> Iterator[Group]:
        descriptors = memoryview(table)[: self.group_count * self.descriptor_size]
        return map(self._parse_group, self._descriptor_format.iter_unpack(descriptors))

    def _parse_group(self, fields: tuple[int, ...]) -> Group:
        block_bitmap, inode_bitmap, inode_table, free, flags, bitmap_checksum, _ = fields[:7]
        if len(fields) == 7:
            return Group(block_bitmap, inode_bitmap, inode_table, free, flags, bitmap_checksum)
        return Group(
            block_bitmap | fields[7] << 32,
            inode_bitmap | fields[8] << 32,
            inode_table | fields[9] << 32,
            free | fields[10] << 16,
            flags,
            bitmap_checksum | fields[11] << 16,
        )

    def _check_group(self, index: int, group: Group) -> None:
        low, high = self.first_data_block, self.blocks_count
        if not (
            low < group.block_bitmap < high
            and low < group.inode_bitmap < high
            and low < group.inode_table <= high - self.inode_table_blocks
        ):
            raise NotRecognized(f"group {index} has its metadata outside of the filesystem")

    def _check_descriptor(self, index: int, raw: bytes) -> None:
        at = _DESCRIPTOR_CHECKSUM_OFFSET
        stored = raw[at] | raw[at + 1] << 8
        number = index.to_bytes(4, "little")
        if self.has_metadata_checksums:
            data = b"".join((number, raw[:at], bytes(2), raw[at + 2 :]))
            computed = crc32c(self.checksum_seed, data) & 0xFFFF
        else:
            computed = crc16(self._uuid_crc16, b"".join((number, raw[:at], raw[at + 2 :])))
        if stored != computed:
            raise NotRecognized(f"the checksum of group descriptor {index} is wrong")

    @cached_property
    def _uuid_crc16(self) -> int:
        return crc16(0xFFFF, self.uuid)


def _is_power(number: int, base: int) -> bool:
    power = base
    while power < number:
        power *= base
    return power == number
