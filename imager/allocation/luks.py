"""LUKS containers. Source: the LUKS1 and LUKS2 on-disk format specifications; big-endian."""

from __future__ import annotations

from imager.allocation.model import AllocationMap, Filesystem, all_used, read_if_inside, text
from imager.blocksource import BlockSource


def probe(source: BlockSource) -> Filesystem | None:
    """The container, or None. Raises OSError."""
    raw = read_if_inside(source, 0, 512)
    if raw[:6] != b"LUKS\xba\xbe":
        return None
    version = int.from_bytes(raw[6:8], "big")
    return Filesystem(
        kind="luks",
        label=text(raw[24:72]) if version == 2 else None,
        uuid=text(raw[168:208]),
        notes=(f"LUKS version {version}",),
    )


def allocation_map(source: BlockSource, filesystem: Filesystem) -> AllocationMap:
    """All of it: which bytes are used can't be told without the key."""
    return all_used(
        source,
        "luks: an encrypted container can't be thinned offline (while it is open, the mapped "
        "device can be captured)",
    )
