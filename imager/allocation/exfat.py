"""exFAT. Source: Microsoft's exFAT file system specification; integers little-endian."""

from __future__ import annotations

import struct

from imager.allocation.model import Filesystem, read_if_inside
from imager.blocksource import BlockSource

_LABEL_ENTRY = 0x83
_ENTRY_SIZE = 32  # bytes
_LABEL_MAX = 11  # characters


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    raw = read_if_inside(source, 0, 512)
    if raw[3:11] != b"EXFAT   " or raw[510:] != b"\x55\xaa":
        return None
    (sectors,) = struct.unpack_from("<Q", raw, 72)
    heap, _, root, serial = struct.unpack_from("<4I", raw, 88)
    sector_shift, cluster_shift = raw[108], raw[109]
    if not (9 <= sector_shift <= 12 and sector_shift + cluster_shift <= 25 and root >= 2):
        return None
    cluster_size = 1 << sector_shift + cluster_shift
    root_offset = (heap << sector_shift) + (root - 2) * cluster_size
    return Filesystem(
        kind="exfat",
        label=_label(read_if_inside(source, root_offset, min(cluster_size, 65536))),
        uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
        size=sectors << sector_shift,
        block_size=cluster_size,
    )


def _label(root_directory: bytes) -> str | None:
    for at in range(0, len(root_directory), _ENTRY_SIZE):
        if root_directory[at] == _LABEL_ENTRY:
            length = min(root_directory[at + 1], _LABEL_MAX)
            name = root_directory[at + 2 : at + 2 + 2 * length]
            return name.decode("utf-16-le", errors="replace") or None
    return None
