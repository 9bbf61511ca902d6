"""Bitmaps to edges, and checksums of bitmaps from their edges."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imager.allocation import bitmap
from imager.allocation.checksum import EdgeChecksum, crc16, crc32c

bitmaps = st.lists(
    st.one_of(st.sampled_from([b"\0" * 9, b"\xff" * 9, b"\0\xff", b"\n"]), st.binary(max_size=5))
).map(b"".join)


def _bits(raw: bytes) -> list[int]:
    return [byte >> bit & 1 for byte in raw for bit in range(8)]


def _bits_of_edges(edges: list[int], length: int) -> list[int]:
    bits = [0] * length
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        bits[first:end] = [1] * (end - first)
    return bits


@given(bitmaps)
def test_edges_describe_the_bitmap(raw: bytes) -> None:
    edges = bitmap.edges(raw)
    assert edges == sorted(set(edges))
    assert _bits_of_edges(edges, 8 * len(raw)) == _bits(raw)
    assert bitmap.count_set(edges) == sum(_bits(raw))


@given(bitmaps, st.integers(0, 400))
def test_cut_is_the_start_of_the_bitmap(raw: bytes, length: int) -> None:
    length = min(length, 8 * len(raw))
    edges = bitmap.cut(bitmap.edges(raw), length)
    assert _bits_of_edges(edges, length) == _bits(raw)[:length]


@given(bitmaps, bitmaps)
def test_union_has_the_bits_of_both(one: bytes, other: bytes) -> None:
    length = min(len(one), len(other))
    one, other = one[:length], other[:length]
    either = [a | b for a, b in zip(_bits(one), _bits(other), strict=True)]
    assert _bits(bitmap.union(one, other)) == either


@given(bitmaps.filter(bool), st.integers(0, 0xFFFFFFFF))
def test_checksum_from_edges_is_crc32c(raw: bytes, seed: int) -> None:
    assert EdgeChecksum(seed, len(raw)).of(bitmap.edges(raw)) == crc32c(seed, raw)


def test_published_check_values() -> None:
    """The CRC catalogue's answers for "123456789": CRC-32/ISCSI and CRC-16/ARC."""
    assert crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert crc16(0, b"123456789") == 0xBB3D
