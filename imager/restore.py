"""Restore: put an image's blocks onto a target, checking each digest before it is written.

The range's first block is written last; until then the target starts with a marker (``marker.py``),
so that an interrupted restore is recognised and gone on with. Blocks are independent of each other:
the workers decode, check and write in parallel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from imager.blockmap import BlockMap, Run
from imager.errors import ImagerError, IntegrityError, RefusedError
from imager.extents import Extent, Extents
from imager.format import State, digest_of
from imager.growfs import grow_filesystem
from imager.loopdevice import is_without_partitions
from imager.manifest import Disk, Manifest
from imager.marker import MARKER_SIZE, Marker
from imager.pack import Decoder, Pack
from imager.pipeline import Buffer, BufferPool, PerThread, run_pipeline, span_size, worker_count
from imager.plan import RestorePlan, block_runs
from imager.progress import Progress
from imager.repository import Repository
from imager.tableedit import grow_last_partition, move_backup_gpt, renew_ids, tell_kernel
from imager.target import Target

_READ_AHEAD = 2


@dataclass
class RestoreResult:
    """What a restore did, in bytes."""

    written_bytes: int = 0
    kept_bytes: int = 0
    zeroed_bytes: int = 0
    missing: list[str] = field(default_factory=list)
    new_ids: dict[str, str] = field(default_factory=dict)
    grown_to: int | None = None

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def restore(
    repository: Repository, manifest: Manifest, disk: Disk, plan: RestorePlan, progress: Progress
) -> RestoreResult:
    """Carry out a plan. Raises RefusedError if the plan has refusals, IntegrityError at the first
    block that is not what its digest says (it is not written), ImagerError when writing fails.
    """
    if plan.refusals:
        raise RefusedError(list(plan.refusals))
    result = RestoreResult(missing=list(plan.missing))
    create_size = None if plan.target_exists else plan.source.length
    with Target(plan.target, create_size=create_size) as target:
        restorer = _Restorer(repository, manifest, disk, plan, target, result, progress)
        restorer.write()
        if plan.options.read_back:
            restorer.read_back()
    _finish_table(disk, plan, result)
    return result


def _finish_table(disk: Disk, plan: RestorePlan, result: RestoreResult) -> None:
    """What differs from the image on purpose: the table's end, growth, new ids."""
    sector = disk.logical_sector
    if plan.whole_disk:
        table = disk.table
        if table.backup_size and plan.target_size != disk.size:
            move_backup_gpt(plan.target, sector_size=sector)
        if plan.options.new_ids:
            result.new_ids = renew_ids(plan.target, sector_size=sector)
        if plan.options.grow and plan.target_size > disk.size:
            _grow_disk(disk, plan, result, has_table=bool(table.partitions))
        if plan.target_exists and not is_without_partitions(plan.target):
            with suppress(ImagerError):  # the restore is complete; a reboot reads the table as well
                tell_kernel(plan.target)
    elif plan.options.grow and plan.target_size > plan.source.length:
        part = disk.partition(plan.options.partition or 0) or {}
        _grow_filesystem(disk, plan, result, plan.target_offset, plan.target_size, part)


def _grow_disk(disk: Disk, plan: RestorePlan, result: RestoreResult, *, has_table: bool) -> None:
    if not has_table:
        _grow_filesystem(disk, plan, result, 0, plan.target_size, (disk.partitions or [{}])[0])
        return
    last = grow_last_partition(plan.target, sector_size=disk.logical_sector)
    if last is not None:
        part = disk.partition(last.number) or {}
        _grow_filesystem(disk, plan, result, last.offset, last.size, part)


def _grow_filesystem(
    disk: Disk,
    plan: RestorePlan,
    result: RestoreResult,
    offset: int,
    size: int,
    part: dict[str, Any],
) -> None:
    kind = str((part.get("filesystem") or {}).get("kind", "unknown"))
    grow_filesystem(plan.target, offset, size, kind, sector_size=disk.logical_sector)
    result.grown_to = size


class _Empty(NamedTuple):
    """A range of the target that holds no data; offset and length in bytes."""

    state: State
    offset: int
    length: int


class _Piece(NamedTuple):
    """The wanted part of one block: bytes ``start`` to ``end`` of its content."""

    ordinal: int
    digest: bytes
    block: int
    length: int
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.end == self.length


class _Span(NamedTuple):
    """Neighbouring blocks whose records are neighbours in one pack."""

    pack: Pack
    pieces: list[_Piece]
    offset: int
    buffer: Buffer


class _Outcome(NamedTuple):
    """Bytes of one job."""

    written: int = 0
    kept: int = 0
    zeroed: int = 0
    checked: int = 0


class _Restorer:
    def __init__(
        self,
        repository: Repository,
        manifest: Manifest,
        disk: Disk,
        plan: RestorePlan,
        target: Target,
        result: RestoreResult,
        progress: Progress,
    ) -> None:
        self._repository = repository
        self._manifest = manifest
        self._disk = disk
        self._plan = plan
        self._target = target
        self._result = result
        self._progress = progress
        self._map: BlockMap = repository.block_map(disk)
        self._workers = worker_count()
        self._depth = self._workers + _READ_AHEAD
        self._span_size = span_size(self._depth, disk.block_size)
        self._compares = plan.options.delta or plan.resumes
        self._decoders = PerThread(Decoder)
        self._marker_lock = threading.Lock()
        self._marked = plan.resumes

    def write(self) -> None:
        """Everything behind the first block, then, when that is durable, the first block."""
        self._progress.start(f"restoring {self._disk.name}", self._plan.data_bytes)
        source = self._plan.source
        head_end = source.offset + self._head_length()
        if not self._compares:
            self._mark()
        self._run(Extent(head_end, source.end - head_end), self._write_job)
        self._target.sync()
        self._run(Extent(source.offset, head_end - source.offset), self._write_head)
        if self._plan.stale_gpt:
            self._target.zero(*self._plan.stale_gpt)
        self._target.sync()

    def read_back(self) -> None:
        """Compare the target with the image's digests. Raises IntegrityError naming each place."""
        self._target.drop_cache()
        self._faults: list[int] = []
        self._progress.start(f"reading back {self._disk.name}", self._plan.data_bytes)
        self._run(self._plan.source, self._check_job)
        if self._faults:
            places = "\n".join(
                f"  - byte {offset}, {self._disk.where(offset)}" for offset in sorted(self._faults)
            )
            raise IntegrityError(
                f"{self._plan.target} does not hold what was written to it, at:\n{places}",
                hint="do not use this disk; restore to another one",
            )

    def _run(self, source: Extent, work: Callable[[_Span | _Empty], _Outcome]) -> None:
        self._target_data = self._target.data_extents()
        with BufferPool(self._depth, self._span_size) as pool:
            self._pool = pool
            run_pipeline(
                self._jobs(source), work, self._account, workers=self._workers, depth=self._depth
            )

    def _account(self, outcome: _Outcome) -> None:
        self._result.written_bytes += outcome.written
        self._result.kept_bytes += outcome.kept
        self._result.zeroed_bytes += outcome.zeroed
        self._progress.advance(outcome.written + outcome.kept + outcome.checked)

    # --- in the feeder ---

    def _jobs(self, source: Extent) -> Iterator[_Span | _Empty]:
        """What a range of the disk consists of, in order, in places of the target; without the
        partitions that are left out of the image: they stay what they are."""
        for part in Extents([source] if source.length > 0 else []).subtract(self._disk.excluded):
            yield from self._jobs_within(part)

    def _jobs_within(self, source: Extent) -> Iterator[_Span | _Empty]:
        unit, shift = self._disk.block_size, self._plan.target_offset - self._plan.source.offset
        pieces: list[_Piece] = []
        pack: bytes | None = None
        for run in block_runs(self._map, self._disk, source):
            start = max(run.first * unit, source.offset)
            end = min((run.first + run.blocks) * unit, source.end)
            if run.place is None:
                yield from self._span(pack, pieces, shift)
                pieces = []
                yield _Empty(run.state, start + shift, end - start)
                continue
            if pieces and not self._continues(pack, pieces, run):
                yield from self._span(pack, pieces, shift)
                pieces = []
            pack = run.place.pack
            length = min(unit, self._disk.size - run.first * unit)
            begin = run.first * unit
            pieces.append(
                _Piece(run.place.ordinal, run.digest, run.first, length, start - begin, end - begin)
            )
        yield from self._span(pack, pieces, shift)

    def _continues(self, pack: bytes | None, pieces: list[_Piece], run: Run) -> bool:
        assert run.place is not None
        last = pieces[-1]
        return (
            pack == run.place.pack
            and last.ordinal + 1 == run.place.ordinal
            and last.block + 1 == run.first
            and (len(pieces) + 1) * self._disk.block_size <= self._span_size
        )

    def _span(self, pack: bytes | None, pieces: list[_Piece], shift: int) -> Iterator[_Span]:
        if not pieces or pack is None:
            return
        opened = self._repository.pack(pack)
        if pieces[-1].ordinal >= len(opened.entries):
            raise self._fault(pieces[-1], opened, "there is no such record")
        offset = pieces[0].block * self._disk.block_size + pieces[0].start + shift
        yield _Span(opened, pieces, offset, self._pool.take())

    # --- in the workers ---

    def _write_job(self, job: _Span | _Empty) -> _Outcome:
        if isinstance(job, _Empty):
            return self._write_empty(job)
        try:
            return self._compare_span(job) if self._compares else self._write_span(job)
        finally:
            self._pool.give(job.buffer)

    def _write_head(self, job: _Span | _Empty) -> _Outcome:
        """The first block: the marker is there, so even zeros have to be written.

        Its first sector, which tells the marker, comes last: should the power fail in the middle,
        either the marker is whole or the block is.
        """
        if isinstance(job, _Empty) and self._marked:
            first = min(self._target.logical_sector, job.length)
            if job.length > first:
                self._target.zero(job.offset + first, job.length - first)
                self._target.sync()
            self._target.zero(job.offset, first)
            return _Outcome(zeroed=job.length)
        if isinstance(job, _Span) and self._marked:
            try:
                return self._write_span(job, self._write_first_sector_last)
            finally:
                self._pool.give(job.buffer)
        return self._write_job(job)

    def _write_first_sector_last(self, offset: int, content: memoryview) -> None:
        first = self._target.logical_sector
        if len(content) > first:
            self._target.write(offset + first, content[first:])
            self._target.sync()
        self._target.write(offset, content[:first])

    def _write_empty(self, job: _Empty) -> _Outcome:
        """Zero blocks must read as zeros; unused ones are better discarded than left."""
        if self._target.is_fresh:
            return _Outcome()
        if self._plan.options.delta and not self._plan.resumes:
            if job.state == State.UNUSED or self._reads_as_zero(job.offset, job.length):
                return _Outcome()
            self._mark()
        if job.state == State.UNUSED:
            self._target.discard(job.offset, job.length)
        else:
            self._target.zero(job.offset, job.length)
        return _Outcome(zeroed=job.length)

    def _reads_as_zero(self, offset: int, length: int) -> bool:
        buffer = Buffer(min(length, self._span_size))
        for extent in self._target_data.within(offset, length):
            for start in range(extent.offset, extent.end, self._span_size):
                step = min(self._span_size, extent.end - start)
                self._target.read_into(start, buffer.view[:step])
                if not buffer.is_zero(0, step):
                    return False
        return True

    def _write_span(
        self, span: _Span, write: Callable[[int, memoryview], None] | None = None
    ) -> _Outcome:
        """Decode all of the span, then write it at once."""
        at = 0
        content = span.pack.read(span.pieces[0].ordinal, len(span.pieces))
        first = span.pieces[0].ordinal
        for piece in span.pieces:
            frame = span.pack.frame(content, first, piece.ordinal)
            self._decode(span.pack, piece, frame, span.buffer.view[at : at + piece.length])
            at += piece.length
        start = span.pieces[0].start
        end = at - span.pieces[-1].length + span.pieces[-1].end
        (write or self._target.write)(span.offset, span.buffer.view[start:end])
        return _Outcome(written=end - start)

    def _compare_span(self, span: _Span) -> _Outcome:
        """Read what the target has, and write the blocks that differ."""
        written = kept = 0
        offset = span.offset
        for piece in span.pieces:
            length = piece.end - piece.start
            view = span.buffer.view[: piece.length]
            if piece.is_whole and self._target_has(offset, view, piece.digest):
                kept += length
            else:
                content = span.pack.read(piece.ordinal, 1)
                frame = span.pack.frame(content, piece.ordinal, piece.ordinal)
                self._decode(span.pack, piece, frame, view)
                self._mark()
                self._target.write(offset, view[piece.start : piece.end])
                written += length
            offset += length
        return _Outcome(written=written, kept=kept)

    def _target_has(self, offset: int, view: memoryview, digest: bytes) -> bool:
        if len(view) % self._target.logical_sector and self._target.is_device:
            return False
        self._target.read_into(offset, view)
        return digest_of(view) == digest

    def _decode(self, pack: Pack, piece: _Piece, frame: memoryview, view: memoryview) -> None:
        entry = pack.entries[piece.ordinal]
        try:
            if entry.digest != piece.digest:
                raise IntegrityError("the record there is another block")
            self._decoders.get().decode_into(entry, frame, view, check_crc=False)
        except IntegrityError as error:
            raise self._fault(piece, pack, error.message) from None

    def _fault(self, piece: _Piece, pack: Pack, reason: str) -> IntegrityError:
        offset = piece.block * self._disk.block_size
        return IntegrityError(
            f"{self._manifest.id}/{self._disk.name}, byte {offset} ({self._disk.where(offset)}): "
            f"{pack.name}, record {piece.ordinal}: {reason}; it was not written",
            hint="imager verify lists all damage; restore another image",
        )

    def _check_job(self, job: _Span | _Empty) -> _Outcome:
        """Read-back of one job: remembers the blocks that differ."""
        shift = self._plan.source.offset - self._plan.target_offset
        if isinstance(job, _Empty):
            if job.state == State.ZERO and not self._reads_as_zero(job.offset, job.length):
                self._faults.append(job.offset + shift)
            return _Outcome()
        try:
            offset = job.offset
            for piece in job.pieces:
                if not self._holds(job, piece, offset):
                    self._faults.append(offset + shift)
                offset += piece.end - piece.start
        finally:
            self._pool.give(job.buffer)
        return _Outcome(checked=offset - job.offset)

    def _holds(self, span: _Span, piece: _Piece, offset: int) -> bool:
        """Whether the target has a block, or the part of it that belongs to the partition."""
        view = span.buffer.view[: piece.length]
        if piece.is_whole:
            self._target.read_into(offset, view)
            return digest_of(view) == piece.digest
        content = span.pack.read(piece.ordinal, 1)
        self._decode(span.pack, piece, span.pack.frame(content, piece.ordinal, piece.ordinal), view)
        there = Buffer(piece.length)
        part = there.view[piece.start : piece.end]
        self._target.read_into(offset, part)
        return bytes(part) == bytes(view[piece.start : piece.end])

    def _head_length(self) -> int:
        """What is written last: up to the first border of blocks behind the marker."""
        source, unit = self._plan.source, self._disk.block_size
        border = -(-(source.offset + MARKER_SIZE) // unit) * unit
        return min(border, source.end) - source.offset

    def _mark(self) -> None:
        """Put the marker at the start of the target, once, before anything else is written."""
        with self._marker_lock:
            if self._marked:
                return
            if self._head_length() >= MARKER_SIZE:
                offset = self._plan.source.offset
                marker = Marker(self._manifest.id, self._disk.name, self._disk.root, offset)
                buffer = Buffer(MARKER_SIZE)
                buffer.view[:] = marker.encode()
                self._target.write(self._plan.target_offset, buffer.view)
                self._target.sync()
            self._marked = True
