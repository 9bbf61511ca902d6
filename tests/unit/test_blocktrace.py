"""Pages of the kernel's ring buffer: what they say, and that damage is never a silent hole."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.blocktrace import Drained, EventFormat, Write, parse_page
from imager.errors import ToolError
from imager.extents import Extents
from imager.tracking import UNIT, WrittenMap

# As kernels 5.10 to 6.18 write them, but for common fields that nobody reads.
HEADER_PAGE = """\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""
EVENT = """\
name: block_rq_complete
ID: 2107
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:dev_t dev;\toffset:8;\tsize:4;\tsigned:0;
\tfield:sector_t sector;\toffset:16;\tsize:8;\tsigned:0;
\tfield:unsigned int nr_sector;\toffset:24;\tsize:4;\tsigned:0;
\tfield:int error;\toffset:28;\tsize:4;\tsigned:1;
\tfield:char rwbs[10];\toffset:34;\tsize:10;\tsigned:0;
\tfield:__data_loc char[] cmd;\toffset:44;\tsize:4;\tsigned:0;

print fmt: "%d,%d"
"""
KIND = EventFormat.parse(HEADER_PAGE, EVENT)
NOWHERE = (1 << 64) - 1
WRITES = [(2048, 8), (0, 1), (1 << 40, 2048)]


def event(sector: int, sectors: int, *, long: bool = False, number: int = 2107) -> bytes:
    content = struct.pack("=HHi", number, 0, 1).ljust(16, b"\0")
    content = (content + struct.pack("=QI", sector, sectors)).ljust(52, b"\0")
    if long:  # the length in a word of its own, which counts itself
        return struct.pack("=II", 7 << 5, len(content) + 4) + content
    return struct.pack("=I", len(content) // 4 | 7 << 5) + content


def page(*events: bytes, flags: int = 0) -> bytes:
    data = b"".join(events)
    return (struct.pack("=QQ", 1, len(data) | flags) + data).ljust(4096, b"\0")


def parsed(content: bytes) -> Drained:
    found = Drained([])
    parse_page(content, KIND, found)
    return found


def test_the_kernels_words_are_understood() -> None:
    assert (KIND.page_bytes, KIND.commit_at, KIND.data_at) == (4096, 8, 16)
    assert (KIND.event_id, KIND.event_bytes) == (2107, 28)


@pytest.mark.parametrize(
    ("old", "new"),
    [("ID: 2107", ""), ("sector_t sector", "sector_t where"), ("offset:16;\tsize:8", "offset:16")],
)
def test_other_words_are_an_error(old: str, new: str) -> None:
    with pytest.raises(ToolError, match="trace format"):
        EventFormat.parse(HEADER_PAGE, EVENT.replace(old, new))


def test_all_kinds_of_records() -> None:
    extend, stamp = struct.pack("=II", 30, 5), struct.pack("=II", 31, 5)
    discarded = struct.pack("=II", 29 | 1 << 5, 12) + bytes(8)
    first, second, third = WRITES
    content = page(
        extend, event(*first), discarded, event(*second, long=True), stamp, event(*third)
    )
    assert parsed(content) == Drained([Write(*each) for each in WRITES])


def test_padding_ends_a_page() -> None:
    padding = struct.pack("=I", 29) + bytes(20)
    assert parsed(page(event(2048, 8), padding)) == Drained([Write(2048, 8)])


def test_commands_are_counted() -> None:
    assert parsed(page(event(NOWHERE, 8), event(NOWHERE, 0), event(5, 0))) == Drained([], False, 2)


@pytest.mark.parametrize("flag", [1 << 30, 1 << 31])
def test_the_kernel_says_that_events_are_missing(flag: int) -> None:
    assert parsed(page(event(2048, 8), flags=flag)) == Drained([Write(2048, 8)], lost=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        page(event(2048, 8))[:15],
        page(event(2048, 8))[:40],
        page(event(2048, 8), event(2048, 8, number=9)),
        page(struct.pack("=I", 2) + bytes(8)),  # too short for the event
        page(struct.pack("=II", 0, 2)),  # a length below its own
        page(struct.pack("=II", 0, 1 << 31)),
        page(struct.pack("=II", 29 | 1 << 5, 0)),
        page(struct.pack("=II", 29 | 1 << 5, 4000)),
        struct.pack("=QQ", 1, 8000) + bytes(4080),
        page(event(2048, 8), b"\1\0\0\0"),
    ],
)
def test_damage_is_a_loss(content: bytes) -> None:
    assert parsed(content).lost


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=4096))
def test_any_bytes_end(content: bytes) -> None:
    parsed(content)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4095), st.integers(0, 255), st.integers(0, 1 << 32))
def test_a_changed_byte_never_hangs(at: int, value: int, seed: int) -> None:
    chance = random.Random(seed)
    events = [event(chance.randrange(1 << 30), 8, long=chance.random() < 0.2) for _ in range(60)]
    content = bytearray(page(*events))
    content[at] = value
    assert len(parsed(bytes(content)).writes) <= 4096


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 400 * UNIT),
    st.lists(st.tuples(st.integers(-UNIT, 400 * UNIT), st.integers(1, 60 * UNIT)), max_size=8),
)
def test_what_was_written_is_in_the_map(size: int, writes: list[tuple[int, int]]) -> None:
    """All of it, widened to units, and nothing else."""
    written = WrittenMap(size)
    for offset, length in writes:
        written.add(offset, length)
    inside = [(max(o, 0), o + n - max(o, 0)) for o, n in writes if o + n > 0]
    assert written.extents() == Extents(inside).align_outward(UNIT, 1000 * UNIT).clip(0, size)
