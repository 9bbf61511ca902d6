"""What an NTFS filesystem says of itself."""

from __future__ import annotations

from imager.allocation.model import Filesystem, read_if_inside
from imager.allocation.ntfs.boot import BOOT_SECTOR_SIZE, BootSector
from imager.allocation.ntfs.record import (
    VOLUME_INFORMATION,
    VOLUME_NAME,
    attributes,
    is_record,
    without_fixups,
)
from imager.allocation.ntfs.volume import VOLUME
from imager.blocksource import BlockSource
from imager.errors import NotRecognized

DIRTY = 0x1


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    boot = BootSector.parse(read_if_inside(source, 0, BOOT_SECTOR_SIZE))
    if boot is None:
        return None
    values = _volume_values(source, boot)
    name = values.get(VOLUME_NAME, b"").decode("utf-16-le", errors="replace")
    flags = int.from_bytes(values.get(VOLUME_INFORMATION, b"")[10:12], "little")
    return Filesystem(
        kind="ntfs",
        label=name or None,
        uuid=f"{boot.serial:016X}",
        size=boot.size,
        block_size=boot.cluster_size,
        notes=("it is marked dirty",) if flags & DIRTY else (),
    )


def _volume_values(source: BlockSource, boot: BootSector) -> dict[int, bytes]:
    """Resident attributes of $Volume by type; empty when the record is not sound."""
    offset = boot.mft_cluster * boot.cluster_size + VOLUME * boot.record_size
    if not 512 <= boot.record_size <= 65536:
        return {}
    raw = read_if_inside(source, offset, boot.record_size)
    if not is_record(raw):
        return {}
    try:
        found = list(attributes(without_fixups(raw)))
    except NotRecognized:
        return {}
    return {item.kind: item.value for item in found if item.value is not None}
