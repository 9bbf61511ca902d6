"""A logical volume as a source to read from, and the way back: where its bytes lie.

A striped stretch deals out its bytes to its columns in turns of the stripe size, as dm-stripe
does (Linux drivers/md/dm-stripe.c); with one column it is what dm-linear does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from imager.blocksource import BlockSource
from imager.errors import SourceError
from imager.extents import Extent, Extents


class Column(NamedTuple):
    device: str
    """The physical volume's name in the metadata."""
    offset: int
    """Of the column's first byte on the device."""


class Piece(NamedTuple):
    """Bytes of a volume that lie in one go on a device."""

    column: Column
    offset: int
    """Within the column."""
    length: int


@dataclass(frozen=True)
class Stretch:
    """A segment in bytes of the volume."""

    start: int
    length: int
    stripe_size: int
    columns: tuple[Column, ...]

    @property
    def end(self) -> int:
        return self.start + self.length

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Of the bytes from ``start`` to ``end`` of the volume, all within the stretch."""
        at, stop = start - self.start, end - self.start
        unit = self.stripe_size if len(self.columns) > 1 else self.length
        while at < stop:
            stripe, inside = divmod(at, unit)
            row, column = divmod(stripe, len(self.columns))
            length = min(unit - inside, stop - at)
            yield Piece(self.columns[column], row * unit + inside, length)
            at += length

    def on_device(self, device: str, extent: Extent) -> Iterator[tuple[int, int]]:
        """Where an extent of the volume, all within the stretch, lies on one device.

        Of consecutive bytes each column gets consecutive ones, however many stripes they are.
        """
        for number, column in enumerate(self.columns):
            if column.device == device:
                start = self._dealt(number, extent.offset - self.start)
                end = self._dealt(number, extent.end - self.start)
                yield column.offset + start, end - start

    def _dealt(self, number: int, length: int) -> int:
        """How many of the first ``length`` bytes the column with this number gets."""
        if len(self.columns) == 1:
            return length
        rows, rest = divmod(length, self.stripe_size * len(self.columns))
        own = min(max(rest - number * self.stripe_size, 0), self.stripe_size)
        return rows * self.stripe_size + own


class VolumeSource:
    """A ``BlockSource`` over the devices that hold a volume's stretches. Owns none of them."""

    is_device = False

    def __init__(
        self, path: str, stretches: Sequence[Stretch], devices: Mapping[str, BlockSource]
    ) -> None:
        """``stretches`` follow one another from 0 on; all their devices are there."""
        self.path = path
        self.size = stretches[-1].end
        self._stretches = stretches
        self._starts = [stretch.start for stretch in stretches]
        self._devices = devices
        used = [devices[c.device] for stretch in stretches for c in stretch.columns]
        self.logical_sector = max(device.logical_sector for device in used)
        self.physical_sector = max(device.physical_sector for device in used)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        at = 0
        for piece in self._pieces(offset, len(buffer)):
            device = self._devices[piece.column.device]
            device.read_into(piece.column.offset + piece.offset, buffer[at : at + piece.length])
            at += piece.length

    def pread(self, offset: int, length: int) -> bytes:
        return b"".join(
            self._devices[piece.column.device].pread(
                piece.column.offset + piece.offset, piece.length
            )
            for piece in self._pieces(offset, length)
        )

    def data_extents(self) -> Extents:
        return Extents.whole(self.size)

    def _pieces(self, offset: int, length: int) -> Iterator[Piece]:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise SourceError(
                f"read outside of {self.path}: {length} bytes at byte {offset}, "
                f"of a size of {self.size}"
            )
        end = offset + length
        number = max(bisect_right(self._starts, offset) - 1, 0)
        while offset < end:
            stretch = self._stretches[number]
            stop = min(end, stretch.end)
            yield from stretch.pieces(offset, stop)
            offset, number = stop, number + 1
