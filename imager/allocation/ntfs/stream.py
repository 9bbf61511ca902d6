"""What a non-resident attribute holds, read through its runs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from imager.allocation.model import require
from imager.allocation.ntfs.boot import BootSector
from imager.allocation.ntfs.record import Attribute, runs
from imager.blocksource import BlockSource
from imager.errors import NotRecognized

# A bound on memory; the most fragmented $MFT or $Bitmap has far less.
_MOST_RUNS = 1 << 20


class Stream:
    """Grows by its pieces in order of their first VCN; sizes in bytes."""

    def __init__(self, source: BlockSource, boot: BootSector, first: Attribute) -> None:
        """``first``: the piece that begins with VCN 0."""
        require(first.value is None and first.lowest_vcn == 0, "a stream has no start")
        self._source = source
        self._boot = boot
        self._starts: list[int] = []
        self._places: list[int] = []
        self._end = 0
        self.size = first.data_size
        self.initialized_size = first.initialized_size
        self._allocated_size = first.allocated_size
        self.append(first)

    def append(self, piece: Attribute) -> None:
        """Raises NotRecognized for holes, and for pieces that don't follow each other."""
        cluster_size = self._boot.cluster_size
        require(
            piece.value is None and piece.lowest_vcn * cluster_size == self._end,
            "the pieces of a stream don't follow each other",
        )
        for place, count in runs(piece, self._boot.clusters):
            if place is None:
                raise NotRecognized("a stream of the filesystem itself has holes")
            self._starts.append(self._end)
            self._places.append(place * cluster_size)
            self._end += count * cluster_size
        require(
            len(self._starts) <= _MOST_RUNS and self._end <= self._boot.size,
            "a stream has more than the filesystem",
        )

    def starts_at(self, offset: int) -> bool:
        """Whether its first byte lies at this byte of the source."""
        return self._places[:1] == [offset]

    def check_complete(self) -> None:
        """Raises NotRecognized unless all pieces are there."""
        require(
            self.initialized_size <= self.size <= self._allocated_size == self._end,
            "a stream's sizes don't fit its runs",
        )

    def read(self, offset: int, length: int) -> bytes:
        """Raises NotRecognized outside of the known runs, OSError."""
        require(offset >= 0 and offset + length <= self._end, "a read behind a stream's end")
        return b"".join(self._parts(offset, length))

    def _parts(self, offset: int, length: int) -> Iterator[bytes]:
        at = bisect_right(self._starts, offset) - 1
        while length:
            end = self._starts[at + 1] if at + 1 < len(self._starts) else self._end
            part = min(length, end - offset)
            yield self._source.pread(self._places[at] + offset - self._starts[at], part)
            offset, length, at = offset + part, length - part, at + 1
