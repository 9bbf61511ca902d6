"""LVM2 physical volumes: label, PV header, and the text metadata of the volume group.

Source: LVM2 lib/format_text/layout.h and lib/label/label.h; integers little-endian.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import pairwise

from imager.allocation.model import Filesystem, Membership, read_if_inside
from imager.blocksource import BlockSource

_SECTOR = 512  # bytes; LVM2 counts in these whatever the disk has
_LABEL_SECTORS = 4  # the label is in one of the first four
_METADATA_MAGIC = b" LVM2 x[5A%r0N*>"
_METADATA_HEADER_SIZE = 512
_MAX_TEXT = 16 << 20  # bytes; the metadata area is 1 MiB by default
_MAX_AREAS = 16

_GROUP = re.compile(rb'\A\s*([A-Za-z0-9+_.-]+)\s*\{\s*id\s*=\s*"([A-Za-z0-9-]+)"')
_VOLUMES = re.compile(rb"\bphysical_volumes\s*\{(.*?\})\s*\}", re.DOTALL)
_VOLUME = re.compile(rb'\{\s*id\s*=\s*"')


def probe(source: BlockSource) -> Filesystem | None:
    """The physical volume, labelled with its volume group's name, or None. Raises OSError."""
    for sector in range(_LABEL_SECTORS):
        raw = read_if_inside(source, sector * _SECTOR, _SECTOR)
        if raw[:8] == b"LABELONE" and raw[24:32] == b"LVM2 001":
            return _physical_volume(source, raw)
    return None


def _physical_volume(source: BlockSource, label: bytes) -> Filesystem:
    at = int.from_bytes(label[20:24], "little")
    if at + 40 > _SECTOR:
        return Filesystem("lvm2", notes=("damaged label",))
    uuid = _dashed(label[at : at + 32].decode("ascii", errors="replace"))
    group = next(filter(None, map(_parse_group, _texts(source, label[at + 40 :]))), None)
    return Filesystem(
        kind="lvm2",
        label=group[0] if group else None,
        uuid=uuid,
        size=int.from_bytes(label[at + 32 : at + 40], "little"),
        member_of=Membership("lvm", group[1], uuid, group[2]) if group else None,
        notes=() if group else ("no volume group in its metadata",),
    )


def _texts(source: BlockSource, locations: bytes) -> Iterator[bytes]:
    """The current metadata text of each metadata area; ``locations``: (offset, size) lists of
    data areas, then of metadata areas, each ended by zeros."""
    pairs = list(struct.iter_unpack("<QQ", locations[: len(locations) // 16 * 16]))
    ends = [index for index, pair in enumerate(pairs) if pair == (0, 0)]
    if len(ends) < 2:
        return
    for offset, size in pairs[ends[0] + 1 : ends[1]][:_MAX_AREAS]:
        yield _text(source, offset, size)


def _text(source: BlockSource, offset: int, size: int) -> bytes:
    """The text lies in a ring behind the area's header; empty when there is none."""
    header = read_if_inside(source, offset, _METADATA_HEADER_SIZE)
    if header[4:20] != _METADATA_MAGIC:
        return b""
    at, length = struct.unpack_from("<QQ", header, 40)
    if not _METADATA_HEADER_SIZE <= at < size or length > min(size, _MAX_TEXT):
        return b""
    first = min(length, size - at)
    return read_if_inside(source, offset + at, first) + read_if_inside(
        source, offset + _METADATA_HEADER_SIZE, length - first
    )


def _parse_group(metadata: bytes) -> tuple[str, str, int] | None:
    """Name, id and number of physical volumes of the volume group."""
    group = _GROUP.match(metadata)
    if group is None:
        return None
    volumes = _VOLUMES.search(metadata)
    count = len(_VOLUME.findall(volumes[1])) if volumes else 0
    return group[1].decode(), group[2].decode(), count


def _dashed(raw: str) -> str:
    """LVM prints its ids as 6-4-4-4-4-4-6 characters."""
    cuts = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(raw[a:b] for a, b in pairwise(cuts))
