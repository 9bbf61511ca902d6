"""Capture of disks that are being written: passes, and a last one while their filesystems wait.

The first pass reads all that is used; each further one what was written during the one before,
until little is left. Then the filesystems are frozen, the allocation maps read again, and what was
written since, or became used, is read into memory; nothing is stored before the thaw, for the
repository may lie on what is frozen. So the image is of the moment of the freeze.

A block counts as old when an event says that a write to it ended (``blocktrace``), and when the
allocation map calls other pieces of it used than when it was read: the pieces that are not used are
zeroed, so its content is another one even if nothing was written. Where events were lost, all is
read again and compared by digests.

The first pass leaves a block map in the repository. The image's own map is that one with the blocks
that came later in their places: what it holds in memory are the changes, not the disk. The map of
an earlier image serves as well, when a record tells what was written since (``trackrecord``).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import randrange
from typing import Any, Protocol

from imager.blockmap import BlockMap, Run
from imager.blockstoring import BlockStorer, FinishedMap, MapEntry, MapStorer, Statistics
from imager.errors import ImagerError
from imager.extents import Extents
from imager.format import State, digest_of
from imager.layout import DiskLayout
from imager.manifest import Disk
from imager.pack import Packer
from imager.progress import Progress
from imager.reading import EmptyRun, Span
from imager.repository import Repository, StoredBlocks
from imager.sysfs import read_text
from imager.tracking import Written

# As much is read within the freeze without another pass: a tenth of a second on a slow disk.
_LITTLE = 16 << 20

# A pass that leaves more than this part of what it read does not get ahead of the writers.
_SHRINKS = 0.7
_MOST_PASSES = 8

# What is read right before and within the freeze stays in memory until the thaw: a part of what is
# available, within bounds.
_HELD_PART = 4
_LEAST_HELD, _MOST_HELD = 256 << 20, 2 << 30
_MEMINFO = Path("/proc/meminfo")

# Blocks that a record calls unchanged and that are read and compared all the same.
_SAMPLE = 16

_FREEZES = 4
_RESCANS = 3
_LATE_READS = 3


class Frozen(Protocol):
    """Filesystems that wait."""

    milliseconds: int
    """How long they did, once they go on."""

    def end(self) -> None:
        """Let them go on. Raises ImagerError when they did not wait until now."""


class LiveDisks(Protocol):
    """The disks of a capture while they are written, in its order."""

    def take(self) -> list[Written]:
        """What was written to each since the last call."""

    def restart(self) -> None:
        """After a loss: track anew, with more room for events."""

    def sync(self) -> None:
        """Have their filesystems write out what they hold back."""

    def frozen(self) -> AbstractContextManager[Frozen]:
        """All their filesystems written out and waiting."""

    def layouts(self) -> Sequence[DiskLayout]:
        """Their layouts as they are now."""


@dataclass(frozen=True)
class Base:
    """An earlier image's disk, and what may be another since: its other blocks need no reading."""

    image: str
    disk: Disk
    used: Extents
    """What it captured, in bytes."""
    written: Extents


@dataclass
class LiveResult:
    """How a live capture went: key ``tracked`` of the manifest."""

    passes: int = 0
    reread_bytes: int = 0
    freeze_milliseconds: int = 0
    unfrozen_bytes: int = 0
    """Written during the freeze by something that no filesystem holds back, and not read again."""
    rescans: int = 0
    """Times that all was read again, because events were lost."""
    commands: int = 0
    """SCSI or NVMe commands that bypass the block layer; what they wrote is unknown."""
    sampled_blocks: int = 0
    lie: str | None = None
    """What was found changed that the record called unchanged; all was read again then."""
    since: list[str | None] = field(default_factory=list)
    """For each disk the image whose blocks were taken over unread."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "since": list(self.since)}


def captured(layout: DiskLayout, *, all_blocks: bool) -> Extents:
    """What of a disk is captured, in bytes."""
    if all_blocks:
        return Extents.whole(layout.size).subtract(layout.excluded())
    return layout.used()


class LiveDisk:
    """One disk of a live capture."""

    def __init__(
        self,
        layout: DiskLayout,
        storer: BlockStorer,
        final: MapStorer,
        stored: StoredBlocks,
        base: Base | None,
    ) -> None:
        self.layout = layout
        self.storer = storer
        self.base = base
        self.used = Extents()
        """What is captured, by the newest allocation map."""
        self._final = final
        self._stored = stored
        self._changes: dict[int, MapEntry] = {}
        self._sample: list[Run] = []
        self._held: dict[int, Span] = {}
        self._map: BlockMap | None = None
        self.pending = Extents()

    def blocks_of(self, extents: Extents) -> Extents:
        """The used bytes of all blocks that these touch."""
        size, unit = self.storer.source.size, self.storer.block_size
        return extents.align_outward(unit, size).intersect(self.used)

    def first_pass(
        self, used: Extents, repository: Repository, pages: Packer, progress: Progress
    ) -> None:
        """Read all that is used; with a base, what changed since is pending."""
        self.used = used
        self._changes.clear()
        self._sample.clear()
        self._held.clear()
        self.pending = Extents()
        source, unit = self.storer.source, self.storer.block_size
        if self.base is not None:
            self._map = repository.block_map(self.base.disk)
            self.storer.unreadable = self.base.disk.unreadable
            again = [*self.base.written, *self.base.disk.unreadable, *self._not_shared()]
            self.pending = Extents(again)
            self._note_use(self.base.used, self.used)
            return
        provisional = MapStorer(source.size, unit, self._stored.index, pages, Statistics())
        self.storer.unreadable = Extents()
        plan = self.storer.plan(used)
        progress.start("first pass", plan.bytes_to_read)
        self.storer.store(plan, provisional.add_run, provisional.add_next, progress)
        done = provisional.finish()
        pages.finish()
        self._map = _block_map(repository, source.size, unit, done)

    def _not_shared(self) -> Iterator[tuple[int, int]]:
        """Blocks of the base whose packs are gone or going. Draws the sample on its way."""
        assert self._map is not None
        unit = self.storer.block_size
        seen = 0
        for run in self._map.runs():
            if run.place is None:
                continue
            seen += 1  # each block has the same chance to be in the sample
            if len(self._sample) < _SAMPLE:
                self._sample.append(run)
            elif (at := randrange(seen)) < _SAMPLE:
                self._sample[at] = run
            if self._entry(run) is None:
                yield run.first * unit, unit

    def _entry(self, run: Run) -> MapEntry | None:
        """As the first map has it; None when its pack must not be shared."""
        place = run.place
        if self.base and place is not None and place.pack not in self._stored.packs:
            place = self._stored.index.get(run.digest)
            if place is None:
                return None
        return MapEntry(run.state, run.digest, place)

    def _note_use(self, before: Extents, now: Extents) -> None:
        """Blocks that have other used pieces than when they were read are read again."""
        self.used = now
        self.pending = Extents([*self.pending, *before.subtract(now), *now.subtract(before)])

    def note(self, written: Written) -> None:
        self.pending = self.pending.union(written.extents)

    def note_layout(self, used: Extents) -> None:
        """The allocation map of the last moment."""
        self._note_use(self.used, used)

    def pending_bytes(self) -> int:
        """In whole blocks."""
        size, unit = self.storer.source.size, self.storer.block_size
        return self.blocks_of(self.pending).align_outward(unit, size).total

    def read_pending(self, progress: Progress) -> int:
        """A pass over what is pending; returns the bytes."""
        plan = self.storer.plan(self.blocks_of(self.pending))
        self.pending = Extents()
        progress.start("what was written meanwhile", plan.bytes_to_read)
        self.storer.store(plan, lambda run: None, self.change, progress)
        return plan.bytes_to_read

    def hold_pending(self) -> None:
        """Read what is pending into memory, over what was held of the same blocks."""
        wanted = self.blocks_of(self.pending)
        self.pending = Extents()
        self._held |= {span.offset: span for span in self.storer.hold(wanted)}

    def held_bytes(self) -> int:
        """What ``hold_pending`` has brought and would bring."""
        unit, size = self.storer.block_size, self.storer.source.size
        held = Extents((offset, span.length) for offset, span in self._held.items())
        return held.union(self.blocks_of(self.pending).align_outward(unit, size)).total

    def store_held(self, progress: Progress) -> int:
        """Store what is held; returns the bytes."""
        spans = [self._held[offset] for offset in sorted(self._held)]
        self._held.clear()
        self.storer.store_held(spans, self.change, progress)
        return sum(span.read_bytes for span in spans)

    def hold_sample(self) -> list[Span]:
        """Of the blocks that need no reading, those that are compared."""
        unit = self.storer.block_size
        unchanged = [
            (run.first * unit, unit)
            for run in self._sample
            if run.first not in self._changes
            and run.first * unit not in self._held
            and next(self.pending.within(run.first * unit, unit), None) is None
        ]
        size = self.storer.source.size
        return self.storer.hold(self.used.intersect(Extents(unchanged).clip(0, size)))

    def lies(self, sample: Sequence[Span]) -> list[int]:
        """Offsets of the blocks that are not what the base has there."""
        digests = {run.first: run.digest for run in self._sample}
        return [
            span.offset
            for span in sample
            if digest_of(span.buffer.view[: span.length])
            != digests[span.offset // self.storer.block_size]
        ]

    def change(self, number: int, entry: MapEntry) -> None:
        self._changes[number] = entry

    def finish(self) -> FinishedMap:
        """The image's map."""
        assert self._map is not None
        size, unit = self.storer.source.size, self.storer.block_size
        used = self.used.align_outward(unit, size)
        numbers = sorted(self._changes)
        for run in self._map.runs():
            if run.blocks == 1:
                self._add(run, used)
                continue
            at = run.first
            end = at + run.blocks
            for number in numbers[bisect_left(numbers, at) : bisect_left(numbers, end)]:
                self._add_empty(run.state, at, number, used)
                self._add(run._replace(first=number, blocks=1), used)
                at = number + 1
            self._add_empty(run.state, at, end, used)
        self.storer.unreadable = self.storer.unreadable.intersect(self.used)
        return self._final.finish()

    def _add(self, run: Run, used: Extents) -> None:
        """One block, which may be a changed one."""
        unit = self.storer.block_size
        if next(used.within(run.first * unit, unit), None) is None:
            self._final.add(MapEntry(State.UNUSED))
            return
        entry = self._changes.get(run.first)
        if entry is None:
            self._must_be_read(run)
            entry = self._entry(run)
        if entry is None:
            raise ImagerError(
                "a pack that this capture shares has gone meanwhile", hint="run it again"
            )
        self._final.add(entry)

    def _add_empty(self, state: State, first: int, end: int, used: Extents) -> None:
        """Blocks without changes, all zero or unused by the first map."""
        unit, at = self.storer.block_size, first
        for extent in used.within(first * unit, (end - first) * unit):
            start, stop = extent.offset // unit, -(-extent.end // unit)
            self._add_run(State.UNUSED, at, start)
            self._must_be_read(Run(start, stop - start, state, b"", None))
            self._add_run(state, start, stop)
            at = stop
        self._add_run(State.UNUSED, at, end)

    def _add_run(self, state: State, first: int, end: int) -> None:
        if first < end:
            self._final.add_run(EmptyRun(state, end - first))

    def _must_be_read(self, run: Run) -> None:
        """A block that is used now and was not when it was read is always pending: this holds."""
        if run.state == State.UNUSED:
            raise ImagerError(f"block {run.first} is used and was not read: there is no image")


def _block_map(repository: Repository, size: int, block_size: int, done: FinishedMap) -> BlockMap:
    digest = repository.page(done.top).content_digest()
    blocks = -(-size // block_size)
    return BlockMap(repository, blocks=blocks, height=done.height, top=done.top, top_digest=digest)


def _most_held() -> int:
    """In bytes, of what proc(5) calls available."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", read_text(_MEMINFO) or "", re.MULTILINE)
    available = int(found[1]) << 10 if found else 0
    return min(max(available // _HELD_PART, _LEAST_HELD), _MOST_HELD)


class _EventsLost(Exception):
    """Anything may have been written."""


class LiveCapture:
    """All disks of a live capture."""

    def __init__(
        self,
        live: LiveDisks,
        disks: Sequence[LiveDisk],
        repository: Repository,
        blocks: Packer,
        pages: Packer,
        progress: Progress,
        *,
        all_blocks: bool,
    ) -> None:
        self._live = live
        self.disks = disks
        self._repository = repository
        self._blocks = blocks
        self._pages = pages
        self._progress = progress
        self._all_blocks = all_blocks
        self.layouts: Sequence[DiskLayout] = ()
        """As they were at the freeze."""
        self.result = LiveResult()
        self._samples: list[list[Span]] = []

    def run(self) -> None:
        """Read and store everything but the maps: those are each disk's ``finish``.

        Raises ImagerError when events are lost again and again, or too much is written.
        """
        for attempt in range(_RESCANS + 1):
            try:
                self._passes()
                return
            except _EventsLost:
                if attempt == _RESCANS:
                    break
                why = self.result.lie or "events of the kernel were lost"
                self._progress.note(f"{why}: all is read again")
                self.result.rescans += 1
                for disk in self.disks:
                    disk.base = None
                self._live.restart()
        raise ImagerError(
            f"the kernel lost events {_RESCANS + 1} times: the disk is written too fast to be "
            "tracked",
            hint="try again when it is quieter, or --consistency freeze",
        )

    def _passes(self) -> None:
        """From when tracking began, or from what the record of an earlier image says."""
        for disk in self.disks:
            used = captured(disk.layout, all_blocks=self._all_blocks)
            disk.first_pass(used, self._repository, self._pages, self._progress)
        self.result.passes += 1
        self.result.since = [disk.base.image if disk.base else None for disk in self.disks]
        for _ in range(_FREEZES):
            self._catch_up()
            self._blocks.finish()  # so that nothing is under way to what will be frozen
            self._pages.finish()
            if self._last_pass():
                return
        raise ImagerError(
            f"more than {_most_held() >> 20} MiB were written between two passes: the disk is "
            "written too fast to be tracked",
            hint="try again when it is quieter, or --consistency freeze",
        )

    def _catch_up(self) -> None:
        """Read what was written until little is left, or the writers are as fast."""
        left = self._take()
        for _ in range(_MOST_PASSES):
            self._live.sync()
            before, left = left, self._take()
            if left <= _LITTLE:
                return
            for disk in self.disks:
                self._count(disk.read_pending(self._progress))
            left = self._take()
            if left > before * _SHRINKS:
                return

    def _last_pass(self) -> bool:
        """The one of the image's moment; False when it is more than memory should hold."""
        most = _most_held()
        self._live.sync()
        self._take()
        is_done = self._hold(most)  # so that the freeze has less to read
        if is_done:
            with self._live.frozen() as freeze:
                is_done = self._read_frozen(most)
                if is_done:
                    freeze.end()
            self.result.freeze_milliseconds = freeze.milliseconds
        if is_done:
            self._compare()
        for disk in self.disks:
            self._count(disk.store_held(self._progress))
        return is_done

    def _read_frozen(self, most: int) -> bool:
        """Nothing may be written or told to anybody here: whoever gets it may be waiting too."""
        self._take()
        self.layouts = self._live.layouts()
        for disk, layout in zip(self.disks, self.layouts, strict=True):
            disk.note_layout(captured(layout, all_blocks=self._all_blocks))
        self._samples = [disk.hold_sample() for disk in self.disks]
        left = 0
        for _ in range(_LATE_READS):
            if not self._hold(most):
                return False
            left = self._take()
            if not left:
                break
        self.result.unfrozen_bytes = left
        return True

    def _hold(self, most: int) -> bool:
        """Read into memory what is pending, unless that is more than ``most`` bytes."""
        if sum(disk.held_bytes() for disk in self.disks) > most:
            return False
        for disk in self.disks:
            disk.hold_pending()
        return True

    def _compare(self) -> None:
        """Whether what the record calls unchanged is; else nothing of it is believed."""
        for disk, sample in zip(self.disks, self._samples, strict=True):
            self.result.sampled_blocks += len(sample)
            if lies := disk.lies(sample):
                unit = disk.storer.block_size
                self.result.lie = (
                    f"{disk.storer.source.path}: the record of writes calls {unit} bytes at byte "
                    f"{lies[0]} unchanged, and they are not"
                )
                raise _EventsLost

    def _take(self) -> int:
        """Note what was written; the bytes that are to be read now."""
        taken = self._live.take()
        self.result.commands += sum(written.commands for written in taken)
        if any(written.lost for written in taken):
            raise _EventsLost
        for disk, written in zip(self.disks, taken, strict=True):
            disk.note(written)
        return sum(disk.pending_bytes() for disk in self.disks)

    def _count(self, read: int) -> None:
        self.result.passes += bool(read)
        self.result.reread_bytes += read
