"""What an exFAT filesystem says of itself."""

from __future__ import annotations

from imager.allocation.exfat.layout import BOOT_SECTOR_SIZE, ENTRY_SIZE, Geometry
from imager.allocation.model import Filesystem, read_if_inside
from imager.blocksource import BlockSource

_LABEL_ENTRY = 0x83
_LABEL_MAX = 11  # characters
_LABEL_WITHIN = 65536  # bytes of the root directory


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    geometry = Geometry.parse(read_if_inside(source, 0, BOOT_SECTOR_SIZE))
    if geometry is None:
        return None
    root = geometry.cluster_offset(geometry.root_cluster)
    serial = geometry.serial
    return Filesystem(
        kind="exfat",
        label=_label(read_if_inside(source, root, min(geometry.cluster_size, _LABEL_WITHIN))),
        uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
        size=geometry.size,
        block_size=geometry.cluster_size,
        notes=("it is marked dirty",) if geometry.is_dirty else (),
    )


def _label(root_directory: bytes) -> str | None:
    for at in range(0, len(root_directory), ENTRY_SIZE):
        if root_directory[at] == _LABEL_ENTRY:
            length = min(root_directory[at + 1], _LABEL_MAX)
            name = root_directory[at + 2 : at + 2 + 2 * length]
            return name.decode("utf-16-le", errors="replace") or None
    return None
