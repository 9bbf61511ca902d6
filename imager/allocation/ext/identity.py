"""Name, UUID and size of an ext filesystem, from its superblock alone."""

from __future__ import annotations

from imager.allocation.ext.layout import (
    INCOMPAT_JOURNAL_DEV,
    STATE_ERROR,
    STATE_VALID,
    SUPERBLOCK_OFFSET,
    SUPERBLOCK_SIZE,
    Superblock,
)
from imager.allocation.model import Filesystem, read_if_inside, text, uuid_text
from imager.blocksource import BlockSource
from imager.errors import ImagerError, NotRecognized

# What the old drivers understood; anything beyond makes it ext4 (as libblkid decides).
_EXT3_INCOMPAT = 0x2 | 0x4 | 0x10
_EXT3_RO_COMPAT = 0x1 | 0x2 | 0x4


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None when there is no ext superblock. Raises OSError."""
    try:
        superblock = Superblock.parse(read_if_inside(source, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE))
    except NotRecognized:
        return None
    return Filesystem(
        kind=_kind(superblock),
        label=text(superblock.label),
        uuid=uuid_text(superblock.uuid),
        size=superblock.size,
        used_bytes=max(superblock.blocks_count - superblock.free_blocks, 0) * superblock.block_size,
        block_size=superblock.block_size,
        notes=tuple(_notes(superblock, source.size)),
    )


def _kind(superblock: Superblock) -> str:
    if superblock.incompat & INCOMPAT_JOURNAL_DEV:
        return "jbd"
    if superblock.incompat & ~_EXT3_INCOMPAT or superblock.ro_compat & ~_EXT3_RO_COMPAT:
        return "ext4"
    return "ext3" if superblock.has_journal else "ext2"


def _notes(superblock: Superblock, source_size: int) -> list[str]:
    notes = []
    if superblock.needs_recovery:
        notes.append("its journal needs recovery")
    if superblock.state & STATE_ERROR:
        notes.append("it is marked as having errors")
    if not superblock.has_journal and not superblock.state & STATE_VALID:
        notes.append("it is mounted or was not unmounted cleanly")
    try:
        superblock.check(source_size)
    except ImagerError as doubt:
        notes.append(doubt.message)
    return notes
