"""What is remembered is what the source had, until it is told to be forgotten."""

from __future__ import annotations

import pytest

from imager import rememberedsource
from imager.extents import Extents
from imager.rememberedsource import RememberedSource
from tests.support.sources import MemorySource


def test_a_second_reading_costs_nothing() -> None:
    source = MemorySource(bytes(range(256)) * 64)
    remembered = RememberedSource(source)
    first = [remembered.pread(at, 512) for at in (0, 512, 8192)]
    buffer = bytearray(512)
    remembered.read_into(512, memoryview(buffer))
    assert [remembered.pread(0, 512), bytes(buffer), remembered.pread(8192, 512)] == first
    assert len(source.reads) == 3


def test_what_changed_is_read_again() -> None:
    source = MemorySource(bytes(16384))
    remembered = RememberedSource(source)
    for at in range(0, 16384, 4096):
        remembered.pread(at, 4096)
    source.content = b"\x01" * 16384
    remembered.forget(Extents([(4095, 2), (12287, 1)]))
    assert [remembered.pread(at, 4096)[0] for at in range(0, 16384, 4096)] == [1, 1, 1, 0]


def test_it_remembers_so_much_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rememberedsource, "_MOST_BYTES", 8192)
    source = MemorySource(bytes(16384))
    remembered = RememberedSource(source)
    for at in [0, 4096, 8192, 8192]:
        remembered.pread(at, 4096)
    assert len(source.reads) == 4
    remembered.forget(Extents([(0, 1)]))
    remembered.pread(12288, 4096)
    remembered.pread(12288, 4096)
    assert len(source.reads) == 5


def test_a_bad_sector_stays_one() -> None:
    remembered = RememberedSource(MemorySource(bytes(4096), bad=[1]))
    for _ in range(2):
        with pytest.raises(OSError):
            remembered.pread(0, 4096)
