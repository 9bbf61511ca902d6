"""Capture and restore by the Python interface: what is used comes back, the rest is zero."""

from __future__ import annotations

import itertools
import random
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager.blockindex import BlockIndex
from imager.capture import CaptureJob, capture
from imager.errors import ImagerError, SourceError, UsageError
from imager.extents import Extent, Extents
from imager.manifest import Manifest
from imager.plan import RestoreOptions, plan_restore
from imager.progress import NullProgress
from imager.repository import Repository
from imager.restore import RestoreResult, restore
from imager.verify import verify
from tests.support.disks import MEMORY_FOLDER
from tests.support.sources import MemorySource, memory_disk

KIB = 1 << 10
PIECE = 4096


def take(repository: Repository, *disks: object, **options: object) -> Manifest:
    job = CaptureJob(disks=disks, name="test", **options)  # type: ignore[arg-type]
    return capture(job, repository, NullProgress())


def put(
    repository: Repository, manifest: Manifest, target: Path, disk: int = 0, **options: bool
) -> RestoreResult:
    chosen = manifest.disks[disk]
    plan = plan_restore(repository, manifest, chosen, str(target), RestoreOptions(**options))
    return restore(repository, manifest, chosen, plan, NullProgress())


@contextmanager
def scratch() -> Iterator[tuple[str, Path]]:
    """Where a repository can be made, in memory, and a folder for targets."""
    with (
        tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as memory,
        tempfile.TemporaryDirectory() as folder,
    ):
        yield f"{memory}/repo", Path(folder)


def kept(content: bytes, used: Extents) -> bytes:
    """What a restore must give: used pieces of 4 KiB as they were, the others zero."""
    expected = bytearray(len(content))
    for extent in used.align_outward(PIECE, len(content)):
        expected[extent.offset : extent.end] = content[extent.offset : extent.end]
    return bytes(expected)


@st.composite
def extent_sets(draw: st.DrawFn, size: int, unit: int) -> Extents:
    pairs = draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), max_size=8))
    return Extents(
        (start, min(start + length, size) - start)
        for at, length in pairs
        if (start := at // unit * unit) < size
    )


@st.composite
def disks(draw: st.DrawFn) -> tuple[MemorySource, Extents]:
    sector = draw(st.sampled_from([512, 4096]))
    size = draw(st.one_of(st.integers(1, 700 * KIB), st.integers(1, 1400).map(lambda n: n * 512)))
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    content = bytearray(chance.randbytes(size))
    for extent in draw(extent_sets(size, 1)):  # repeated and zero stretches
        length = min(extent.length, 128 * KIB)
        filler = chance.choice([bytes(length), b"\x11" * length])
        content[extent.offset : extent.offset + length] = filler
    data = draw(st.one_of(st.none(), extent_sets(size, 1)))
    if data is not None:
        for hole in data.complement(size):
            content[hole.offset : hole.end] = bytes(hole.length)
    used = draw(st.one_of(st.just(Extents.whole(size)), extent_sets(size, sector)))
    return MemorySource(bytes(content), sector=sector, data=data), used


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(disks(), st.sampled_from([64 * KIB, 128 * KIB, 1024 * KIB]), st.integers(0, 3), st.data())
def test_used_bytes_come_back_and_the_rest_is_zero(
    disk: tuple[MemorySource, Extents], block_size: int, mode: int, data: st.DataObject
) -> None:
    source, used = disk
    expected = kept(source.content, used)
    with scratch() as (repo, folder):
        repository = Repository.create(repo, block_size=block_size)
        manifest = take(repository, memory_disk(source, used))
        assert not manifest.partial
        target, more = folder / "target", 0
        if mode:
            more = data.draw(st.sampled_from([0, 1, 511, 4096]), "bytes behind the image")
            target.write_bytes(b"\x5a" * (source.size + more))
        result = put(repository, manifest, target, read_back=mode == 2, delta=mode == 3)
        found = target.read_bytes()
        assert found[source.size :] == b"\x5a" * more
        if mode == 3:  # a delta restore leaves what no filesystem uses as it is
            blocks = used.align_outward(PIECE, source.size).align_outward(block_size, source.size)
            for extent in blocks:
                assert found[extent.offset : extent.end] == expected[extent.offset : extent.end]
            for gap in blocks.complement(source.size):
                assert found[gap.offset : gap.end] == b"\x5a" * gap.length
            assert put(repository, manifest, target, delta=True).written_bytes == 0
        else:
            assert found[: source.size] == expected
        assert result.missing == []
        assert verify(repository, [], NullProgress()).is_sound


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(disks(), st.lists(st.integers(0, 1400), max_size=12))
def test_bad_sectors_are_listed_to_the_sector(
    disk: tuple[MemorySource, Extents], numbers: list[int]
) -> None:
    source, used = disk
    sector = source.logical_sector
    source.bad = frozenset(numbers)
    data = used.align_outward(PIECE, source.size).intersect(
        source.data_extents().align_outward(PIECE, source.size)
    )
    lost = Extents(part for number in numbers for part in data.within(number * sector, sector))
    expected = bytearray(kept(source.content, used))
    for extent in lost:
        expected[extent.offset : extent.end] = bytes(extent.length)
    with scratch() as (repo, folder):
        repository = Repository.create(repo, block_size=64 * KIB)
        manifest = take(repository, memory_disk(source, used))
        assert manifest.partial == bool(lost)
        assert manifest.disks[0].unreadable == lost
        result = put(repository, manifest, folder / "target")
        assert len(result.missing) == len(lost)
        assert (folder / "target").read_bytes() == bytes(expected)
        assert verify(repository, [], NullProgress()).is_sound


def test_what_is_bad_in_unused_space_does_not_matter(repo: Path) -> None:
    source = MemorySource(random.Random(1).randbytes(256 * KIB), bad=[100, 101, 300])
    used = Extents([(0, 8 * KIB), (128 * KIB, 8 * KIB)])
    assert not take(Repository.open(str(repo)), memory_disk(source, used)).partial


def test_only_used_bytes_are_read(repo: Path) -> None:
    source = MemorySource(random.Random(1).randbytes(1024 * KIB))
    used = Extents([(0, 8 * KIB), (512 * KIB, 8 * KIB)])
    manifest = take(Repository.open(str(repo)), memory_disk(source, used))
    assert sum(extent.length for extent in source.reads) == used.total
    assert manifest.statistics["read_bytes"] == manifest.statistics["used_bytes"] == used.total
    assert manifest.statistics["unused_blocks"] == 14


def test_all_blocks_keeps_what_is_unused(repo: Path, tmp_path: Path) -> None:
    source = MemorySource(random.Random(1).randbytes(300 * KIB + 13))
    repository = Repository.open(str(repo))
    manifest = take(repository, memory_disk(source, Extents()), all_blocks=True)
    put(repository, manifest, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.content


def test_the_second_image_stores_what_changed(repo: Path, tmp_path: Path) -> None:
    repository = Repository.open(str(repo))
    content = bytearray(random.Random(2).randbytes(2048 * KIB))
    first = take(repository, memory_disk(MemorySource(bytes(content))))
    content[1000 * KIB] ^= 1
    second = take(repository, memory_disk(MemorySource(bytes(content))))
    assert first.statistics["new_blocks"] == 32
    assert (second.statistics["new_blocks"], second.statistics["known_blocks"]) == (1, 31)
    assert second.document["previous"] == first.id
    repository.remove(first.id)
    put(repository, second, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == bytes(content)


def test_images_of_one_second_are_in_order(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = itertools.count()

    class Slow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Slow:
            return cls(2026, 1, 1, microsecond=next(moments), tzinfo=tz)

    monkeypatch.setattr("imager.repository.datetime", Slow)
    repository = Repository.open(str(repo))
    taken = [take(repository, memory_disk(MemorySource(bytes([n])))).id for n in range(12)]
    assert repository.image_ids() == taken


def test_disks_of_one_image_share_blocks(repo: Path, tmp_path: Path) -> None:
    content = random.Random(3).randbytes(512 * KIB)
    repository = Repository.open(str(repo))
    disks = [memory_disk(MemorySource(content), name=name) for name in ("sda", "sdb")]
    manifest = take(repository, *disks)
    assert (manifest.statistics["new_blocks"], manifest.statistics["known_blocks"]) == (8, 8)
    assert manifest.disks[0].root == manifest.disks[1].root
    for n in range(2):
        put(repository, manifest, tmp_path / f"target{n}", disk=n)
        assert (tmp_path / f"target{n}").read_bytes() == content


def test_the_root_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    content = random.Random(4).randbytes(500 * KIB)
    roots = set()
    for name in ("a", "b"):
        repository = Repository.create(str(tmp_path / name), block_size=64 * KIB)
        take(repository, memory_disk(MemorySource(content[: 100 * KIB])))
        roots.add(take(repository, memory_disk(MemorySource(content))).disks[0].root)
    assert len(roots) == 1


class VanishingSource(MemorySource):
    """A disk that is pulled out."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset >= 256 * KIB:
            raise SourceError("it is gone")
        super().read_into(offset, buffer)


def test_a_source_that_vanishes_leaves_no_image(repo: Path) -> None:
    repository = Repository.open(str(repo))
    source = VanishingSource(random.Random(5).randbytes(16 << 20))
    before, threads = set(_files(repo)), threading.active_count()
    with pytest.raises(SourceError, match="gone"):
        take(repository, memory_disk(source, Extents([(0, 4096), (8 << 20, 4096)])))
    assert repository.image_ids() == []
    assert threading.active_count() == threads
    left = set(_files(repo)) - before
    assert {path.parts[0] for path in left} <= {"packs"}, "a session or an unfinished file is left"
    assert verify(repository, [], NullProgress()).is_sound


@pytest.mark.parametrize("level", [0, 20, -1])
def test_a_silly_level_is_refused(repo: Path, level: int) -> None:
    repository = Repository.open(str(repo))
    with pytest.raises(UsageError, match="level"):
        take(repository, memory_disk(MemorySource(b"x")), level=level)


@pytest.mark.parametrize("workers", [1, 5])
def test_any_number_of_workers(repo: Path, tmp_path: Path, workers: int) -> None:
    content = random.Random(6).randbytes(9 << 20)
    repository = Repository.open(str(repo))
    manifest = take(repository, memory_disk(MemorySource(content)), workers=workers)
    put(repository, manifest, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == content


def test_damage_is_never_restored(repo: Path, tmp_path: Path) -> None:
    repository = Repository.open(str(repo))
    content = random.Random(7).randbytes(512 * KIB)
    manifest = take(repository, memory_disk(MemorySource(content)))
    pack = max(repo.glob("packs/*/*.pack"), key=lambda path: path.stat().st_size)
    damaged = bytearray(pack.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(damaged)
    with pytest.raises(ImagerError, match="not written") as caught:
        put(repository, manifest, tmp_path / "target")
    assert caught.value.exit_code == 3
    found = (tmp_path / "target").read_bytes()
    for offset in range(64 * KIB, len(found), 64 * KIB):
        block = found[offset : offset + 64 * KIB]
        assert block in (content[offset : offset + 64 * KIB], bytes(64 * KIB))


def _files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


def test_unreadable_extents_are_offsets_of_the_disk(repo: Path) -> None:
    source = MemorySource(random.Random(8).randbytes(6 << 20), bad=[3, 4, 9000, 12287])
    manifest = take(Repository.open(str(repo)), memory_disk(source))
    assert list(manifest.disks[0].unreadable) == [
        Extent(3 * 512, 1024),
        Extent(9000 * 512, 512),
        Extent(12287 * 512, 512),
    ]


def test_unchanged_blocks_are_found_when_the_index_is_full(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the bounded index has no room for is found by its place in the previous image."""
    monkeypatch.setattr("imager.repository.BlockIndex", partial(BlockIndex, max_slots=16))
    content = bytearray(random.Random(5).randbytes(64 * 64 * KIB))
    repository = Repository.open(str(repo))
    first = take(repository, memory_disk(MemorySource(bytes(content))))
    assert first.statistics["new_blocks"] == 64
    content[7 * 64 * KIB] ^= 1
    second = take(repository, memory_disk(MemorySource(bytes(content))))
    assert second.statistics["new_blocks"] == 1
    assert second.statistics["known_blocks"] == 63
    put(repository, second, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == content
