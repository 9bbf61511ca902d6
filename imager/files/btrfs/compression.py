"""Compressed extents: zlib, zstd, and LZO in its framing of pages.

LZO1X as described in Linux Documentation/staging/lzo.rst.
"""

from __future__ import annotations

import zlib

import zstandard

from imager.allocation.model import require
from imager.errors import NotRecognized, UnsupportedError

_ZLIB, _LZO, _ZSTD = 1, 2, 3

MAX_EXTENT = 1 << 20
"""Bytes; the kernel makes none above 128 KiB."""


def decompress(kind: int, raw: bytes, length: int, sector_size: int) -> bytes:
    """Up to ``length`` bytes, filled up with zeros. Raises NotRecognized, UnsupportedError."""
    require(length <= MAX_EXTENT, "a compressed extent that is too long")
    try:
        if kind == _ZLIB:
            content = zlib.decompressobj().decompress(raw, length)
        elif kind == _ZSTD:
            content = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
        elif kind == _LZO:
            content = _lzo_pages(raw, length, sector_size)
        else:
            raise UnsupportedError(f"unknown compression {kind}")
    except (zlib.error, zstandard.ZstdError, IndexError) as error:
        raise NotRecognized(f"a damaged compressed extent: {error}") from None
    return content[:length].ljust(length, b"\0")


def _lzo_pages(raw: bytes, length: int, sector_size: int) -> bytes:
    """The length of all, then pieces, each with its length before it; such a length never lies
    across the border of a sector."""
    total = int.from_bytes(raw[:4], "little")
    require(4 <= total <= len(raw), "a damaged LZO extent")
    content, at = bytearray(), 4
    while at < total and len(content) < length:
        if sector_size - at % sector_size < 4:
            at += sector_size - at % sector_size
        size = int.from_bytes(raw[at : at + 4], "little")
        at += 4
        require(0 < size <= total - at, "a damaged LZO extent")
        content += lzo1x(raw[at : at + size], sector_size)
        at += size
    return bytes(content)


def lzo1x(data: bytes, most: int) -> bytes:
    """One stream; at most ``most`` bytes. Raises NotRecognized, IndexError when it is cut off."""
    out = bytearray()
    at = 0
    state = 0  # literals that the last instruction brought: 4 for a long run

    def long_length(mask: int, first: int) -> int:
        nonlocal at
        length = first & mask
        if length:
            return length
        length = mask
        while data[at] == 0:
            length += 255
            at += 1
        length += data[at]
        at += 1
        return length

    def literals(count: int) -> None:
        nonlocal at
        require(at + count <= len(data), "a damaged LZO stream")
        out.extend(data[at : at + count])
        at += count

    def match(distance: int, length: int) -> None:
        start = len(out) - distance
        require(start >= 0 and len(out) + length <= most, "a damaged LZO stream")
        if distance >= length:
            out.extend(out[start : start + length])
        else:
            pattern = bytes(out[start:])
            out.extend((pattern * (length // distance + 1))[:length])

    if data[0] > 17:
        count = data[0] - 17
        at = 1
        literals(count)
        state = 4 if count >= 4 else count
    while True:
        first = data[at]
        at += 1
        if first < 16:
            if state == 0:
                literals(3 + long_length(15, first))
                require(len(out) <= most, "a damaged LZO stream")
                state = 4
                continue
            distance = (data[at] << 2) + (first >> 2 & 3) + 1
            at += 1
            if state == 4:
                match(distance + 2048, 3)
            else:
                match(distance, 2)
            state = first & 3
        elif first < 64:
            if first >= 32:
                length = 2 + long_length(31, first)
                base = 1
            else:
                length = 2 + long_length(7, first)
                base = 16384 + ((first & 8) << 11)
            pair = data[at] | data[at + 1] << 8
            at += 2
            if first < 32 and base + (pair >> 2) == 16384:
                return bytes(out)  # a match of distance 16384 ends the stream
            match(base + (pair >> 2), length)
            state = pair & 3
        else:
            if first < 128:
                length, distance = 3 + (first >> 5 & 1), (data[at] << 3) + (first >> 2 & 7) + 1
            else:
                length, distance = 5 + (first >> 5 & 3), (data[at] << 3) + (first >> 2 & 7) + 1
            at += 1
            match(distance, length)
            state = first & 3
        literals(state)
