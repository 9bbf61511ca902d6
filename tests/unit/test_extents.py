"""Extents against the naive model: a set of byte numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager.extents import Extent, Extents

LIMIT = 64

ranges = st.lists(st.tuples(st.integers(0, LIMIT), st.integers(0, 12)), max_size=10)
positions = st.integers(0, LIMIT + 20)


def as_bytes(extents: Extents) -> set[int]:
    """The set of byte numbers; asserts that the ranges are sorted, not empty and do not touch."""
    found: set[int] = set()
    last_end = -1
    for extent in extents:
        assert extent.length > 0
        assert extent.offset > last_end
        last_end = extent.end
        found.update(range(extent.offset, extent.end))
    return found


def model(pairs: list[tuple[int, int]]) -> set[int]:
    return {byte for offset, length in pairs for byte in range(offset, offset + length)}


@given(ranges)
def test_construction(pairs: list[tuple[int, int]]) -> None:
    extents = Extents(pairs)
    assert as_bytes(extents) == model(pairs)
    assert extents == Extents.from_sorted(sorted(pairs))
    assert extents == Extents(reversed(pairs))
    assert hash(extents) == hash(Extents(sorted(pairs)))


@given(ranges)
def test_measures(pairs: list[tuple[int, int]]) -> None:
    extents, expected = Extents(pairs), model(pairs)
    assert extents.total == len(expected)
    assert extents.end == max(expected, default=-1) + 1
    assert bool(extents) == bool(expected)
    assert len(extents) == len(list(extents))


@given(ranges, positions, st.integers(0, 20))
def test_parts(pairs: list[tuple[int, int]], offset: int, length: int) -> None:
    extents, expected = Extents(pairs), model(pairs)
    wanted = set(range(offset, offset + length))
    assert as_bytes(extents.clip(offset, length)) == expected & wanted
    assert Extents(extents.within(offset, length)) == extents.clip(offset, length)
    assert extents.covers(offset, length) == (wanted <= expected)


@given(ranges, ranges)
def test_algebra(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    a, b = Extents(one), Extents(other)
    assert as_bytes(a.union(b)) == model(one) | model(other)
    assert as_bytes(a.intersect(b)) == model(one) & model(other)
    assert as_bytes(a.subtract(b)) == model(one) - model(other)
    assert (a == b) == (model(one) == model(other))


@given(ranges, positions)
def test_complement(pairs: list[tuple[int, int]], length: int) -> None:
    found = as_bytes(Extents(pairs).complement(length))
    assert found == set(range(length)) - model(pairs)


@given(ranges, st.integers(0, 30))
def test_shift(pairs: list[tuple[int, int]], distance: int) -> None:
    extents = Extents(pairs)
    moved = extents.shift(distance)
    assert as_bytes(moved) == {byte + distance for byte in model(pairs)}
    assert moved.shift(-distance) == extents


@given(ranges, st.integers(1, 9), positions)
def test_align_outward(pairs: list[tuple[int, int]], unit: int, limit: int) -> None:
    found = as_bytes(Extents(pairs).align_outward(unit, limit))
    units = {byte // unit for byte in model(pairs) if byte < limit}
    assert found == {byte for byte in range(limit) if byte // unit in units}


@given(ranges, st.integers(0, 10))
def test_join_gaps(pairs: list[tuple[int, int]], gap: int) -> None:
    extents = Extents(pairs)
    joined = extents.join_gaps(gap)
    short = [hole for hole in holes_between(extents) if hole.length <= gap]
    assert as_bytes(joined) == model(pairs) | model([*short])


def holes_between(extents: Extents) -> list[Extent]:
    first = next(iter(extents), Extent(0, 0)).offset
    return list(Extents([(0, first), *extents]).complement(extents.end))


def test_ranges_of_large_disks() -> None:
    end = (1 << 64) - 1
    extents = Extents([(end - 10, 10), (0, 1)])
    assert extents.end == end
    assert extents.total == 11
    assert extents.complement(end).total == end - 11


@pytest.mark.parametrize("pair", [(-1, 1), (0, -1), (5, -2)])
def test_negative_ranges_are_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a byte range"):
        Extents([pair])
    with pytest.raises(ValueError, match="not a byte range"):
        Extents.from_sorted([pair])


def test_ranges_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ValueError, match="ascend"):
        Extents.from_sorted([(10, 5), (0, 5)])


def test_shift_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="not a byte range"):
        Extents([(4, 4)]).shift(-5)


def test_long_sets_are_shown_in_short() -> None:
    assert repr(Extents([(0, 1), (4, 2)])) == "Extents(0+1, 4+2)"
    assert repr(Extents((10 * n, 1) for n in range(100))).endswith("70+1, …)")
