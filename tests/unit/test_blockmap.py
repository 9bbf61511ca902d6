"""The block map against the naive model: a list with one entry a block."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imager.blockmap import BlockMap, BlockMapWriter, Run
from imager.errors import ImagerError, IntegrityError, ObjectMissing
from imager.format import FANOUT, NO_DIGEST, Page, Place, State, map_height

PACK = bytes(16)


class Part(NamedTuple):
    """Neighbouring blocks of one state."""

    state: State
    blocks: int


class Pages:
    """Stored pages, as bytes. A ``PageSource``."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []
        self.reads = 0

    def store(self, page: Page) -> Place:
        self.contents.append(page.encode())
        return Place(PACK, len(self.contents) - 1)

    def page(self, place: Place) -> Page:
        self.reads += 1
        if not self.contents[place.ordinal]:
            raise ObjectMissing("the pack is missing")
        return Page.decode(self.contents[place.ordinal])


class Stored(NamedTuple):
    map: BlockMap
    pages: Pages
    blocks: int
    root: bytes


def digest(block: int) -> bytes:
    return block.to_bytes(32, "big")


def place(block: int) -> Place:
    return Place(bytes([block % 251] * 16), block & 0xFFFFFFFF)


def store(parts: Iterable[Part]) -> Stored:
    """Write the map of a disk that consists of these parts."""
    parts = list(parts)
    blocks = sum(part.blocks for part in parts)
    pages = Pages()
    writer = BlockMapWriter(blocks, pages.store)
    at = 0
    for state, count in parts:
        if state in (State.ZERO, State.UNUSED):
            writer.add_run(state, count)
        else:
            for block in range(at, at + count):
                writer.add(state, digest(block), place(block))
        at += count
    top, top_digest = writer.finish()
    assert writer.height == map_height(blocks)
    opened = BlockMap(pages, blocks=blocks, height=writer.height, top=top, top_digest=top_digest)
    return Stored(opened, pages, blocks, top_digest)


def expected_runs(parts: Iterable[Part], first: int, end: int) -> list[Run]:
    """What a reader must be told, computed without a tree."""
    runs: list[Run] = []
    at = 0
    for state, group in groupby(parts, lambda part: part.state):
        count = sum(part.blocks for part in group)
        start, stop = max(at, first), min(at + count, end)
        if start < stop and state in (State.ZERO, State.UNUSED):
            runs.append(Run(start, stop - start, state, NO_DIGEST, None))
        elif start < stop:
            runs += [Run(n, 1, state, digest(n), place(n)) for n in range(start, stop)]
        at += count
    return runs


empty = st.sampled_from([State.ZERO, State.UNUSED])
stored = st.sampled_from([State.DATA, State.UNREADABLE])
# counts that meet the borders of pages, and any others
lengths = st.one_of(
    st.integers(1, 50), st.sampled_from([1023, 1024, 1025, 2048, 3000]), st.integers(1, 5000)
)
huge = st.one_of(lengths, st.sampled_from([FANOUT**2 - 1, FANOUT**2, FANOUT**2 + 1, 3_000_000]))
parts_lists = st.lists(
    st.one_of(
        st.builds(Part, empty, huge),
        st.builds(Part, stored, st.integers(1, 20)),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=150)
@given(parts_lists)
@example([Part(State.ZERO, 1)])
@example([Part(State.ZERO, FANOUT)])
@example([Part(State.ZERO, FANOUT + 1)])
@example([Part(State.DATA, FANOUT), Part(State.UNUSED, FANOUT)])
@example([Part(State.ZERO, FANOUT**2), Part(State.DATA, 1)])
@example([Part(State.DATA, 1), Part(State.UNUSED, FANOUT**2 + 5)])
@example([Part(State.ZERO, FANOUT - 1), Part(State.UNUSED, 1), Part(State.ZERO, FANOUT**2)])
def test_runs_are_what_was_written(parts: list[Part]) -> None:
    disk = store(parts)
    assert list(disk.map.runs()) == expected_runs(parts, 0, disk.blocks)


@settings(deadline=None, max_examples=150)
@given(parts_lists, st.data())
def test_runs_of_a_part_of_the_disk(parts: list[Part], data: st.DataObject) -> None:
    disk = store(parts)
    first = data.draw(st.integers(0, disk.blocks + 5))
    end = data.draw(st.integers(0, disk.blocks + 5))
    assert list(disk.map.runs(first, end)) == expected_runs(parts, first, end)


@settings(deadline=None, max_examples=60)
@given(parts_lists)
def test_root_does_not_depend_on_how_blocks_were_added(parts: list[Part]) -> None:
    cut = [Part(state, piece) for state, n in parts for piece in (n // 2, n - n // 2)]
    assert store(cut).root == store(parts).root


def test_uniform_pages_are_not_stored() -> None:
    disk = store([Part(State.DATA, 1), Part(State.UNUSED, 3 * FANOUT**2)])
    assert len(disk.pages.contents) == 3  # the path from the top to the one block
    for encoded in disk.pages.contents[:-1]:
        page = Page.decode(encoded)
        assert set(page.states) not in ({State.ZERO}, {State.UNUSED})


def test_a_large_empty_disk_is_one_page() -> None:
    blocks = 40 * FANOUT**2  # 10 TiB of blocks of 256 KiB
    disk = store([Part(State.ZERO, blocks)])
    assert len(disk.pages.contents) == 1
    assert list(disk.map.runs()) == [Run(0, blocks, State.ZERO, NO_DIGEST, None)]


def test_only_the_pages_on_the_way_are_read() -> None:
    disk = store([Part(State.DATA, 5 * FANOUT)])
    disk.pages.reads = 0
    assert len(list(disk.map.runs(FANOUT, FANOUT + 1))) == 1
    assert disk.pages.reads == 2


@pytest.mark.parametrize("count", [9, 11])
def test_a_wrong_number_of_blocks_is_refused(count: int) -> None:
    writer = BlockMapWriter(10, Pages().store)
    with pytest.raises(ValueError, match=f"{count} blocks"):
        writer.add_run(State.ZERO, count)
        writer.finish()


# --- damage -----------------------------------------------------------------------------------

DAMAGED_PARTS = [Part(State.DATA, 3 * FANOUT), Part(State.ZERO, 7)]


def damaged_by(change: bytes | None) -> tuple[Stored, list[tuple[int, int, str]]]:
    """A disk of which the second page was replaced; what the reader says is lost."""
    disk = store(DAMAGED_PARTS)
    disk.pages.contents[1] = change if change is not None else disk.pages.contents[0]
    lost: list[tuple[int, int, str]] = []

    def remember(first: int, blocks: int, error: ImagerError) -> None:
        lost.append((first, blocks, error.message))

    runs = list(disk.map.runs(on_damage=remember))
    whole = expected_runs(DAMAGED_PARTS, 0, disk.blocks)
    assert runs == [run for run in whole if not FANOUT <= run.first < 2 * FANOUT]
    return disk, lost


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(None, "not what its parent says", id="swapped"),
        pytest.param(b"", "missing", id="missing"),
        pytest.param(b"IMGRPAGE", "truncated", id="truncated"),
        pytest.param(
            Page(0, b"\0", (NO_DIGEST,), (None,)).encode(), "belongs elsewhere", id="too short"
        ),
        pytest.param(
            Page(1, bytes(FANOUT), (NO_DIGEST,) * FANOUT, (None,) * FANOUT).encode(),
            "belongs elsewhere",
            id="other level",
        ),
    ],
)
def test_a_damaged_page_loses_only_what_is_below(change: bytes | None, reason: str) -> None:
    disk, lost = damaged_by(change)
    ((first, blocks, message),) = lost
    assert (first, blocks) == (FANOUT, FANOUT)
    assert reason in message
    with pytest.raises((IntegrityError, ObjectMissing)):
        list(disk.map.runs())


def test_a_part_beside_the_damage_is_read() -> None:
    disk, _ = damaged_by(b"")
    assert len(list(disk.map.runs(0, FANOUT))) == FANOUT


def test_a_page_below_itself_does_not_hang() -> None:
    disk = store([Part(State.DATA, 2 * FANOUT)])
    disk.pages.contents[0] = disk.pages.contents[2]  # the top page, where a page of level 0 was
    with pytest.raises(IntegrityError):
        list(disk.map.runs())


def test_another_top_page_is_refused() -> None:
    disk = store(DAMAGED_PARTS)
    other = store([Part(State.DATA, 3 * FANOUT + 7)])
    disk.pages.contents[-1] = other.pages.contents[-1]
    with pytest.raises(IntegrityError, match="not what its parent says"):
        list(disk.map.runs())
