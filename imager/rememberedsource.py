"""A source that remembers what was read: for whoever reads it again and knows what changed."""

from __future__ import annotations

from imager.blocksource import BlockSource
from imager.extents import Extents

# Bitmaps of some TiB; what comes later is read each time.
_MOST_BYTES = 64 << 20


class RememberedSource:
    """A ``BlockSource`` over another one. Errors are not remembered."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._known: dict[tuple[int, int], bytes] = {}
        self._bytes = 0
        self.path = source.path
        self.size = source.size
        self.logical_sector = source.logical_sector
        self.physical_sector = source.physical_sector
        self.is_device = source.is_device

    def pread(self, offset: int, length: int) -> bytes:
        content = self._known.get((offset, length))
        if content is None:
            content = self._source.pread(offset, length)
            if self._bytes + length <= _MOST_BYTES:
                self._known[offset, length] = content
                self._bytes += length
        return content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.pread(offset, len(buffer))

    def data_extents(self) -> Extents:
        return self._source.data_extents()

    def forget(self, changed: Extents) -> None:
        """What may be another now, by bytes."""
        self._known = {
            place: content
            for place, content in self._known.items()
            if next(changed.within(*place), None) is None
        }
        self._bytes = sum(map(len, self._known.values()))
