"""XFS. Source: Linux fs/xfs/libxfs/xfs_format.h (struct xfs_dsb); integers big-endian."""

from __future__ import annotations

import struct

from imager.allocation.model import Filesystem, read_if_inside, text, uuid_text
from imager.blocksource import BlockSource


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    raw = read_if_inside(source, 0, 512)
    if raw[:4] != b"XFSB":
        return None
    block_size, blocks = struct.unpack_from(">IQ", raw, 4)
    (free_blocks,) = struct.unpack_from(">Q", raw, 144)
    return Filesystem(
        kind="xfs",
        label=text(raw[108:120]),
        uuid=uuid_text(raw[32:48]),
        size=blocks * block_size,
        used_bytes=max(blocks - free_blocks, 0) * block_size,
        block_size=block_size,
    )
