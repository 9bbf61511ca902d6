"""A disk with ranges that are read from elsewhere."""

from __future__ import annotations

import random

from imager.snapshot import PatchedSource, _Kept, _Patch
from tests.support.sources import MemorySource

SIZE = 64 << 10


def test_every_range_has_its_patches() -> None:
    chance = random.Random(5)
    base, other = chance.randbytes(SIZE), chance.randbytes(SIZE)
    patches = [
        _Patch(20000, 3000, MemorySource(other), 512),
        _Patch(0, 100, _Kept(other[:100]), 0),
        _Patch(23000, 1, _Kept(b"x"), 0),
        _Patch(SIZE - 10, 10, MemorySource(other), 40000),
    ]
    expected = bytearray(base)
    expected[20000:23000] = other[512:3512]
    expected[0:100] = other[:100]
    expected[23000:23001] = b"x"
    expected[SIZE - 10 :] = other[40000:40010]
    source = PatchedSource(MemorySource(base), patches)
    ranges = [(0, SIZE), (0, 0), (SIZE, 0), (20000, 3001), (99, 2), (22999, 3)]
    for _ in range(200):
        offset = chance.randrange(SIZE)
        ranges.append((offset, chance.randrange(SIZE - offset)))
    for offset, length in ranges:
        assert source.pread(offset, length) == expected[offset : offset + length]
        buffer = bytearray(length)
        source.read_into(offset, memoryview(buffer))
        assert buffer == expected[offset : offset + length]
