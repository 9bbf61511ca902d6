"""Where logical addresses lie: exact ranges against a walk over every sector."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager.allocation.btrfs.chunks import Chunk, ChunkMap
from imager.errors import NotRecognized
from imager.extents import Extents

SECTOR, STRIPE = 4096, 65536
START = 1 << 30

# Type bit, number of stripes, copies, data columns.
LAYOUTS = {
    "single": (0, 1, 1, 1),
    "dup": (1 << 5, 2, 2, 1),
    "raid0-1": (1 << 3, 1, 1, 1),
    "raid0-3": (1 << 3, 3, 1, 3),
    "raid1": (1 << 4, 2, 2, 1),
    "raid1c3": (1 << 9, 3, 3, 1),
    "raid1c4": (1 << 10, 4, 4, 1),
    "raid10-4": (1 << 6, 4, 2, 2),
    "raid10-6": (1 << 6, 6, 2, 3),
    "raid5-3": (1 << 7, 3, 1, 2),
    "raid6-4": (1 << 8, 4, 1, 2),
}


def item(type_: int, count: int, length: int, *, kind: int = 1, sub_stripes: int = 2) -> bytes:
    """A chunk item; stripe n lies on device n + 1 at (n + 1) MiB."""
    head = struct.pack("<4Q3IHH", length, 2, STRIPE, type_ | kind, 0, 0, 0, count, sub_stripes)
    stripes = (struct.pack("<QQ16s", n + 1, n + 1 << 20, bytes(16)) for n in range(count))
    return head + b"".join(stripes)


def chunk(name: str, rows: int = 5) -> Chunk:
    type_, count, _, columns = LAYOUTS[name]
    return Chunk.parse(START, item(type_, count, rows * columns * STRIPE), SECTOR)


@pytest.mark.parametrize("name", LAYOUTS)
def test_used_in_stripes_is_where_the_copies_are(name: str) -> None:
    its = chunk(name)
    chance = random.Random(name)
    sectors = sorted(chance.sample(range(its.length // SECTOR), its.length // SECTOR // 3))
    logical = Extents((START + n * SECTOR, SECTOR) for n in sectors)
    expected: dict[int, list[tuple[int, int]]] = {}
    for number in sectors:
        for pieces in its.copies_of(START + number * SECTOR, SECTOR):
            for place, length in pieces:
                expected.setdefault(place.device, []).append((place.offset, length))
    for index, stripe in enumerate(its.stripes):
        found = Extents.from_sorted(its.used_in_stripe(index, logical))
        if its.profile.parity:
            assert found == Extents([(stripe.offset, its.stripe_size)])
            assert not Extents(expected[stripe.device]).subtract(found)
        else:
            assert found == Extents(expected.get(stripe.device, []))


@pytest.mark.parametrize("name", LAYOUTS)
@given(st.data())
def test_copies_hold_every_byte_once(name: str, data: st.DataObject) -> None:
    its = chunk(name)
    at = data.draw(st.integers(0, its.length - 1))
    length = data.draw(st.integers(1, its.length - at))
    copies = list(its.copies_of(START + at, length))
    assert len(copies) == LAYOUTS[name][2]
    for pieces in copies:
        assert sum(size for _, size in pieces) == length
        ranges = [(place.device << 40 | place.offset, size) for place, size in pieces]
        assert Extents(ranges).total == length
        for place, size in pieces:
            first = its.stripes[place.device - 1].offset
            assert first <= place.offset and place.offset + size <= first + its.stripe_size


def test_parity_turns_like_the_kernel() -> None:
    """RAID5 of three: row 0 is data, data, parity; row 1 starts on the second device."""
    rows = [
        [place.device for place, _ in next(chunk("raid5-3").copies_of(START + row, 2 * STRIPE))]
        for row in (0, 2 * STRIPE, 4 * STRIPE, 6 * STRIPE)
    ]
    assert rows == [[1, 2], [2, 3], [3, 1], [1, 2]]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        item(0, 1, STRIPE)[:-1],
        item(0, 1, STRIPE) + b"x",
        item(0, 1, 0),
        item(0, 1, 1 << 63),
        item(0, 1, STRIPE + 1),
        item(0, 2, STRIPE),
        item(0, 0, STRIPE),
        item(0, 1, STRIPE, kind=0),
        item(1 << 4, 3, STRIPE),
        item(1 << 4 | 1 << 3, 2, STRIPE),
        item(1 << 6, 3, 3 * STRIPE),
        item(1 << 6, 4, 2 * STRIPE, sub_stripes=1),
        item(1 << 7, 1, STRIPE),
        item(1 << 8, 2, STRIPE),
        item(1 << 3, 0, STRIPE),
        item(1 << 3, 2, STRIPE),
        item(1 << 11, 1, STRIPE),
        item(1 << 63, 1, STRIPE),
    ],
)
def test_impossible_chunks(raw: bytes) -> None:
    with pytest.raises(NotRecognized):
        Chunk.parse(START, raw, SECTOR)


def test_chunks_and_stripes_may_not_overlap() -> None:
    one = Chunk.parse(0, item(0, 1, STRIPE), SECTOR)
    with pytest.raises(NotRecognized, match="chunks overlap"):
        ChunkMap([one, Chunk.parse(STRIPE // 2, item(0, 1, STRIPE), SECTOR)])
    with pytest.raises(NotRecognized, match="stripes overlap"):
        ChunkMap([one, Chunk.parse(STRIPE, item(0, 1, STRIPE), SECTOR)]).device_extents(1)


def test_addresses_outside_of_chunks() -> None:
    chunks = ChunkMap([chunk("single")])
    end = chunk("single").end
    for address, length in ((0, 1), (START - 1, 2), (end - 1, 2), (end, 1), (START, 0)):
        with pytest.raises(NotRecognized):
            chunks.chunk_of(address, length)
    assert chunks.chunk_of(end - 1, 1) == chunk("single")
