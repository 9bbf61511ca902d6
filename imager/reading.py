"""Reading a source for a capture: the plan of what to read, and spans that survive bad sectors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NamedTuple

from imager.blocksource import BlockSource
from imager.errors import SourceError
from imager.extents import Extent, Extents
from imager.format import State
from imager.pipeline import Buffer, BufferPool

# Reading over a short gap is cheaper than another read.
_BRIDGED_GAP = 64 << 10


class EmptyRun(NamedTuple):
    """Blocks that need no reading: all unused, or all zero."""

    state: State
    blocks: int


class Span(NamedTuple):
    """Neighbouring blocks in a buffer; unused and unreadable pieces are zeros there."""

    offset: int
    length: int
    buffer: Buffer
    read_bytes: int
    unreadable: list[Extent]


class ReadPlan:
    """Which blocks of a source are read, and which are known to be zero or unused."""

    def __init__(
        self, source: BlockSource, used: Extents, block_size: int, *, span_size: int
    ) -> None:
        """``used``: what must be captured, in bytes, in multiples of sectors; ``span_size``: what
        is read into one buffer, a multiple of the block size."""
        self._source = source
        self._block_size = block_size
        self._used_blocks = used.align_outward(block_size, source.size)
        self._data = used.intersect(source.data_extents().align_outward(4096, source.size))
        self._data_blocks = self._data.align_outward(block_size, source.size)
        self._span_size = span_size

    @property
    def bytes_to_read(self) -> int:
        return self._data.total

    def jobs(self, pool: BufferPool) -> Iterator[Span | EmptyRun]:
        """All blocks of the source in order. Reads as it goes, into buffers of the pool."""
        at = 0
        for extent in self._data_blocks:
            yield from self._empty_runs(at, extent.offset)
            for offset in range(extent.offset, extent.end, self._span_size):
                length = min(self._span_size, extent.end - offset)
                yield self._read_span(offset, length, pool.take())
            at = extent.end
        yield from self._empty_runs(at, self._source.size)

    def _empty_runs(self, start: int, end: int) -> Iterator[EmptyRun]:
        at = start
        for extent in self._used_blocks.within(start, end - start):
            yield from self._run(State.UNUSED, at, extent.offset)
            yield from self._run(State.ZERO, extent.offset, extent.end)
            at = extent.end
        yield from self._run(State.UNUSED, at, end)

    def _run(self, state: State, start: int, end: int) -> Iterator[EmptyRun]:
        if start < end:
            yield EmptyRun(state, -(-end // self._block_size) - start // self._block_size)

    def _read_span(self, offset: int, length: int, buffer: Buffer) -> Span:
        pieces = self._data.clip(offset, length).shift(-offset)
        unreadable: list[Extent] = []
        for piece in pieces.join_gaps(_BRIDGED_GAP):
            view = buffer.view[piece.offset : piece.end]
            unreadable += read_with_retries(self._source, offset + piece.offset, view)
        for gap in pieces.complement(length):
            buffer.clear(gap.offset, gap.end)
        used = [part for extent in unreadable for part in self._data.within(*extent)]
        return Span(offset, length, buffer, pieces.total, used)


def read_with_retries(source: BlockSource, offset: int, view: memoryview) -> list[Extent]:
    """Fill ``view``; what can't be read even sector by sector is zeroed and returned.

    Raises SourceError when the source is gone.
    """
    try:
        source.read_into(offset, view)
        return []
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO, errno.EBADF):
            raise SourceError(f"{source.path} is gone at byte {offset}: {error.strerror}") from None
        sector = source.logical_sector
        if len(view) <= sector:
            view[:] = bytes(len(view))
            return [Extent(offset, len(view))]
    half = max(-(-len(view) // sector) // 2, 1) * sector
    return read_with_retries(source, offset, view[:half]) + read_with_retries(
        source, offset + half, view[half:]
    )
