"""What an F2FS filesystem says of itself."""

from __future__ import annotations

from imager.allocation.f2fs.layout import SUPERBLOCK_OFFSETS, SUPERBLOCK_SIZE, Superblock
from imager.allocation.model import Filesystem, read_if_inside, text, uuid_text
from imager.blocksource import BlockSource

_LARGEST_LOG_BLOCK_SIZE = 16


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    raw = read_if_inside(source, SUPERBLOCK_OFFSETS[0], SUPERBLOCK_SIZE)
    superblock = Superblock.parse(raw)
    if superblock is None or superblock.log_block_size > _LARGEST_LOG_BLOCK_SIZE:
        return None
    return Filesystem(
        kind="f2fs",
        label=text(raw[124 : 124 + 2 * 512], "utf-16-le"),
        uuid=uuid_text(raw[108:124]),
        size=superblock.blocks << superblock.log_block_size,
        block_size=1 << superblock.log_block_size,
    )
