"""Name, UUID and size of an XFS, from its superblock alone."""

from __future__ import annotations

from imager.allocation.model import Filesystem, read_if_inside, text, uuid_text
from imager.allocation.xfs.layout import MAGIC, SMALLEST_SECTOR, Superblock
from imager.blocksource import BlockSource


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    raw = read_if_inside(source, 0, SMALLEST_SECTOR)
    if raw[: len(MAGIC)] != MAGIC:
        return None
    superblock = Superblock.parse(raw)
    return Filesystem(
        kind="xfs",
        label=text(superblock.label),
        uuid=uuid_text(superblock.uuid),
        size=superblock.size,
        used_bytes=max(superblock.blocks_count - superblock.free_blocks, 0) * superblock.block_size,
        block_size=superblock.block_size,
    )
