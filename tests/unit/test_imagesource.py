"""An image read as a disk, across block edges, by several threads, with damage."""

from __future__ import annotations

import errno
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager.capture import CaptureJob, capture
from imager.errors import IntegrityError, SourceError
from imager.extents import Extents
from imager.imagesource import ImageSource
from imager.manifest import Disk
from imager.progress import NullProgress
from imager.repository import Repository
from tests.support.sources import MemorySource, memory_disk

UNIT = 64 << 10
SIZE = 40 * UNIT + 5 * 512
BAD_SECTOR = 30 * UNIT // 512 + 3


def make_content() -> bytes:
    """Data, zeros, compressible text, and blocks that come again."""
    chance = random.Random(7)
    kinds = [
        chance.randbytes(UNIT),
        bytes(UNIT),
        b"imager " * (UNIT // 7 + 1),
    ]
    blocks = [chance.choice(kinds)[:UNIT] if n % 3 else chance.randbytes(UNIT) for n in range(41)]
    return b"".join(blocks)[:SIZE]


CONTENT = make_content()


def make_image(repo: Path, content: bytes = CONTENT, **options: object) -> tuple[Repository, Disk]:
    repository = Repository.open(str(repo))
    used = options.pop("used", None)
    source = MemorySource(content, **options)  # type: ignore[arg-type]
    job = CaptureJob(disks=(memory_disk(source, used),), name="test")  # type: ignore[arg-type]
    return repository, capture(job, repository, NullProgress()).disks[0]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(-700, 700), st.integers(0, 3 * UNIT)),
        max_size=8,
    ),
    st.integers(1, 5),
)
def test_reads_are_the_original(
    image: tuple[Repository, Disk], reads: list[tuple[int, int, int]], kept: int
) -> None:
    with ImageSource(*image, cache_bytes=kept * UNIT) as source:
        for block, shift, length in reads:
            offset = min(max(block * UNIT + shift, 0), SIZE)
            length = min(length, SIZE - offset)
            assert source.pread(offset, length) == CONTENT[offset : offset + length]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, Disk]:
    folder = tmp_path_factory.mktemp("image") / "repo"
    Repository.create(str(folder), block_size=UNIT)
    return make_image(folder)


def test_unused_bytes_are_zeros(repo: Path) -> None:
    used = Extents([(UNIT, UNIT), (5 * UNIT + 4096, 8192)])
    repository, disk = make_image(repo, used=used)
    expected = bytearray(SIZE)
    for extent in used:
        expected[extent.offset : extent.end] = CONTENT[extent.offset : extent.end]
    with ImageSource(repository, disk) as source:
        assert source.pread(0, SIZE) == expected
        assert source.data_extents().total <= 2 * UNIT


def test_reads_outside_are_refused(image: tuple[Repository, Disk]) -> None:
    with ImageSource(*image) as source:
        for offset, length in ((-1, 1), (SIZE, 1), (SIZE - 1, 2)):
            with pytest.raises(SourceError, match="outside"):
                source.pread(offset, length)
        assert source.pread(SIZE, 0) == b""


def test_what_was_unreadable_stays_unreadable(repo: Path) -> None:
    repository, disk = make_image(repo, bad=[BAD_SECTOR])
    start = BAD_SECTOR * 512
    with ImageSource(repository, disk) as source:
        with pytest.raises(OSError) as caught:
            source.pread(start + 511, 1)
        assert caught.value.errno == errno.EIO
        before = source.pread(start - 512, 512)
        after = source.pread(start + 512, UNIT)
    assert before == CONTENT[start - 512 : start]
    assert after == CONTENT[start + 512 : start + 512 + UNIT]


def test_a_flipped_bit_spoils_its_block_only(repo: Path) -> None:
    content = random.Random(3).randbytes(16 * UNIT)
    repository, disk = make_image(repo, content)
    place = next(run.place for run in repository.block_map(disk).runs(9, 10))
    assert place is not None
    pack = repository.pack(place.pack)
    path = repo / pack.name
    raw = bytearray(path.read_bytes())
    raw[pack.offsets[place.ordinal + 1] - 100] ^= 1
    path.chmod(0o600)
    path.write_bytes(raw)
    with ImageSource(Repository.open(str(repo)), disk) as source:
        assert source.pread(0, 9 * UNIT) == content[: 9 * UNIT]  # with block 9 read ahead
        for _ in range(2):
            with pytest.raises(IntegrityError, match=rf"record {place.ordinal} .*byte {9 * UNIT}"):
                source.pread(9 * UNIT + 5, 1)
        assert source.pread(10 * UNIT, 6 * UNIT) == content[10 * UNIT :]


def test_many_threads_read_the_same(image: tuple[Repository, Disk]) -> None:
    chance = random.Random(5)
    ranges = [(chance.randrange(SIZE - 9000), chance.randrange(9000)) for _ in range(600)]
    with ImageSource(*image, cache_bytes=4 * UNIT) as source, ThreadPoolExecutor(8) as pool:
        for (offset, length), found in zip(
            ranges, pool.map(lambda wanted: source.pread(*wanted), ranges), strict=True
        ):
            assert found == CONTENT[offset : offset + length]


def test_rates(tmp_path: Path) -> None:
    size = 96 << 20
    chance = random.Random(1)
    content = b"".join(chance.randbytes(2048) + bytes(range(256)) * 8 for _ in range(size // 4096))
    Repository.create(str(tmp_path / "fast"))
    repository, disk = make_image(tmp_path / "fast", content)
    with ImageSource(repository, disk) as source:
        started = time.perf_counter()
        for offset in range(0, size, 1 << 20):
            assert len(source.pread(offset, 1 << 20)) == 1 << 20
        sequential = time.perf_counter() - started
    with ImageSource(repository, disk) as source:
        offsets = [chance.randrange(size // 4096) * 4096 for _ in range(200)]
        started = time.perf_counter()
        for offset in offsets:
            assert source.pread(offset, 4096) == content[offset : offset + 4096]
        scattered = time.perf_counter() - started
    print(f"in order {size / sequential / 1e6:.0f} MB/s, 4 KiB at random {200 / scattered:.0f}/s")
