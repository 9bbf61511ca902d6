"""Chunks: how logical addresses are laid out over the devices.

Source: Linux include/uapi/linux/btrfs_tree.h (struct btrfs_chunk, btrfs_stripe), fs/btrfs/volumes.c
(btrfs_map_block, btrfs_raid_array), fs/btrfs/tree-checker.c. Everything in bytes.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple, Self

from imager.allocation.btrfs.superblock import Superblock
from imager.allocation.model import require
from imager.errors import NotRecognized
from imager.extents import Extents

CHUNK_ITEM = 228  # key type
_STRIPE_LENGTH = 64 << 10
_CHUNK = struct.Struct("<4Q3IHH")
_STRIPE = struct.Struct("<QQ16s")
_KEY = struct.Struct("<QBQ")
_MOST_STRIPES = 4096  # far more than fit into a node

_KINDS = 0b111  # data, system, metadata
_SYSTEM = 1 << 1
_RAID10 = 1 << 6


class _Profile(NamedTuple):
    """How often each byte is there, how many stripes are lost to parity, and whether the content
    is dealt out to the stripes in turn."""

    copies: int
    parity: int
    is_striped: bool


# By the bit in the chunk's type (btrfs_raid_array).
_PROFILES = {
    0: _Profile(1, 0, False),
    1 << 3: _Profile(1, 0, True),  # RAID0
    1 << 4: _Profile(2, 0, False),  # RAID1
    1 << 5: _Profile(2, 0, False),  # DUP
    _RAID10: _Profile(2, 0, True),
    1 << 7: _Profile(1, 1, True),  # RAID5
    1 << 8: _Profile(1, 2, True),  # RAID6
    1 << 9: _Profile(3, 0, False),  # RAID1C3
    1 << 10: _Profile(4, 0, False),  # RAID1C4
}


class Place(NamedTuple):
    """A byte address on a device."""

    device: int
    uuid: bytes
    offset: int


class Chunk(NamedTuple):
    """A range of logical addresses and the device ranges (stripes) that hold it."""

    start: int
    length: int
    kind: int
    profile: _Profile
    stripes: tuple[Place, ...]

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def columns(self) -> int:
        """Among how many the content is divided."""
        if not self.profile.is_striped:
            return 1
        return len(self.stripes) // self.profile.copies - self.profile.parity

    @property
    def stripe_size(self) -> int:
        """Of this chunk on each of its devices."""
        return self.length // self.columns

    @classmethod
    def parse(cls, start: int, raw: bytes, sector_size: int) -> Self:
        """Raises NotRecognized for anything that the kernel would not make."""
        where = f"the chunk at {start}"
        require(len(raw) >= _CHUNK.size, f"{where} is cut short")
        length, owner, stripe_length, type_, _, _, _, count, sub_stripes = _CHUNK.unpack_from(raw)
        require(len(raw) == _CHUNK.size + count * _STRIPE.size, f"{where} is of the wrong size")
        profile = _PROFILES.get(type_ & ~_KINDS)
        if profile is None or not type_ & _KINDS:
            raise NotRecognized(f"{where} is of unknown type {type_:#x}")
        stripes = tuple(Place(d, u, o) for d, o, u in _STRIPE.iter_unpack(raw[_CHUNK.size :]))
        chunk = cls(start, length, type_ & _KINDS, profile, stripes)
        require(owner == 2 and stripe_length == _STRIPE_LENGTH, f"{where} is odd")
        require(type_ & ~_KINDS != _RAID10 or sub_stripes == 2, f"{where} is odd")
        chunk._check(where, sector_size)
        return chunk

    def _check(self, where: str, sector_size: int) -> None:
        copies, _, is_striped = self.profile
        count = len(self.stripes)
        if is_striped:
            require(count % copies == 0 and self.columns > 0, f"{where} has {count} stripes")
        else:
            require(count == copies, f"{where} has {count} stripes")
        require(
            self.length > 0
            and self.end < 1 << 63
            and self.length % self.columns == 0
            and (self.start | self.stripe_size) % sector_size == 0
            and all(stripe.offset % sector_size == 0 for stripe in self.stripes),
            f"{where} has an odd size",
        )
        if is_striped:
            require(self.stripe_size % _STRIPE_LENGTH == 0, f"{where} ends within a stripe")

    def copies_of(self, address: int, length: int) -> Iterator[list[tuple[Place, int]]]:
        """For each copy the pieces of a logical range, as (place, length)."""
        for copy in range(self.profile.copies):
            yield list(self._pieces(address - self.start, length, copy))

    def _pieces(self, at: int, length: int, copy: int) -> Iterator[tuple[Place, int]]:
        if not self.profile.is_striped:
            device, uuid, offset = self.stripes[copy]
            yield Place(device, uuid, offset + at), length
            return
        end = at + length
        while at < end:
            piece = min(end - at, _STRIPE_LENGTH - at % _STRIPE_LENGTH)
            row, column = divmod(at // _STRIPE_LENGTH, self.columns)
            index = column * self.profile.copies + copy
            if self.profile.parity:  # turns by one device a row
                index = (column + row) % len(self.stripes)
            device, uuid, offset = self.stripes[index]
            yield Place(device, uuid, offset + row * _STRIPE_LENGTH + at % _STRIPE_LENGTH), piece
            at += piece

    def used_in_stripe(self, index: int, logical: Extents) -> Iterator[tuple[int, int]]:
        """What one stripe holds of used logical ranges: ascending (offset, length) on its device.

        With parity it is all of the stripe: a lost device is computed from all the others, free
        space and all.
        """
        offset = self.stripes[index].offset
        if self.profile.parity:
            yield offset, self.stripe_size
            return
        column = index // self.profile.copies if self.profile.is_striped else 0
        for extent in logical.within(self.start, self.length):
            first = self._column_bytes(column, extent.offset - self.start)
            last = self._column_bytes(column, extent.end - self.start)
            if first < last:
                yield offset + first, last - first

    def _column_bytes(self, column: int, at: int) -> int:
        """How many of the chunk's first ``at`` bytes lie in a column."""
        if not self.profile.is_striped:
            return at
        rows, rest = divmod(at, self.columns * _STRIPE_LENGTH)
        return rows * _STRIPE_LENGTH + min(max(rest - column * _STRIPE_LENGTH, 0), _STRIPE_LENGTH)


class DeviceExtent(NamedTuple):
    """A range on a device that a chunk's stripe takes."""

    offset: int
    length: int
    chunk: int
    """The chunk's logical start."""


class ChunkMap:
    """Chunks by their logical addresses."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        """Raises NotRecognized when chunks overlap."""
        self.chunks = sorted(chunks)
        self._starts = [chunk.start for chunk in self.chunks]
        for one, other in pairwise(self.chunks):
            require(one.end <= other.start, f"chunks overlap at {other.start}")

    def chunk_of(self, address: int, length: int) -> Chunk:
        """The chunk that holds all of a logical range. Raises NotRecognized if none does."""
        at = bisect_right(self._starts, address) - 1
        require(
            at >= 0 and length > 0 and address + length <= self.chunks[at].end,
            f"no chunk holds {length} bytes at {address}",
        )
        return self.chunks[at]

    def device_extents(self, device: int) -> list[tuple[DeviceExtent, Chunk, int]]:
        """What lies on a device, ascending: (range, chunk, number of the stripe in it).

        Raises NotRecognized when two overlap.
        """
        found = sorted(
            (DeviceExtent(stripe.offset, chunk.stripe_size, chunk.start), chunk, index)
            for chunk in self.chunks
            for index, stripe in enumerate(chunk.stripes)
            if stripe.device == device
        )
        for (one, *_), (other, *_) in pairwise(found):
            require(one.offset + one.length <= other.offset, f"stripes overlap at {other.offset}")
        return found


def system_chunks(superblock: Superblock) -> ChunkMap:
    """The superblock's own list of chunks, enough to read the chunk tree.

    Raises NotRecognized.
    """
    raw, chunks, at = superblock.chunk_array, [], 0
    while at < len(raw):
        require(at + _KEY.size + _CHUNK.size <= len(raw), "the system chunk array is cut short")
        _, type_, start = _KEY.unpack_from(raw, at)
        at += _KEY.size
        count: int = _CHUNK.unpack_from(raw, at)[7]
        size = _CHUNK.size + min(count, _MOST_STRIPES) * _STRIPE.size
        require(type_ == CHUNK_ITEM, "the system chunk array holds something else")
        chunk = Chunk.parse(start, raw[at : at + size], superblock.sector_size)
        require(bool(chunk.kind & _SYSTEM), "the system chunk array holds another chunk")
        chunks.append(chunk)
        at += size
    return ChunkMap(chunks)
