"""Restores that are interrupted, lied to, or given an odd target; and their marker."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import imager.restore
from imager.capture import CaptureJob, capture
from imager.errors import ImagerError, IntegrityError, RefusedError, UsageError
from imager.extents import Extents
from imager.layout import DiskLayout, Volume
from imager.manifest import Manifest
from imager.marker import MARKER_SIZE, Marker
from imager.partitions import Partition, PartitionTable
from imager.plan import RestoreOptions, RestorePlan, plan_restore
from imager.progress import NullProgress
from imager.repository import Repository
from imager.restore import RestoreResult, restore
from imager.target import Target
from tests.support.sources import MemorySource, memory_disk

KIB, MIB = 1 << 10, 1 << 20
UNIT = 64 * KIB


class Bench:
    """An image of one disk, and restores of it."""

    def __init__(self, repo: Path, content: bytes, used: Extents | None = None) -> None:
        self.repository = Repository.open(str(repo))
        self.content = content
        job = CaptureJob(disks=(memory_disk(MemorySource(content), used),), name="test")
        self.manifest: Manifest = capture(job, self.repository, NullProgress())
        self.disk = self.manifest.disks[0]

    def plan(self, target: Path, **options: object) -> RestorePlan:
        chosen = RestoreOptions(**options)  # type: ignore[arg-type]
        return plan_restore(self.repository, self.manifest, self.disk, str(target), chosen)

    def restore(self, target: Path, **options: object) -> RestoreResult:
        plan = self.plan(target, **options)
        return restore(self.repository, self.manifest, self.disk, plan, NullProgress())


@pytest.fixture
def bench(repo: Path) -> Bench:
    return Bench(repo, random.Random(1).randbytes(8 * MIB))


class PowerCut(Exception):
    pass


def cut_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target fails at the write with this number, and forever after."""
    left = [writes]

    class Failing(Target):
        def write(self, offset: int, content: memoryview) -> None:
            if left[0] <= 0:
                raise PowerCut
            left[0] -= 1
            super().write(offset, content)

    monkeypatch.setattr(imager.restore, "Target", Failing)


# --- the marker ---


@given(st.text(max_size=100), st.text(max_size=100), st.text(max_size=64), st.integers(0, 1 << 63))
def test_marker_comes_back(image: str, disk: str, root: str, offset: int) -> None:
    marker = Marker(image, disk, root, offset)
    assert len(marker.encode()) == MARKER_SIZE
    assert Marker.decode(marker.encode()) == marker


@given(st.binary(max_size=200))
def test_no_other_bytes_are_a_marker(rest: bytes) -> None:
    magic = Marker("a", "b", "c", 0).encode()[:27]
    assert Marker.decode(rest) is None
    assert Marker.decode(magic + b"\xff" + rest) is None
    assert Marker.decode(magic + b"[" * 3000) is None


# --- interrupted ---


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_an_interrupted_restore_is_marked_and_gone_on_with(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\x5a" * len(bench.content))
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(writes, patch)
        bench.restore(target)
    assert Marker.decode(target.read_bytes()) == Marker(
        bench.manifest.id, "disk", bench.disk.root, 0
    )
    plan = bench.plan(target)
    assert plan.resumes
    assert plan.overwrites == (f"an unfinished restore of {bench.manifest.id}/disk",)
    result = bench.restore(target)
    assert target.read_bytes() == bench.content
    assert (result.kept_bytes > 0) == (writes > 1)
    assert result.kept_bytes + result.written_bytes == len(bench.content)


def test_an_interrupted_restore_of_a_partition(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker lies where the partition begins, and is none for a restore of the disk."""
    bench = partitioned(repo, offset=63 * 512, size=MIB - 64 * 512)
    target = tmp_path / "target"
    target.write_bytes(b"\x5a" * MIB)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(2, patch)
        bench.restore(target, partition=1)
    marker = Marker.decode(target.read_bytes())
    assert marker is not None and marker.offset == 63 * 512
    assert bench.plan(target, partition=1).resumes
    assert not bench.plan(target).resumes
    bench.restore(target, partition=1)
    size = MIB - 64 * 512
    assert target.read_bytes()[:size] == bench.content[63 * 512 : 63 * 512 + size]


def test_no_thread_is_left_behind(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()
    cut_after(2, monkeypatch)
    with pytest.raises(PowerCut):
        bench.restore(tmp_path / "target")
    assert threading.active_count() == threads


def test_nothing_is_written_before_the_marker(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\x5a" * len(bench.content))
    cut_after(0, monkeypatch)
    with pytest.raises(PowerCut):
        bench.restore(target)
    assert target.read_bytes() == b"\x5a" * len(bench.content)


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_an_interrupted_delta_is_marked_too(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    target = tmp_path / "target"
    changed = bytearray(bench.content)
    for at in (0, 2 * MIB, 5 * MIB):
        changed[at] ^= 1
    target.write_bytes(changed)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(writes, patch)
        bench.restore(target, delta=True)
    assert Marker.decode(target.read_bytes())
    result = bench.restore(target)
    assert target.read_bytes() == bench.content
    assert result.kept_bytes >= 7 * MIB


def test_an_unfinished_restore_of_another_image_is_no_start(
    bench: Bench, tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Bench(repo, random.Random(2).randbytes(8 * MIB))
    target = tmp_path / "target"
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(2, patch)
        other.restore(target)
    assert not bench.plan(target).resumes
    bench.restore(target)
    assert target.read_bytes() == bench.content


@pytest.mark.parametrize("first", ["zero", "unused"])
def test_the_marker_goes_when_the_first_block_is_empty(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    content = bytes(UNIT) + random.Random(3).randbytes(8 * MIB)
    used = Extents([(UNIT, 8 * MIB)]) if first == "unused" else None
    bench = Bench(repo, content, used)
    target = tmp_path / "target"
    target.write_bytes(b"\x5a" * len(content))
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(2, patch)
        bench.restore(target)
    assert Marker.decode(target.read_bytes())
    bench.restore(target)
    assert target.read_bytes() == content


def test_the_marker_goes_from_a_disk_on_which_discarding_does_nothing(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a discarded range reads as is undefined: the marker must be overwritten."""
    content = bytes(UNIT) + random.Random(3).randbytes(8 * MIB)
    bench = Bench(repo, content, Extents([(UNIT, 8 * MIB)]))
    target = tmp_path / "target"
    bench.restore(target)
    with target.open("r+b") as file:
        file.write(Marker(bench.manifest.id, "disk", bench.disk.root, 0).encode())

    class Keeping(Target):
        def discard(self, offset: int, length: int) -> None:
            pass

    monkeypatch.setattr(imager.restore, "Target", Keeping)
    bench.restore(target)
    assert Marker.decode(target.read_bytes()) is None


# --- targets ---


def test_a_tiny_disk_has_no_room_for_a_marker(repo: Path, tmp_path: Path) -> None:
    bench = Bench(repo, b"tiny")
    target = tmp_path / "target"
    target.write_bytes(b"\x5a" * 4)
    bench.restore(target, read_back=True)
    assert target.read_bytes() == b"tiny"


@pytest.mark.parametrize("options", [{}, {"delta": True}, {"read_back": True}])
def test_zero_blocks_are_zeroed(repo: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    content = random.Random(4).randbytes(MIB) + bytes(3 * MIB + 100)
    bench = Bench(repo, content)
    target = tmp_path / "target"
    target.write_bytes(b"\x5a" * len(content))
    result = bench.restore(target, **options)
    assert target.read_bytes() == content
    assert result.zeroed_bytes == 3 * MIB + 100


def test_a_new_file_stays_sparse(repo: Path, tmp_path: Path) -> None:
    content = random.Random(4).randbytes(MIB) + bytes(64 * MIB)
    bench = Bench(repo, content)
    result = bench.restore(tmp_path / "target")
    assert (result.written_bytes, result.zeroed_bytes) == (MIB, 0)
    assert (tmp_path / "target").stat().st_blocks * 512 < 2 * MIB


def test_delta_writes_only_what_differs(bench: Bench, tmp_path: Path) -> None:
    target = tmp_path / "target"
    changed = bytearray(bench.content)
    changed[3 * MIB : 3 * MIB + 10] = bytes(10)
    target.write_bytes(changed)
    result = bench.restore(target, delta=True)
    # and the first block, in which the marker was meanwhile
    assert (result.written_bytes, result.kept_bytes) == (2 * UNIT, 8 * MIB - 2 * UNIT)
    assert target.read_bytes() == bench.content
    again = bench.restore(target, delta=True)
    assert (again.written_bytes, again.zeroed_bytes) == (0, 0)


@pytest.mark.parametrize("options", [{"delta": True}, {"read_back": True}])
def test_holes_of_the_target_are_not_read(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    bench = Bench(repo, random.Random(8).randbytes(MIB) + bytes(63 * MIB))
    target = tmp_path / "target"
    bench.restore(target)
    read = []

    class Counting(Target):
        def read_into(self, offset: int, view: memoryview) -> None:
            read.append(len(view))
            super().read_into(offset, view)

    monkeypatch.setattr(imager.restore, "Target", Counting)
    bench.restore(target, **options)
    assert sum(read) <= 4 * MIB


def test_delta_needs_something_to_compare_with(bench: Bench, tmp_path: Path) -> None:
    plan = bench.plan(tmp_path / "none", delta=True)
    assert any("does not exist" in reason for reason in plan.refusals)
    with pytest.raises(RefusedError):
        restore(bench.repository, bench.manifest, bench.disk, plan, NullProgress())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"to_partition": 1},
        {"new_ids": True, "partition": 1},
        {"new_ids": True, "delta": True},
        {"partition": 1},
    ],
)
def test_contradictions_are_wrong_usage(
    bench: Bench, tmp_path: Path, options: dict[str, object]
) -> None:
    with pytest.raises(UsageError):
        bench.plan(tmp_path / "target", **options)


# --- a target that lies ---


def lie_at(offsets: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The target reads back one bit wrong at these bytes."""

    class Lying(Target):
        def data_extents(self) -> Extents:
            return Extents.whole(self.size)  # like a device: it has no holes that could be trusted

        def read_into(self, offset: int, view: memoryview) -> None:
            super().read_into(offset, view)
            for at in offsets:
                if offset <= at < offset + len(view):
                    view[at - offset] ^= 1

    monkeypatch.setattr(imager.restore, "Target", Lying)


def test_read_back_names_every_place(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(5).randbytes(5 * MIB) + bytes(3 * MIB)
    bench = Bench(repo, content)
    lie_at([0, 3 * MIB + 5, 6 * MIB], monkeypatch)
    with pytest.raises(IntegrityError) as caught:
        bench.restore(tmp_path / "target", read_back=True)
    for offset in (0, 3 * MIB, 5 * MIB):  # the start of the block, or of the zeros
        assert f"byte {offset}," in caught.value.message


def partitioned(repo: Path, *, offset: int, size: int) -> Bench:
    """An image of a disk with one partition, whose borders are not those of blocks."""
    bench = Bench.__new__(Bench)
    bench.repository = Repository.open(str(repo))
    bench.content = random.Random(6).randbytes(MIB)
    source = MemorySource(bench.content)
    part = Partition(number=1, offset=offset, size=size, type="linux")
    plain = memory_disk(source)
    inside = plain.layout.volumes[0].filesystem
    allocation = plain.layout.volumes[0].allocation
    volume = Volume(part, offset, size, inside, allocation)
    table = PartitionTable("mbr", 512, "0x12345678", partitions=(part,))
    layout = DiskLayout(table, (volume,), source.size)
    disk = type(plain)("disk", source, layout, plain.identity)
    job = CaptureJob(disks=(disk,), name="test", all_blocks=True)
    bench.manifest = capture(job, bench.repository, NullProgress())
    bench.disk = bench.manifest.disks[0]
    return bench


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (512, 512),
        (512, UNIT),
        (63 * 512, 3 * UNIT + 1024),
        (UNIT, UNIT - 512),
        (UNIT - 512, MIB - UNIT),
    ],
)
def test_a_partition_between_the_borders_of_blocks(
    repo: Path, tmp_path: Path, offset: int, size: int
) -> None:
    bench = partitioned(repo, offset=offset, size=size)
    target = tmp_path / "target"
    for fill in (None, b"\x5a"):
        if fill:
            target.write_bytes(fill * (size + 700))
        result = bench.restore(target, partition=1, read_back=True)
        assert target.read_bytes() == bench.content[offset : offset + size] + (
            fill * 700 if fill else b""
        )
        assert (result.written_bytes, result.kept_bytes) == (size, 0)
    assert bench.restore(target, partition=1, delta=True).zeroed_bytes == 0
    assert target.read_bytes()[:size] == bench.content[offset : offset + size]


@pytest.mark.parametrize("place", [0, 3 * UNIT + 1023])
def test_read_back_checks_the_edges_of_a_partition(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    bench = partitioned(repo, offset=63 * 512, size=3 * UNIT + 1024)
    lie_at([place], monkeypatch)
    with pytest.raises(IntegrityError, match="does not hold"):
        bench.restore(tmp_path / "target", partition=1, read_back=True)


def test_an_error_of_the_target_says_where(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(len(bench.content)))
    with Target(str(target)) as opened, pytest.raises(ImagerError, match=r"read .* at byte"):
        opened.read_into(len(bench.content) - 10, memoryview(bytearray(20)))
