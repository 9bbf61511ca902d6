"""Bitmaps (least significant bit first, a set bit means used) to runs of bits, at speed.

A bitmap is described by its *edges*: the ascending positions where the bit value changes,
starting from 0. Edges come in pairs (first set bit, first clear bit behind it).
"""

from __future__ import annotations

import re

_NONZERO = re.compile(rb"[^\0]", re.DOTALL)
_SET_BITS = [[bit for bit in range(8) if value >> bit & 1] for value in range(256)]


def edges(bitmap: bytes) -> list[int]:
    """Where the bit value changes; always an even count, the last is at most ``8 * len``."""
    bits = int.from_bytes(bitmap, "little")
    changes = (bits ^ bits << 1).to_bytes(len(bitmap) + 1, "little")
    return [
        base + bit
        for match in _NONZERO.finditer(changes)
        for base in (match.start() * 8,)
        for bit in _SET_BITS[changes[match.start()]]
    ]


def count_set(bitmap_edges: list[int]) -> int:
    """Number of set bits of the bitmap that has these edges."""
    return sum(bitmap_edges[1::2]) - sum(bitmap_edges[::2])


def cut(bitmap_edges: list[int], length: int) -> list[int]:
    """The edges of the first ``length`` bits alone."""
    if not bitmap_edges or bitmap_edges[-1] <= length:
        return bitmap_edges
    kept = [edge for edge in bitmap_edges if edge < length]
    return [*kept, length] if len(kept) % 2 else kept


def union(one: bytes, other: bytes) -> bytes:
    """The bits that are set in either of two bitmaps of the same length."""
    bits = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return bits.to_bytes(len(one), "little")
