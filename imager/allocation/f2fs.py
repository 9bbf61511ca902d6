"""F2FS. Source: Linux include/linux/f2fs_fs.h (struct f2fs_super_block); little-endian."""

from __future__ import annotations

import struct

from imager.allocation.model import Filesystem, read_if_inside, text, uuid_text
from imager.blocksource import BlockSource

_MAGIC = 0xF2F52010


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    raw = read_if_inside(source, 1024, 1024)
    if raw[:4] != _MAGIC.to_bytes(4, "little"):
        return None
    (log_block_size,) = struct.unpack_from("<I", raw, 16)
    (blocks,) = struct.unpack_from("<Q", raw, 36)
    if log_block_size > 16:
        return None
    return Filesystem(
        kind="f2fs",
        label=text(raw[124 : 124 + 2 * 256], "utf-16-le"),
        uuid=uuid_text(raw[108:124]),
        size=blocks << log_block_size,
        block_size=1 << log_block_size,
    )
