"""An ext filesystem's blocks, with a replayed journal laid over them or without."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import NamedTuple

from imager.allocation.ext.layout import Superblock
from imager.allocation.model import require
from imager.blocksource import BlockSource


class Overlay(NamedTuple):
    """Newer copies of some blocks: which, and how to get one."""

    blocks: Container[int]
    read: Callable[[int], bytes]


NOTHING = Overlay(frozenset(), lambda _: b"")


class Blocks:
    """Reads by block number; every number is checked against the filesystem's end."""

    def __init__(
        self, source: BlockSource, superblock: Superblock, overlay: Overlay = NOTHING
    ) -> None:
        self._source = source
        self._overlay = overlay
        self._size = superblock.block_size
        self._count = superblock.blocks_count

    def read(self, first: int, count: int = 1) -> bytes:
        """``count`` blocks from ``first``. Raises NotRecognized outside of the filesystem,
        OSError for unreadable sectors."""
        data = self._read_beneath(first, count)
        replaced = [b for b in range(first, first + count) if b in self._overlay.blocks]
        if not replaced:
            return data
        patched = bytearray(data)
        for block in replaced:
            at = (block - first) * self._size
            patched[at : at + self._size] = self._overlay.read(block)
        return bytes(patched)

    def covered_by_overlay(self, block: int) -> bytes | None:
        """What is on disk where the overlay has something newer, else None."""
        return self._read_beneath(block, 1) if block in self._overlay.blocks else None

    def _read_beneath(self, first: int, count: int) -> bytes:
        require(
            first >= 0 and 0 < count <= self._count - first,
            f"{count} blocks at block {first} are not inside of the filesystem",
        )
        return self._source.pread(first * self._size, count * self._size)
