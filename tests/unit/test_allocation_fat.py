"""The file allocation table against the plainest way to read it; more is in ``tests/loop``."""

from __future__ import annotations

import random
import struct

import pytest

from imager.allocation import allocation_map
from imager.allocation.vfat.layout import Geometry
from imager.allocation.vfat.table import Table
from tests.support.sources import MemorySource

CLUSTERS = {12: 3001, 16: 9000, 32: 70_000}


def _volume(bits: int, entries: list[int]) -> bytes:
    """One sector a cluster, two FATs, no files."""
    fat = b"".join(_packed(bits, entries))
    sectors = -(-len(fat) // 512)
    fat += bytes(sectors * 512 - len(fat))
    roots = 0 if bits == 32 else 16
    first_data = 32 + 2 * sectors + (1 if roots else 0)
    total = first_data + CLUSTERS[bits]
    boot = bytearray(512)
    boot[0], boot[510:] = 0xEB, b"\x55\xaa"
    is_32 = bits == 32
    struct.pack_into("<HBHBHHBH", boot, 11, 512, 1, 32, 2, roots, 0, 0xF8, 0 if is_32 else sectors)
    struct.pack_into("<II", boot, 32, total, sectors if is_32 else 0)
    struct.pack_into("<I", boot, 44, 2 if is_32 else 0)
    return bytes(boot) + bytes(31 * 512) + fat * 2 + bytes((total - 32 - 2 * sectors) * 512)


def _packed(bits: int, entries: list[int]) -> list[bytes]:
    if bits == 12:
        padded = [*entries, 0]
        return [
            (low | high << 12).to_bytes(3, "little")
            for low, high in zip(padded[::2], padded[1::2], strict=False)
        ]
    return [entry.to_bytes(bits // 8, "little") for entry in entries]


@pytest.mark.parametrize("bits", CLUSTERS)
def test_used_clusters(bits: int) -> None:
    chance = random.Random(bits)
    highest = 0x0FFFFFFF if bits == 32 else (1 << bits) - 1
    entries = [highest & ~7, highest] + [0] * CLUSTERS[bits]
    entries[2] = highest
    for number in range(3, len(entries) - 1):
        if chance.random() < 0.4:
            entries[number] = chance.choice((highest, highest - 8, number + 1))
    content = _volume(bits, entries)
    geometry = Geometry.parse(content[:512])
    assert geometry is not None and geometry.bits == bits
    table = Table(MemorySource(content), geometry)
    marked = {n for first, count in table.used_runs() for n in range(first, first + count)}
    wanted = {number for number, entry in enumerate(entries) if entry and number >= 2}
    followed = {n + 1 for n in wanted if entries[n] == n + 1}
    assert marked == wanted
    assert set(table.link_targets) == followed - wanted
    found = allocation_map(MemorySource(content))
    free = found.used.complement(len(content))
    unused = set(range(2, len(entries))) - wanted - followed
    assert free.total == len(unused) * 512
    assert all(not found.used.covers(geometry.cluster_offset(n), 1) for n in unused)
