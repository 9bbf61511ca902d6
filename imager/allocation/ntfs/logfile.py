"""Whether $LogFile has something to replay.

Source: ntfs-3g's logfile.h and logfile.c (restart pages); integers little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imager.allocation.model import require
from imager.allocation.ntfs.record import without_fixups
from imager.allocation.ntfs.stream import Stream

_PIECE_SIZE = 1 << 20  # bytes
_LARGEST = 4 << 30  # bytes
_PAGE_SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_HEADER_SIZE = 30  # bytes
_NO_CLIENT = 0xFFFF
_CLEAN = 2


def check_clean(log: Stream) -> None:
    """Raises NotRecognized when the log must be replayed first, or can't be understood."""
    require(log.size <= _LARGEST, "$LogFile is too large")
    if _is_empty(log):
        return
    pages = sorted(_restart_pages(log))
    require(bool(pages), "$LogFile is damaged")
    _, is_clean = pages[-1]
    require(is_clean, "$LogFile waits to be replayed")


def _is_empty(log: Stream) -> bool:
    """Formatted, or reset by a driver that doesn't replay: all ones."""
    for start in range(0, log.size, _PIECE_SIZE):
        piece = log.read(start, min(_PIECE_SIZE, log.size - start))
        if piece.count(0xFF) != len(piece):
            return False
    return True


def _restart_pages(log: Stream) -> Iterator[tuple[int, bool]]:
    """(number of the last record, whether it is clean) of the one or two sound pages."""
    first = log.read(0, min(log.size, _HEADER_SIZE))
    require(first[:4] in (b"RSTR", b"CHKD"), "$LogFile has no restart page")
    (page_size,) = struct.unpack_from("<I", first, 16)
    require(page_size in _PAGE_SIZES and 2 * page_size <= log.size, "$LogFile is damaged")
    for start in (0, page_size):
        raw = log.read(start, page_size)
        if raw[:4] in (b"RSTR", b"CHKD"):
            yield _restart_area(without_fixups(raw))


def _restart_area(page: bytes) -> tuple[int, bool]:
    (offset,) = struct.unpack_from("<H", page, 24)
    require(offset >= _HEADER_SIZE and offset + 16 <= len(page), "$LogFile is damaged")
    number, client, flags = struct.unpack_from("<Q4xHH", page, offset)
    return number, client == _NO_CLIENT or bool(flags & _CLEAN)
