"""Which records the repository has: digest to place, in bounded memory.

An open-addressing table in flat arrays: 24 bytes a slot, where a dict would take 200. It keeps
128 bits of each digest; two contents that share those do not occur. When the table is full it
takes no more: blocks beyond it are stored again, or found through the previous image's map.
"""

from __future__ import annotations

import struct
from array import array

from imager.format import Place

# 2^21 slots of 24 bytes are 48 MiB; 75 % of them index 390 GB of blocks of 256 KiB
MAX_SLOTS = 1 << 21
_MIN_SLOTS = 1 << 12
_HALVES = struct.Struct("<QQ")


class BlockIndex:
    """Looked up by any thread; ``add`` and ``reserve`` belong to one thread."""

    def __init__(self, *, max_slots: int = MAX_SLOTS) -> None:
        """``max_slots``: a power of two."""
        self._max_slots = max_slots
        self._packs: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._count = 0
        self._make_slots(min(_MIN_SLOTS, max_slots))

    def __len__(self) -> int:
        return self._count

    @property
    def is_full(self) -> bool:
        return self._count >= self._max_slots * 3 // 4

    def get(self, digest: bytes) -> Place | None:
        low, high = _HALVES.unpack_from(digest)
        slots = self._slots  # one read: a growing index swaps the whole tuple
        value = slots.values[_find(slots, low, high)]
        return Place(self._packs[(value >> 32) - 1], value & 0xFFFFFFFF) if value else None

    def add(self, digest: bytes, place: Place) -> None:
        """The first place of a digest is kept."""
        low, high = _HALVES.unpack_from(digest)
        at = _find(self._slots, low, high)
        if self._slots.values[at] or self.is_full:
            return
        number = self._numbers.get(place.pack)
        if number is None:
            self._packs.append(place.pack)
            number = self._numbers[place.pack] = len(self._packs)
        self._slots.lows[at], self._slots.highs[at] = low, high
        # last, since another thread may look: the slot counts only with a value
        self._slots.values[at] = number << 32 | place.ordinal
        self._count += 1
        if self._count * 4 > self._slots.size * 3 and self._slots.size < self._max_slots:
            self._grow(self._slots.size * 2)

    def reserve(self, count: int) -> None:
        """Make room for so many records at once, as far as the limit allows."""
        size = self._slots.size
        while size * 3 < (self._count + count) * 4 and size < self._max_slots:
            size *= 2
        if size > self._slots.size:
            self._grow(size)

    def _make_slots(self, size: int) -> None:
        self._slots = _Slots(size)

    def _grow(self, size: int) -> None:
        old, new = self._slots, _Slots(size)
        for low, high, value in zip(old.lows, old.highs, old.values, strict=True):
            if value:
                at = _find(new, low, high)
                new.lows[at], new.highs[at], new.values[at] = low, high, value
        self._slots = new


class _Slots:
    __slots__ = ("highs", "lows", "mask", "size", "values")

    def __init__(self, size: int) -> None:
        self.size = size
        self.mask = size - 1
        self.lows, self.highs, self.values = (array("Q", bytes(8 * size)) for _ in range(3))


def _find(slots: _Slots, low: int, high: int) -> int:
    """The slot of a digest, or the free one where it belongs."""
    at = low & slots.mask
    while slots.values[at] and (slots.lows[at] != low or slots.highs[at] != high):
        at = (at + 1) & slots.mask
    return at
