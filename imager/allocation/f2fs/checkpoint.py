"""Checkpoint packs: what was true when F2FS last wrote everything down.

There are two; the newer one that is whole counts. Source: Linux include/linux/f2fs_fs.h and
fs/f2fs/checkpoint.c, segment.c, recovery.c; integers little-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from imager.allocation.f2fs.layout import (
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    Superblock,
    checksum,
)
from imager.allocation.model import require
from imager.blocksource import BlockSource
from imager.errors import NotRecognized, UnsupportedError

_UNMOUNTED, _COMPACT_SUMMARIES, _LARGE_NAT_BITMAP = 0x1, 0x4, 0x400
# Unmounted, orphans, compact summaries, fast boot, CRC recovery, NAT bits, trimmed, no CRC
# recovery, large NAT bitmap, quota wants fsck
_FLAGS_HARMLESS = 0x1 | 0x2 | 0x4 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800

_BITMAPS_OFFSET = 192  # bytes; sit_nat_version_bitmap
_LAST_CHECKSUM_OFFSET = BLOCK_SIZE - 4
_WARM_NODE, _COLD_DATA = 1, 2  # among the node logs, among the data logs
_SUMMARY_BLOCKS_AT_END = 7  # three data logs, three node logs, and the pack's last block

_SUMMARY_ENTRIES_SIZE = 7 * BLOCKS_PER_SEGMENT  # bytes
_JOURNAL_SIZE = BLOCK_SIZE - 5 - _SUMMARY_ENTRIES_SIZE  # bytes; 5 for the footer
_NODE_FOOTER_VERSION = BLOCK_SIZE - 12  # bytes; cp_ver in struct node_footer


class Checkpoint(NamedTuple):
    """The head block of a pack. Places are block numbers."""

    start: int
    raw: bytes
    version: int
    flags: int
    pack_blocks: int
    summaries_start: int
    valid_blocks: int
    valid_nodes: int
    sit_bitmap_size: int
    nat_bitmap_size: int
    checksum: int

    def check_usable(self) -> None:
        """Raises UnsupportedError for flags that are not known, NotRecognized when it wasn't
        written by an unmount: what came after it can then be rolled forward."""
        require(bool(self.flags & _UNMOUNTED), "it was not unmounted")
        if self.flags & ~_FLAGS_HARMLESS:
            raise UnsupportedError(
                f"it waits for repair, resizing or enabling (flags {self.flags:#x})"
            )

    def check_nothing_follows(self, source: BlockSource, superblock: Superblock) -> None:
        """Raises NotRecognized when blocks were synced after the checkpoint, before the next one:
        a mount would find them through the log of warm nodes (find_fsync_dnodes)."""
        (segment,) = struct.unpack_from("<I", self.raw, 36 + 4 * _WARM_NODE)
        (offset,) = struct.unpack_from("<H", self.raw, 68 + 2 * _WARM_NODE)
        require(
            segment < superblock.main_segments and offset <= BLOCKS_PER_SEGMENT,
            "the checkpoint's current segments are impossible",
        )
        block = superblock.main + segment * BLOCKS_PER_SEGMENT + offset
        if block >= superblock.main_end:
            return
        node = source.pread(block * BLOCK_SIZE, BLOCK_SIZE)
        (version,) = struct.unpack_from("<Q", node, _NODE_FOOTER_VERSION)
        # The upper half may hold the checkpoint's checksum; without that the lower half decides.
        require(
            version & 0xFFFFFFFF != self.version & 0xFFFFFFFF,
            "files were synced after its last checkpoint",
        )

    def sit_versions(self, source: BlockSource, superblock: Superblock) -> bytes:
        """Which copy of each block of the segment information table counts; first bit highest
        (__bitmap_ptr in f2fs.h)."""
        size = superblock.sit_blocks // 8
        require(self.sit_bitmap_size == size, "the checkpoint's bitmaps have a wrong size")
        if self.flags & _LARGE_NAT_BITMAP:
            offset = _BITMAPS_OFFSET + 4 + self.nat_bitmap_size
        elif superblock.checkpoint_payload:
            offset = BLOCK_SIZE
        else:
            offset = _BITMAPS_OFFSET
        end = (1 + superblock.checkpoint_payload) * BLOCK_SIZE
        require(offset + size <= end, "the checkpoint's bitmaps don't fit")
        return source.pread(self.start * BLOCK_SIZE + offset, size)

    def sit_journal(self, source: BlockSource) -> bytes:
        """Newer entries of the segment information table, kept beside the summaries."""
        if self.flags & _COMPACT_SUMMARIES:
            block, offset = self.start + self.summaries_start, _JOURNAL_SIZE
        else:
            block = self.start + self.pack_blocks - _SUMMARY_BLOCKS_AT_END + _COLD_DATA
            offset = _SUMMARY_ENTRIES_SIZE
        return source.pread(block * BLOCK_SIZE + offset, _JOURNAL_SIZE)


def newest_checkpoint(source: BlockSource, superblock: Superblock) -> Checkpoint:
    """Raises NotRecognized when no pack is whole, OSError."""
    starts = (superblock.checkpoint, superblock.checkpoint + BLOCKS_PER_SEGMENT)
    whole = [found for start in starts if (found := _whole_pack(source, superblock, start))]
    if not whole:
        raise NotRecognized("no checkpoint is whole")
    # With the same version (f2fs-tools leaves such), the first, as f2fs_get_valid_checkpoint does.
    return max(whole, key=lambda found: found.version)


def _whole_pack(source: BlockSource, superblock: Superblock, start: int) -> Checkpoint | None:
    """The pack at a block, if its first and last block are sound and the same
    (validate_checkpoint in checkpoint.c)."""
    head = _sound_block(source, start)
    if head is None:
        return None
    fewest = 2 + superblock.checkpoint_payload + 1
    if not fewest <= head.pack_blocks <= BLOCKS_PER_SEGMENT:
        return None
    if not 0 < head.summaries_start < head.pack_blocks:
        return None
    tail = _sound_block(source, start + head.pack_blocks - 1)
    return head if tail is not None and tail.version == head.version else None


def _sound_block(source: BlockSource, block: int) -> Checkpoint | None:
    raw = source.pread(block * BLOCK_SIZE, BLOCK_SIZE)
    (checksum_offset,) = struct.unpack_from("<I", raw, 164)
    if not _BITMAPS_OFFSET <= checksum_offset <= _LAST_CHECKSUM_OFFSET:
        return None
    computed = checksum(raw[:checksum_offset])
    if checksum_offset < _LAST_CHECKSUM_OFFSET:
        computed = checksum(raw[checksum_offset + 4 :], computed)
    (stored,) = struct.unpack_from("<I", raw, checksum_offset)
    if stored != computed:
        return None
    version, _, valid_blocks = struct.unpack_from("<QQQ", raw, 0)
    flags, pack_blocks, summaries_start, valid_nodes = struct.unpack_from("<4I", raw, 132)
    sit_bitmap_size, nat_bitmap_size = struct.unpack_from("<II", raw, 156)
    return Checkpoint(
        block,
        raw,
        version,
        flags,
        pack_blocks,
        summaries_start,
        valid_blocks,
        valid_nodes,
        sit_bitmap_size,
        nat_bitmap_size,
        stored,
    )
