"""What differs between two images, against a comparison of their bytes."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.capture import CaptureJob, capture
from imager.diff import diff
from imager.errors import UsageError
from imager.extents import Extents
from imager.manifest import Disk
from imager.progress import NullProgress
from imager.repository import Repository
from tests.support.disks import MEMORY_FOLDER
from tests.support.sources import MemorySource, memory_disk

UNIT = 64 << 10


def take(repository: Repository, content: bytes, used: Extents | None = None) -> Disk:
    job = CaptureJob(disks=(memory_disk(MemorySource(content), used),), name="test")
    return capture(job, repository, NullProgress()).disks[0]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=20),
    st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=20),
    st.integers(1, UNIT),
    st.integers(1, UNIT),
)
def test_it_lists_the_blocks_that_differ(
    one: list[int], other: list[int], last_one: int, last_other: int
) -> None:
    contents = []
    for numbers, last in ((one, last_one), (other, last_other)):
        whole = b"".join(bytes([n]) * UNIT for n in numbers)
        contents.append(whole[: len(whole) - UNIT + last])
    size, least = max(map(len, contents)), min(map(len, contents))
    expected = [
        (start, min(UNIT, size - start))
        for start in range(0, least, UNIT)
        if _block(contents[0], start) != _block(contents[1], start)
    ]
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
        repository = Repository.create(f"{folder}/repo", block_size=UNIT)
        disks = [take(repository, content) for content in contents]
        found, back = diff(repository, *disks), diff(repository, *reversed(disks))
    extents = Extents([*expected, (least, size - least)])
    assert Extents((c.offset, c.length) for c in found.changes) == extents
    assert found.changed_bytes == back.changed_bytes == extents.total


def _block(content: bytes, start: int) -> bytes:
    """Zeros are equal at any length; other blocks are compared as a whole."""
    block = content[start : start + UNIT]
    return block if block.strip(b"\0") else b""


def test_zero_and_unused_read_the_same(repo: Path) -> None:
    repository = Repository.open(str(repo))
    content = random.Random(1).randbytes(UNIT) + bytes(9 * UNIT)
    one = take(repository, content)
    other = take(repository, content, Extents([(0, UNIT)]))
    assert diff(repository, one, other).changes == ()


def test_other_block_sizes_cannot_be_compared(repo: Path, tmp_path: Path) -> None:
    one = take(Repository.open(str(repo)), b"x")
    big = Repository.create(str(tmp_path / "big"), block_size=2 * UNIT)
    with pytest.raises(UsageError, match="block sizes"):
        diff(big, one, take(big, b"x"))


def test_changes_are_cut_at_partitions(repo: Path) -> None:
    repository = Repository.open(str(repo))
    one, other = (take(repository, bytes([n]) * (8 * UNIT)) for n in (1, 2))
    other.document["partitions"] = [
        {"number": 1, "offset": UNIT, "size": 2 * UNIT, "filesystem": {"kind": "ext4"}},
        {"number": 2, "offset": 3 * UNIT, "size": 4 * UNIT, "filesystem": {"kind": "swap"}},
    ]
    found = diff(repository, one, other)
    assert [(c.offset // UNIT, c.length // UNIT, c.where) for c in found.changes] == [
        (0, 1, "outside of all partitions"),
        (1, 2, "partition 1, ext4"),
        (3, 4, "partition 2, swap"),
        (7, 1, "outside of all partitions"),
    ]
