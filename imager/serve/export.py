"""What a client can ask for by name: a disk, a partition, a volume."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from imager.blocksource import BlockSource, PartSource
from imager.extents import Extents
from imager.imagesource import ImageSource, Piece

# Read at once from a source that has no pieces of its own.
_PIECE_BYTES = 256 << 10


@dataclass
class Export:
    """``description`` is for people. Any number of threads may read."""

    name: str
    source: BlockSource
    description: str = ""
    _image: ImageSource | None = field(init=False)
    _shift: int = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _data: Extents | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        source, self._shift = self.source, 0
        while isinstance(source, PartSource):
            self._shift += source.offset
            source = source.parent
        self._image = source if isinstance(source, ImageSource) else None

    @property
    def size(self) -> int:
        return self.source.size

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """The content in order; raises at the first byte that can't be read."""
        if self._image is not None:
            yield from self._image.pieces(self._shift + offset, length)
            return
        for at in range(offset, offset + length, _PIECE_BYTES):
            count = min(_PIECE_BYTES, offset + length - at)
            yield Piece(count, memoryview(self.source.pread(at, count)))

    def ready_pieces(self, offset: int, length: int) -> list[Piece] | None:
        """The same if nothing needs to be read for it, else None."""
        if self._image is None:
            return None
        return self._image.ready_pieces(self._shift + offset, length)

    def allocation(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Lengths in bytes, and whether there is data, in turn. May end early."""
        if self._image is not None:
            yield from self._image.allocation(self._shift + offset, length)
            return
        at = offset
        for extent in self._extents().within(offset, length):
            if extent.offset > at:
                yield extent.offset - at, False
            yield extent.length, True
            at = extent.end
        if at < offset + length:
            yield offset + length - at, False

    def _extents(self) -> Extents:
        with self._lock:
            if self._data is None:
                self._data = self.source.data_extents()
            return self._data
