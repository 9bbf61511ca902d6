"""What a capture reads, and how it survives bad sectors."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.errors import SourceError
from imager.extents import Extent, Extents
from imager.format import State
from imager.pipeline import BufferPool
from imager.reading import EmptyRun, ReadPlan, read_with_retries
from tests.support.sources import MemorySource

KIB, MIB = 1 << 10, 1 << 20
SPAN = 4 * MIB


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 200_000), st.sampled_from([512, 4096]), st.sets(st.integers(0, 400), max_size=9)
)
def test_exactly_the_bad_sectors_are_lost(size: int, sector: int, bad: set[int]) -> None:
    content = random.Random(size).randbytes(size)
    buffer = bytearray(b"\x77" * size)
    lost = Extents(
        read_with_retries(MemorySource(content, sector=sector, bad=bad), 0, memoryview(buffer))
    )
    expected = bytearray(content)
    inside = [n * sector for n in bad if n * sector < size]
    for start in inside:
        end = min(start + sector, size)
        expected[start:end] = bytes(end - start)
    assert bytes(buffer) == bytes(expected)
    assert lost == Extents((start, min(sector, size - start)) for start in inside)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENXIO, errno.EBADF])
def test_a_source_that_is_gone_is_an_error(number: int) -> None:
    class Gone(MemorySource):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise OSError(number, "gone")

    with pytest.raises(SourceError, match="memory is gone at byte 0"):
        read_with_retries(Gone(bytes(MIB)), 0, memoryview(bytearray(MIB)))


def test_a_bad_stretch_costs_few_reads() -> None:
    """A bad sector among four MiB is found by halving, not by 8192 reads."""
    source = MemorySource(bytes(SPAN), bad=[5000])
    read_with_retries(source, 0, memoryview(bytearray(SPAN)))
    assert len(source.reads) < 20


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9 * MIB),
    st.sampled_from([64 * KIB, MIB, 4 * MIB]),
    st.lists(st.tuples(st.integers(0, 9 * MIB), st.integers(1, 3 * MIB)), max_size=5),
    st.one_of(
        st.none(), st.lists(st.tuples(st.integers(0, 9 * MIB), st.integers(1, 3 * MIB)), max_size=5)
    ),
)
def test_every_block_comes_once_and_in_order(
    size: int, block_size: int, used: list[tuple[int, int]], data: list[tuple[int, int]] | None
) -> None:
    source = MemorySource(
        b"\x01" * size, data=None if data is None else Extents(data).clip(0, size)
    )
    wanted = Extents(used).clip(0, size).align_outward(4096, size)
    plan = ReadPlan(source, wanted, block_size, span_size=SPAN)
    at = total = 0
    with BufferPool(1, SPAN) as pool:
        for job in plan.jobs(pool):
            if isinstance(job, EmptyRun):
                touched = wanted.clip(at, min(job.blocks * block_size, size - at))
                assert bool(touched) == (job.state == State.ZERO)
                at = min(at + job.blocks * block_size, size)
                continue
            assert job.offset == at and job.length <= SPAN
            at += job.length
            assert job.length % block_size == 0 or at == size
            read = wanted.intersect(source.data_extents().align_outward(4096, size))
            assert job.read_bytes == read.clip(job.offset, job.length).total
            for gap in read.clip(job.offset, job.length).shift(-job.offset).complement(job.length):
                assert job.buffer.is_zero(gap.offset, gap.end)
            total += job.read_bytes
            pool.give(job.buffer)
    assert at == size
    assert total == plan.bytes_to_read


def test_short_gaps_are_read_over_but_not_kept() -> None:
    source = MemorySource(b"\x01" * MIB)
    plan = ReadPlan(source, Extents([(0, 4096), (8192, 4096)]), MIB, span_size=SPAN)
    with BufferPool(1, SPAN) as pool:
        span = next(iter(plan.jobs(pool)))
        assert not isinstance(span, EmptyRun)
        assert source.reads == [Extent(0, 12288)]
        assert span.read_bytes == 8192
        assert bytes(span.buffer.view[:16384]) == b"\x01" * 4096 + bytes(
            4096
        ) + b"\x01" * 4096 + bytes(4096)
