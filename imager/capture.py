"""Capture: read disks, store what the repository does not have yet, commit an image."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

from imager import __version__
from imager.blockindex import BlockIndex
from imager.blockmap import BlockMapWriter
from imager.blocksource import BlockSource
from imager.diskidentity import DiskIdentity
from imager.errors import ImagerError, UsageError
from imager.extents import Extent, Extents
from imager.fingerprint import Fingerprint
from imager.format import (
    MAX_PAGE_LENGTH,
    NO_DIGEST,
    PackKind,
    Page,
    Place,
    RecordKind,
    State,
    digest_of,
    root_digest,
)
from imager.layout import DiskLayout
from imager.lineage import Lineage
from imager.manifest import Manifest, new_document
from imager.pack import Encoder, Packer, Record
from imager.pipeline import BufferPool, PerThread, run_pipeline, span_size, worker_count
from imager.progress import Progress
from imager.reading import EmptyRun, ReadPlan, Span
from imager.repository import Repository, StoredBlocks, new_image_id, utc_now

# Chosen by measurement, see docs/performance.md.
DEFAULT_LEVEL = 1

# Pages are few and hold digests, which do not compress.
_PAGE_LEVEL = 3

# Jobs beyond the workers' own: enough to read ahead while the packs are being written.
_READ_AHEAD = 4

# A gc may condemn shared packs while a capture runs; so often the capture stores them again.
_MAX_PASSES = 3


@dataclass(frozen=True)
class SourceDisk:
    """A disk to capture and what is known of it."""

    name: str
    source: BlockSource
    layout: DiskLayout
    identity: DiskIdentity


@dataclass(frozen=True)
class CaptureJob:
    """Everything that one capture is told."""

    disks: tuple[SourceDisk, ...]
    name: str
    note: str = ""
    level: int = DEFAULT_LEVEL
    all_blocks: bool = False
    consistency: str = "offline"
    hardware: Fingerprint | None = None
    warnings: tuple[str, ...] = ()
    additions: Callable[[], Mapping[str, Any]] = dict
    """Called once when the disks are stored, before the commit: further keys of the manifest."""
    workers: int = field(default_factory=worker_count)


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


def capture(job: CaptureJob, repository: Repository, progress: Progress) -> Manifest:
    """Capture the disks as one image and return its manifest.

    Interrupted or failed, it leaves complete packs behind, and the next capture finds them.
    Raises ImagerError; unreadable sectors are no error: see ``Manifest.partial``.
    """
    if not 1 <= job.level <= 19:
        raise UsageError(f"compression level {job.level}: it must be from 1 to 19")
    image_id, started = new_image_id(), monotonic()
    previous = repository.latest(job.name)
    document = _new_manifest(image_id, job, repository, previous)
    added: Mapping[str, Any] | None = None
    with _session(repository, image_id):
        for _ in range(_MAX_PASSES):
            stored = repository.stored_blocks()
            for text in stored.damaged:
                progress.note(f"not shared, its blocks are stored again: {text}")
            statistics = Statistics()
            disks, shared = _store_disks(job, repository, previous, stored, statistics, progress)
            added = job.additions() if added is None else added
            if not shared & repository.condemned():
                break
            progress.note("a gc took packs that this capture shares: storing those blocks again")
        else:
            raise ImagerError("a gc keeps removing what this capture shares: run it again later")
        statistics.milliseconds = int((monotonic() - started) * 1000)
        document |= {
            **(added or {}),
            "disks": disks,
            "partial": any(disk["unreadable"] for disk in disks),
            "finished": utc_now(),
            "statistics": vars(statistics),
        }
        repository.commit(document)
    return Manifest.from_document(document, image_id)


def _new_manifest(
    image_id: str, job: CaptureJob, repository: Repository, previous: Manifest | None
) -> dict[str, Any]:
    return new_document(
        "image",
        id=image_id,
        name=job.name,
        host=socket.gethostname(),
        note=job.note,
        tool=f"imager {__version__}",
        created=utc_now(),
        previous=previous.id if previous else None,
        repository=repository.id,
        block_size=repository.block_size,
        consistency=job.consistency,
        all_blocks=job.all_blocks,
        hardware=job.hardware.to_json() if job.hardware else {},
        warnings=list(job.warnings),
    )


@contextmanager
def _session(repository: Repository, image_id: str) -> Iterator[None]:
    """Announce the capture to a gc of another host (`docs/format.md`, "Order of writing")."""
    repository.open_session(
        image_id,
        new_document(
            "session", id=image_id, host=socket.gethostname(), pid=os.getpid(), started=utc_now()
        ),
    )
    try:
        yield
    finally:
        repository.close_session(image_id)


def _store_disks(
    job: CaptureJob,
    repository: Repository,
    previous: Manifest | None,
    stored: StoredBlocks,
    statistics: Statistics,
    progress: Progress,
) -> tuple[list[dict[str, Any]], set[bytes]]:
    """Store all disks; their parts of the manifest, and the packs of others that they share."""
    with ExitStack() as stack:
        # leaving in reverse order: data packs are complete before the pages that refer to them
        pages = stack.enter_context(Packer(repository.store, PackKind.MAP))
        blocks = stack.enter_context(Packer(repository.store, PackKind.DATA))
        writers = []
        for disk in job.disks:
            lineage = Lineage(repository, previous, disk.name, stored)
            writer = _DiskWriter(
                disk, job, repository.block_size, stored.index, lineage, blocks, pages, statistics
            )
            writer.run(progress)
            writers.append(writer)
    statistics.stored_bytes = blocks.bytes_written + pages.bytes_written
    own = blocks.pack_ids | pages.pack_ids
    return [w.to_json() for w in writers], {id for w in writers for id in w.packs} - own


class _Block(NamedTuple):
    """What a worker found in one block: a record when it is new, a place when it is known."""

    state: State
    length: int
    digest: bytes = NO_DIGEST
    place: Place | None = None
    record: Record | None = None


class _DiskWriter:
    """One disk on its way into the repository."""

    def __init__(
        self,
        disk: SourceDisk,
        job: CaptureJob,
        block_size: int,
        index: BlockIndex,
        lineage: Lineage,
        blocks: Packer,
        pages: Packer,
        statistics: Statistics,
    ) -> None:
        self._disk = disk
        self._source = disk.source
        self._job = job
        self._block_size = block_size
        self._index = index
        self._lineage = lineage
        self._block_packer = blocks
        self._page_packer = pages
        self._statistics = statistics
        used = disk.layout.used()
        if job.all_blocks:
            used = Extents.whole(self._source.size).subtract(disk.layout.excluded())
        self._used_bytes = used.total
        self._depth = job.workers + _READ_AHEAD
        self._span_size = span_size(self._depth, block_size)
        self._plan = ReadPlan(self._source, used, block_size, span_size=self._span_size)
        self._map = BlockMapWriter(-(-self._source.size // block_size), self._store_page)
        self._page_encoder = Encoder(_PAGE_LEVEL, MAX_PAGE_LENGTH)
        self._encoders = PerThread(lambda: Encoder(job.level, block_size))
        self._unreadable: list[Extent] = []
        self.packs: set[bytes] = set()

    def run(self, progress: Progress) -> None:
        """Read and store every block, and the map."""
        progress.start(f"capturing {self._disk.name}", self._plan.bytes_to_read)
        self._progress = progress
        with BufferPool(self._depth, self._span_size) as pool:
            self._pool = pool
            run_pipeline(
                self._plan.jobs(pool),
                self._examine,
                self._store,
                workers=self._job.workers,
                depth=self._depth,
            )
        self._top, self._top_digest = self._map.finish()
        self._statistics.disk_bytes += self._source.size
        self._statistics.used_bytes += self._used_bytes

    def to_json(self) -> dict[str, Any]:
        """The disk's part of the manifest."""
        source, layout = self._source, self._disk.layout
        height = self._map.height
        return {
            "name": self._disk.name,
            "path": source.path,
            "size": source.size,
            "logical_sector": source.logical_sector,
            "physical_sector": source.physical_sector,
            "identity": self._disk.identity.to_json(),
            "table": layout.table.to_json(),
            "partitions": [volume.to_json() for volume in layout.volumes],
            "unreadable": [list(extent) for extent in Extents(self._unreadable)],
            "height": height,
            "top": {"pack": self._top.pack.hex(), "ordinal": self._top.ordinal},
            "root": root_digest(source.size, self._block_size, height, self._top_digest).hex(),
        }

    # --- in the worker threads ---

    def _examine(self, job: Span | EmptyRun) -> EmptyRun | tuple[Span, list[_Block]]:
        if isinstance(job, EmptyRun):
            return job
        try:
            blocks = [
                self._examine_block(job, start, min(start + self._block_size, job.length))
                for start in range(0, job.length, self._block_size)
            ]
        finally:
            self._pool.give(job.buffer)
        return job, blocks

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
            place = self._lineage.get((span.offset + start) // self._block_size, digest)
        if place is not None:
            return _Block(state, len(content), digest, place)
        record = self._encoders.get().encode(RecordKind.BLOCK, digest, content)
        return _Block(state, len(content), digest, None, record)

    # --- in the calling thread, in the order of the disk ---

    def _store(self, result: EmptyRun | tuple[Span, list[_Block]]) -> None:
        if isinstance(result, EmptyRun):
            self._map.add_run(result.state, result.blocks)
            if result.state == State.ZERO:
                self._statistics.zero_blocks += result.blocks
            else:
                self._statistics.unused_blocks += result.blocks
            return
        span, blocks = result
        for block in blocks:
            self._store_block(block)
        self._unreadable += span.unreadable
        self._statistics.read_bytes += span.read_bytes
        self._progress.advance(span.read_bytes)

    def _store_block(self, block: _Block) -> None:
        counts = self._statistics
        if block.state == State.ZERO:
            counts.zero_blocks += 1
            self._map.add(State.ZERO)
            return
        counts.data_blocks += 1
        place = block.place or self._index.get(block.digest)  # a twin may have come meanwhile
        if place is None:
            assert block.record is not None
            place = self._block_packer.append(block.record)
            self._index.add(block.digest, place)
            counts.new_blocks += 1
            counts.new_bytes += block.length
        else:
            counts.known_blocks += 1
        self.packs.add(place.pack)
        self._map.add(block.state, block.digest, place)

    def _store_page(self, page: Page) -> Place:
        content = page.encode()
        digest = digest_of(content)
        place = self._index.get(digest)
        if place is None:
            record = self._page_encoder.encode(RecordKind.PAGE, digest, content)
            place = self._page_packer.append(record)
            self._index.add(digest, place)
        self.packs.add(place.pack)
        return place
