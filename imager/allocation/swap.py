"""Linux swap space: only its header page says anything worth keeping.

Source: Linux include/linux/swap.h (union swap_header), kernel/power/swap.c (hibernation).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from imager.allocation.model import (
    AllocationMap,
    Filesystem,
    read_if_inside,
    require,
    text,
    uuid_text,
)
from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

_PAGE_SIZES = (4096, 8192, 16384, 32768, 65536)  # bytes; the header doesn't name its own
_SIGNATURE_SIZE = 10
_CURRENT, _OLD = b"SWAPSPACE2", b"SWAP-SPACE"
# Written over the signature while a hibernated system lies in the swap space.
_HIBERNATED = (
    b"S1SUSPEND\0",
    b"S2SUSPEND\0",
    b"ULSUSPEND\0",
    b"LINHIB0001",
    b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c",  # TuxOnIce
)
_INFO_OFFSET = 1024  # bytes; boot loaders own what lies before
_BAD_PAGES_OFFSET = 1536  # bytes; the list fills the page up to the signature


class _Header(NamedTuple):
    page_size: int
    signature: bytes
    raw: bytes
    """The whole first page."""

    @property
    def order(self) -> str:
        """``<`` or ``>``: a header of a machine with the other byte order is no less swap."""
        return "<" if struct.unpack_from("<I", self.raw, _INFO_OFFSET)[0] == 1 else ">"

    @property
    def info(self) -> tuple[int, int, int]:
        """Version, last page, number of bad pages."""
        version, last_page, bad = struct.unpack_from(f"{self.order}3I", self.raw, _INFO_OFFSET)
        return version, last_page, bad

    @property
    def is_hibernated(self) -> bool:
        return self.signature.startswith(_HIBERNATED)


def probe(source: BlockSource) -> Filesystem | None:
    """The swap space, or None. Raises OSError."""
    header = _header(source)
    if header is None:
        return None
    version, last_page, _ = header.info
    known = version == 1 and header.signature != _OLD
    return Filesystem(
        kind="swap",
        label=text(header.raw[_INFO_OFFSET + 28 : _INFO_OFFSET + 44]) if known else None,
        uuid=uuid_text(header.raw[_INFO_OFFSET + 12 : _INFO_OFFSET + 28]) if known else None,
        size=(last_page + 1) * header.page_size if known else None,
        used_bytes=header.page_size if known else None,
        block_size=header.page_size,
        notes=("it holds a hibernated system",) if header.is_hibernated else (),
    )


def allocation_map(source: BlockSource, filesystem: Filesystem) -> AllocationMap:
    """The header page, and what lies behind the swap space. Raises NotRecognized for a
    hibernated system or any doubt, OSError."""
    header = _header(source)
    if header is None:
        raise NotRecognized("no swap header")
    require(not header.is_hibernated, "it holds a hibernated system")
    require(header.signature == _CURRENT, "an old swap header")
    version, last_page, bad_pages = header.info
    require(version == 1, f"unknown version {version}")
    room = (header.page_size - _SIGNATURE_SIZE - _BAD_PAGES_OFFSET) // 4
    require(bad_pages <= room, "impossible number of bad pages")
    end = (last_page + 1) * header.page_size
    require(last_page > 0 and end <= source.size, "the header claims more than the source has")
    used = Extents([(0, header.page_size), (end, source.size - end)])
    return AllocationMap(used, "exact")


def _header(source: BlockSource) -> _Header | None:
    for page_size in _PAGE_SIZES:
        page = read_if_inside(source, 0, page_size)
        signature = page[-_SIGNATURE_SIZE:]
        if signature.startswith((_CURRENT, _OLD, *_HIBERNATED)):
            return _Header(page_size, signature, page)
    return None
