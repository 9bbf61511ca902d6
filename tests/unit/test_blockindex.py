"""The block index against a dict."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.blockindex import BlockIndex
from imager.format import Place

# few different low halves, so that slots collide
digests = st.builds(
    lambda low, high: low.to_bytes(8, "little") + high.to_bytes(8, "little") + bytes(16),
    st.integers(0, 5) | st.integers(0, (1 << 64) - 1),
    st.integers(0, 5),
)
places = st.builds(
    Place,
    st.sampled_from([bytes([n] * 16) for n in range(4)]),
    st.integers(0, 9) | st.just(0xFFFFFFFF),
)


@given(st.lists(st.tuples(digests, places), max_size=60), st.lists(digests, max_size=10))
def test_agrees_with_a_dict(pairs: list[tuple[bytes, Place]], others: list[bytes]) -> None:
    index, model = BlockIndex(), dict[bytes, Place]()
    for digest, place in pairs:
        index.add(digest, place)
        model.setdefault(digest, place)
    assert len(index) == len(model)
    assert all(index.get(digest) == place for digest, place in model.items())
    assert all(index.get(digest) == model.get(digest) for digest in others)


def random_pairs(count: int, seed: int = 1) -> dict[bytes, Place]:
    numbers = random.Random(seed)
    return {numbers.randbytes(32): Place(bytes([n % 7] * 16), n % 1000) for n in range(count)}


@pytest.mark.parametrize("reserved", [0, 100, 20_000])
def test_growing_keeps_everything(reserved: int) -> None:
    index, model = BlockIndex(), random_pairs(20_000)
    index.reserve(reserved)
    for digest, place in model.items():
        index.add(digest, place)
    assert all(index.get(digest) == place for digest, place in model.items())
    assert not any(index.get(digest) for digest in random_pairs(1000, seed=2))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 16, 256]), st.integers(0, 300), st.integers(0, 10_000))
def test_a_full_index_takes_no_more_and_still_answers(
    max_slots: int, count: int, reserved: int
) -> None:
    index, model = BlockIndex(max_slots=max_slots), random_pairs(count)
    index.reserve(reserved)
    for digest, place in model.items():
        index.add(digest, place)
    limit = max_slots * 3 // 4
    assert len(index) == min(count, limit)
    assert index.is_full == (count >= limit)
    kept = list(model.items())[:limit]
    assert all(index.get(digest) == place for digest, place in kept)
    assert not any(index.get(digest) for digest in list(model)[limit:])


def test_lookups_while_another_thread_adds() -> None:
    """A lookup says nothing or the right place, never another one."""
    index, model = BlockIndex(), random_pairs(30_000)
    wrong: list[bytes] = []
    stop = threading.Event()

    def look() -> None:
        numbers, known = random.Random(3), list(model)
        while not stop.is_set():
            digest = numbers.choice(known)
            if index.get(digest) not in (None, model[digest]):
                wrong.append(digest)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for digest, place in model.items():
        index.add(digest, place)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert all(index.get(digest) == place for digest, place in model.items())
