"""Chains of clusters through the FAT, which exFAT only uses where clusters don't follow."""

from __future__ import annotations

from collections.abc import Iterator

from imager.allocation.exfat.layout import Geometry
from imager.allocation.model import require
from imager.blocksource import BlockSource
from imager.errors import NotRecognized

_MEDIA = 0xFFFFFFF8
_END = 0xFFFFFFFF
_WINDOW_SIZE = 64 << 10  # bytes of the FAT kept in memory


class Chains:
    """Every number is checked. All raise NotRecognized for impossible links, OSError."""

    def __init__(self, source: BlockSource, geometry: Geometry) -> None:
        self._source = source
        self._geometry = geometry
        self._window = b""
        self._window_start = 0
        require(self._entry(0) == _MEDIA, "the FAT doesn't start with the media type")

    def follow(self, first: int, most: int) -> Iterator[int]:
        """The clusters of a chain to its end, which must come within ``most``."""
        number = first
        for _ in range(most):
            require(self._geometry.is_cluster(number), "a chain of clusters is damaged")
            yield number
            number = self._entry(number)
            if number == _END:
                return
        raise NotRecognized("a chain of clusters doesn't end")

    def _entry(self, number: int) -> int:
        at = number * 4 - self._window_start
        if not 0 <= at < len(self._window):
            self._window_start = number * 4 // _WINDOW_SIZE * _WINDOW_SIZE
            length = min(_WINDOW_SIZE, self._geometry.fat_size - self._window_start)
            start = self._geometry.fat_offset + self._window_start
            self._window = self._source.pread(start, length)
            at = number * 4 - self._window_start
        return int.from_bytes(self._window[at : at + 4], "little")
