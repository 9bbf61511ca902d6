"""Blocks on their way from a source into the repository: hashed, shared or compressed, packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from imager.blockindex import BlockIndex
from imager.blockmap import BlockMapWriter
from imager.blocksource import BlockSource
from imager.extents import Extent, Extents
from imager.format import (
    MAX_PAGE_LENGTH,
    NO_DIGEST,
    Page,
    Place,
    RecordKind,
    State,
    digest_of,
    root_digest,
)
from imager.lineage import Lineage
from imager.pack import Encoder, Packer, Record
from imager.pipeline import BufferPool, PerThread, run_pipeline, span_size
from imager.progress import Progress
from imager.reading import EmptyRun, ReadPlan, Span

# Pages are few and hold digests, which do not compress.
_PAGE_LEVEL = 3

# Reads under way at once while all is frozen: a disk or a busy machine answers each late.
_HOLDERS = 8

# Jobs beyond the workers' own: enough to read ahead while the packs are being written.
_READ_AHEAD = 4


@dataclass
class Statistics:
    """Counts of one capture, in bytes unless the name says otherwise."""

    disk_bytes: int = 0
    used_bytes: int = 0
    read_bytes: int = 0
    zero_blocks: int = 0
    unused_blocks: int = 0
    data_blocks: int = 0
    known_blocks: int = 0
    new_blocks: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0
    milliseconds: int = 0


class MapEntry(NamedTuple):
    """What a map says of one block."""

    state: State
    digest: bytes = NO_DIGEST
    place: Place | None = None


class FinishedMap(NamedTuple):
    height: int
    top: Place
    root: bytes


OnRun = Callable[[EmptyRun], object]
OnBlock = Callable[[int, MapEntry], object]
"""Is told a block's number and what became of it."""


class MapStorer:
    """A disk's block map on its way into the repository: its blocks in order, then ``finish``."""

    def __init__(
        self, size: int, block_size: int, index: BlockIndex, packer: Packer, statistics: Statistics
    ) -> None:
        """``size`` of the disk in bytes; ``statistics`` gets the numbers of blocks."""
        self._size = size
        self._block_size = block_size
        self._index = index
        self._packer = packer
        self._statistics = statistics
        self._writer = BlockMapWriter(-(-size // block_size), self._store_page)
        self._encoder = Encoder(_PAGE_LEVEL, MAX_PAGE_LENGTH)
        self.packs: set[bytes] = set()
        """That the map refers to."""

    def add_run(self, run: EmptyRun) -> None:
        self._writer.add_run(run.state, run.blocks)
        if run.state == State.ZERO:
            self._statistics.zero_blocks += run.blocks
        else:
            self._statistics.unused_blocks += run.blocks

    def add(self, entry: MapEntry) -> None:
        if entry.place is None:
            self.add_run(EmptyRun(entry.state, 1))
            return
        self._statistics.data_blocks += 1
        self.packs.add(entry.place.pack)
        self._writer.add(*entry)

    def add_next(self, _: int, entry: MapEntry) -> None:
        """An ``OnBlock``."""
        self.add(entry)

    def finish(self) -> FinishedMap:
        top, digest = self._writer.finish()
        height = self._writer.height
        root = root_digest(self._size, self._block_size, height, digest)
        return FinishedMap(height, top, root)

    def _store_page(self, page: Page) -> Place:
        content = page.encode()
        digest = digest_of(content)
        place = self._index.get(digest)
        if place is None:
            record = self._encoder.encode(RecordKind.PAGE, digest, content)
            place = self._packer.append(record)
            self._index.add(digest, place)
        self.packs.add(place.pack)
        return place


class _Block(NamedTuple):
    """What a worker found in one block: a record when it is new, a place when it is known."""

    state: State
    length: int
    digest: bytes = NO_DIGEST
    place: Place | None = None
    record: Record | None = None


class BlockStorer:
    """Stores blocks of one source, in one pass or several."""

    def __init__(
        self,
        source: BlockSource,
        block_size: int,
        index: BlockIndex,
        lineage: Lineage,
        packer: Packer,
        statistics: Statistics,
        *,
        level: int,
        workers: int,
    ) -> None:
        self.source = source
        self.block_size = block_size
        self._index = index
        self._lineage = lineage
        self._packer = packer
        self._statistics = statistics
        self._workers = workers
        self._depth = workers + _READ_AHEAD
        self._span_size = span_size(self._depth, block_size)
        self._encoders = PerThread(lambda: Encoder(level, block_size))
        self.unreadable = Extents()

    def plan(self, used: Extents) -> ReadPlan:
        """What is read to store the blocks that have used bytes."""
        return ReadPlan(self.source, used, self.block_size, span_size=self._span_size)

    def store(self, plan: ReadPlan, on_run: OnRun, on_block: OnBlock, progress: Progress) -> None:
        """Read a plan's blocks and store them; tells of every block of the source in order."""
        with BufferPool(self._depth, self._span_size) as pool:
            self._run(plan.jobs(pool), pool, on_run, on_block, progress)

    def hold(self, used: Extents) -> list[Span]:
        """Read the blocks that have used bytes into memory, each by itself; store nothing yet.

        Several are read at once: somebody waits for it.
        """
        unit, size = self.block_size, self.source.size
        aligned = used.align_outward(unit, size)
        offsets = [at for extent in aligned for at in range(extent.offset, extent.end, unit)]
        parts = [Extents((at, unit) for at in offsets[n::_HOLDERS]) for n in range(_HOLDERS)]
        with ThreadPoolExecutor(_HOLDERS, thread_name_prefix="holder") as threads:
            held = threads.map(lambda part: self._hold(used.intersect(part)), parts)
            return [span for spans in held for span in spans]

    def _hold(self, used: Extents) -> list[Span]:
        plan = ReadPlan(self.source, used, self.block_size, span_size=self.block_size)
        pool = BufferPool(-(-used.end // self.block_size), self.block_size)
        return [job for job in plan.jobs(pool) if isinstance(job, Span)]

    def store_held(self, spans: Iterable[Span], on_block: OnBlock, progress: Progress) -> None:
        """Store what ``hold`` read."""
        with BufferPool(0, self._span_size) as pool:
            self._run(spans, pool, lambda run: None, on_block, progress)

    def _run(
        self,
        jobs: Iterable[Span | EmptyRun],
        pool: BufferPool,
        on_run: OnRun,
        on_block: OnBlock,
        progress: Progress,
    ) -> None:
        def examine(job: Span | EmptyRun) -> EmptyRun | tuple[Span, list[_Block]]:
            if isinstance(job, EmptyRun):
                return job
            try:
                return job, self._examine(job)
            finally:
                pool.give(job.buffer)

        def deliver(result: EmptyRun | tuple[Span, list[_Block]]) -> None:
            if isinstance(result, EmptyRun):
                on_run(result)
                return
            span, blocks = result
            for number, block in enumerate(blocks, span.offset // self.block_size):
                on_block(number, self._store_block(block))
            self._note_unreadable(span)
            self._statistics.read_bytes += span.read_bytes
            progress.advance(span.read_bytes)

        run_pipeline(jobs, examine, deliver, workers=self._workers, depth=self._depth)

    # --- in the worker threads ---

    def _examine(self, span: Span) -> list[_Block]:
        return [
            self._examine_block(span, start, min(start + self.block_size, span.length))
            for start in range(0, span.length, self.block_size)
        ]

    def _examine_block(self, span: Span, start: int, end: int) -> _Block:
        unreadable = bool(span.unreadable) and any(
            extent.offset < span.offset + end and extent.end > span.offset + start
            for extent in span.unreadable
        )
        if not unreadable and span.buffer.is_zero(start, end):
            return _Block(State.ZERO, end - start)
        state = State.UNREADABLE if unreadable else State.DATA
        content = span.buffer.view[start:end]
        digest = digest_of(content)
        place = self._index.get(digest)
        if place is None:
            place = self._lineage.get((span.offset + start) // self.block_size, digest)
        if place is not None:
            return _Block(state, len(content), digest, place)
        record = self._encoders.get().encode(RecordKind.BLOCK, digest, content)
        return _Block(state, len(content), digest, None, record)

    # --- in the calling thread, in the order of the disk ---

    def _store_block(self, block: _Block) -> MapEntry:
        if block.state == State.ZERO:
            return MapEntry(State.ZERO)
        counts = self._statistics
        place = block.place or self._index.get(block.digest)  # a twin may have come meanwhile
        if place is None:
            assert block.record is not None
            place = self._packer.append(block.record)
            self._index.add(block.digest, place)
            counts.new_blocks += 1
            counts.new_bytes += block.length
        else:
            counts.known_blocks += 1
        return MapEntry(block.state, block.digest, place)

    def _note_unreadable(self, span: Span) -> None:
        """What a later pass could read is no longer missing."""
        before = self.unreadable
        if before:
            before = before.subtract(Extents([Extent(span.offset, span.length)]))
        if span.unreadable or before != self.unreadable:
            self.unreadable = before.union(Extents(span.unreadable))
