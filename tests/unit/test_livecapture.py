"""Capture in passes, of a disk in memory that changes while it is read: the image is of the moment
of the freeze, to the digest."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager import livecapture
from imager.capture import CaptureJob, SourceDisk, capture
from imager.errors import ImagerError
from imager.extents import Extents
from imager.layout import DiskLayout
from imager.livecapture import Base
from imager.manifest import Manifest
from imager.progress import NullProgress
from imager.repository import Repository
from imager.tracking import UNIT, Written, WrittenMap
from tests.support.disks import MEMORY_FOLDER
from tests.support.sources import MemorySource, memory_disk

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
PIECE = 4 * KIB


class Thaw:
    milliseconds = 7

    def end(self) -> None:
        pass


class BusyDisk(MemorySource):
    """Something writes to it at its reads, and what it calls used changes; not while frozen."""

    def __init__(self, size: int, chance: random.Random, *, writes: int, loses: int = 0) -> None:
        super().__init__(chance.randbytes(size // 2) + bytes(size - size // 2))
        self.chance = chance
        self.writes_left = writes
        self.losses_left = loses
        self.is_frozen = False
        self.restarts = 0
        self.freezes = 0
        self.late: list[tuple[int, int]] = []
        self.used = self.random_use()
        self.written = WrittenMap(size)

    def random_use(self) -> Extents:
        pieces = self.size // PIECE
        starts = [self.chance.randrange(pieces) for _ in range(6)]
        return Extents(
            (at * PIECE, min(self.chance.randrange(1, 40), pieces - at) * PIECE) for at in starts
        )

    def write(self, offset: int, content: bytes) -> None:
        changed = bytearray(self.content)
        changed[offset : offset + len(content)] = content
        self.content = bytes(changed)
        self.written.add(offset, len(content))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        if self.is_frozen:
            for at, length in self.late:
                self.write(at, self.chance.randbytes(length))
            self.late = []
        elif self.writes_left and self.chance.random() < 0.7:
            self.writes_left -= 1
            length = self.chance.choice([512, 4096, 90_000])
            at = self.chance.randrange(self.size - length)
            self.write(at, self.chance.choice([bytes(length), self.chance.randbytes(length)]))
            if self.chance.random() < 0.3:
                self.used = self.random_use()

    # --- LiveDisks ---

    def take(self) -> list[Written]:
        taken = Written(self.written.extents())
        self.written = WrittenMap(self.size)
        if self.losses_left and self.chance.random() < 0.5:
            self.losses_left -= 1
            return [Written(Extents(), lost=True)]  # not even what was seen is told
        return [taken]

    def restart(self) -> None:
        self.restarts += 1
        self.written = WrittenMap(self.size)

    def sync(self) -> None:
        pass

    @contextmanager
    def frozen(self) -> Iterator[Thaw]:
        if self.late:
            self.write(0, bytes(4096))  # written out by the freeze, so it is read within it
        self.is_frozen = True
        self.freezes += 1
        yield Thaw()
        self.is_frozen = False

    def layouts(self) -> Sequence[DiskLayout]:
        return [memory_disk(self, self.used).layout]


def take(
    folder: str, disk: SourceDisk, live: BusyDisk | None, bases: dict[str, Base] | None = None
) -> Manifest:
    if not Path(folder, "repository.json").exists():
        Repository.create(folder, block_size=BLOCK)
    job = CaptureJob((disk,), name="test", live=live, bases=bases or {}, workers=1)
    return capture(job, Repository.open(folder), NullProgress())


def captured_quietly(folder: str, busy: BusyDisk) -> Manifest:
    """What an image of the disk as it is now must be."""
    return take(folder, memory_disk(MemorySource(busy.content), busy.used), None)


@pytest.fixture
def memory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
        yield folder


def no_tolerance(patch: pytest.MonkeyPatch) -> None:
    """So that several passes are made over small disks."""
    patch.setattr(livecapture, "_LITTLE", 0)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32), st.integers(0, 30), st.integers(0, 2))
def test_the_image_is_of_the_moment_of_the_freeze(seed: int, writes: int, loses: int) -> None:
    with (
        tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as memory,
        pytest.MonkeyPatch.context() as patch,
    ):
        if seed % 2:
            no_tolerance(patch)
        busy = BusyDisk(3 * MIB + 512, random.Random(seed), writes=writes, loses=loses)
        manifest = take(f"{memory}/live", memory_disk(busy, busy.used), busy)
        expected = captured_quietly(f"{memory}/quiet", busy)
        assert manifest.disks[0].root == expected.disks[0].root
        assert manifest.document["tracked"]["rescans"] == busy.restarts
        assert manifest.document["tracked"]["freeze_milliseconds"] == 7
        counts = ("zero_blocks", "unused_blocks", "data_blocks", "used_bytes", "disk_bytes")
        assert [manifest.statistics[key] for key in counts] == [
            expected.statistics[key] for key in counts
        ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32), st.integers(0, 12), st.integers(0, 12))
def test_with_a_record_only_changes_are_read(seed: int, before: int, during: int) -> None:
    """The first image's allocation map and what was written since: the second image is whole."""
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as memory:
        busy = BusyDisk(3 * MIB, random.Random(seed), writes=0)
        busy.used = Extents.whole(2 * MIB)
        first = take(f"{memory}/live", memory_disk(busy, busy.used), busy)
        used = busy.used
        for _ in range(before):
            busy.write(busy.chance.randrange(busy.size - 4096), busy.chance.randbytes(4096))
        if before % 2:
            busy.used = busy.random_use()
        busy.writes_left, busy.reads = during, []
        (written,) = busy.take()
        base = Base(first.id, first.disks[0], used, written.extents)
        disk = memory_disk(busy, busy.used)
        second = take(f"{memory}/live", disk, busy, {"disk": base})
        expected = captured_quietly(f"{memory}/quiet", busy)
        assert second.disks[0].root == expected.disks[0].root
        if not before and not during:
            # A sample of what the record calls unchanged is read all the same.
            assert sum(read.length for read in busy.reads) <= livecapture._SAMPLE * BLOCK
        assert second.document["tracked"]["since"] == [first.id]


def test_a_loss_each_time_is_an_error(memory: str) -> None:
    busy = BusyDisk(MIB, random.Random(1), writes=5, loses=0)
    busy.take = lambda: [Written(Extents(), lost=True)]  # type: ignore[method-assign]
    with pytest.raises(ImagerError, match="lost events 4 times"):
        take(f"{memory}/live", memory_disk(busy, busy.used), busy)
    assert Repository.open(f"{memory}/live").image_ids() == []


def test_what_is_written_while_frozen_is_read_again(memory: str) -> None:
    """By something that no filesystem holds back."""
    busy = BusyDisk(MIB, random.Random(1), writes=0)
    busy.used = Extents.whole(MIB)
    busy.late = [(512, 4096), (600_000, 512)]
    manifest = take(f"{memory}/live", memory_disk(busy, busy.used), busy)
    assert busy.late == []
    assert manifest.disks[0].root == captured_quietly(f"{memory}/quiet", busy).disks[0].root
    assert manifest.document["tracked"]["unfrozen_bytes"] == 0


def test_more_than_memory_holds_is_read_before_another_freeze(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_tolerance(monkeypatch)
    monkeypatch.setattr(livecapture, "_most_held", lambda: 2 * BLOCK)
    busy = BusyDisk(2 * MIB, random.Random(3), writes=0)
    busy.used = Extents.whole(2 * MIB)
    original = busy.frozen

    @contextmanager
    def flushing() -> Iterator[Thaw]:
        if not busy.freezes:  # what the filesystem held back until now
            busy.write(0, b"\x77" * (10 * UNIT))
        with original() as thaw:
            yield thaw

    busy.frozen = flushing  # type: ignore[method-assign]
    manifest = take(f"{memory}/live", memory_disk(busy, busy.used), busy)
    assert busy.freezes == 2
    assert manifest.disks[0].root == captured_quietly(f"{memory}/quiet", busy).disks[0].root


def test_bad_sectors_are_listed_once(memory: str) -> None:
    """Unless a later pass could read them."""
    busy = BusyDisk(MIB, random.Random(4), writes=0)
    busy.used = Extents.whole(MIB)
    busy.bad = frozenset([3, 1000])
    busy.written.add(0, 4096)
    manifest = take(f"{memory}/live", memory_disk(busy, busy.used), busy)
    assert manifest.disks[0].unreadable == Extents([(3 * 512, 512), (1000 * 512, 512)])
    assert manifest.partial
    used, busy.bad = busy.used, frozenset([3])
    base = Base(manifest.id, manifest.disks[0], used, Extents())
    disk = memory_disk(busy, used)
    manifest = take(f"{memory}/live", disk, busy, {"disk": base})
    assert manifest.disks[0].unreadable == Extents([(3 * 512, 512)])
