"""NTFS records and runs, built by hand; whole filesystems are in ``tests/loop``."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager.allocation.ntfs.record import Attribute, Run, attributes, runs, without_fixups
from imager.errors import NotRecognized

CLUSTERS = 1 << 40


def _signed(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)


def _packed(wanted: list[Run]) -> bytes:
    """Mapping pairs as a writer of NTFS makes them."""
    parts, before = [], 0
    for place, length in wanted:
        count, delta = _signed(length), b"" if place is None else _signed(place - before)
        parts.append(bytes([len(delta) << 4 | len(count)]) + count + delta)
        before = before if place is None else place
    return b"".join(parts) + b"\0"


def _attribute(packed: bytes, length: int, lowest: int = 0) -> Attribute:
    return Attribute(0x80, False, None, lowest, lowest + length - 1, 0, 0, 0, packed)


_LENGTHS = st.integers(1, 1 << 30)
_PLACES = st.one_of(st.none(), st.integers(0, CLUSTERS - (1 << 30)))


@given(st.lists(st.builds(Run, _PLACES, _LENGTHS), max_size=20))
def test_runs_are_what_was_packed(wanted: list[Run]) -> None:
    total = sum(run.length for run in wanted)
    assert runs(_attribute(_packed(wanted), total, lowest=7), CLUSTERS) == wanted


@pytest.mark.parametrize(
    ("packed", "length"),
    [
        (b"", 1),  # no end
        (b"\x11\x01\x05", 1),  # no end
        (b"\x11\x01", 1),  # cut
        (b"\x01\x02\0", 1),  # longer than the attribute says
        (b"\x01\x01\0", 2),  # shorter
        (b"\x11\x00\x05\0", 0),  # no clusters
        (b"\x11\xff\x05\0", 1),  # a negative number of them
        (b"\x10\x05\0", 1),  # no length
        (b"\x11\x01\xff\0", 1),  # before the start
        (b"\x11\x05\x60\0", 5),  # behind the end
        (b"\x99" + bytes(18) + b"\0", 1),  # numbers too long
    ],
)
def test_damaged_runs(packed: bytes, length: int) -> None:
    with pytest.raises(NotRecognized):
        runs(_attribute(packed, length), 100)


def _record(body: bytes, size: int = 1024) -> bytes:
    record = bytearray(size)
    record[:4] = b"FILE"
    struct.pack_into("<HH", record, 4, 48, size // 512 + 1)
    struct.pack_into("<HHI", record, 20, 56, 1, 56 + len(body))
    record[56 : 56 + len(body)] = body
    record[48:50] = b"\7\7"
    for block in range(size // 512):
        end = 512 * (block + 1)
        record[50 + 2 * block : 52 + 2 * block] = record[end - 2 : end]
        record[end - 2 : end] = b"\7\7"
    return bytes(record)


def _resident(kind: int, value: bytes) -> bytes:
    padded = value + bytes(-len(value) % 8)
    return struct.pack("<IIBBHHHIHH", kind, 24 + len(padded), 0, 0, 0, 0, 0, len(value), 24, 0) + (
        padded
    )


END = b"\xff\xff\xff\xff\0\0\0\0"


def test_attributes_across_a_fixup() -> None:
    values = [random.Random(n).randbytes(40 * n) for n in range(1, 6)]
    body = b"".join(_resident(0x10 * n, value) for n, value in enumerate(values, 1))
    found = list(attributes(without_fixups(_record(body + END))))
    assert [(item.kind, item.value) for item in found] == [
        (0x10 * n, value) for n, value in enumerate(values, 1)
    ]


def test_torn_record() -> None:
    record = bytearray(_record(END))
    record[1022] ^= 1
    with pytest.raises(NotRecognized, match="not written whole"):
        without_fixups(bytes(record))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        _resident(0x10, b"value"),
        struct.pack("<II", 0x10, 0) + bytes(40),
        struct.pack("<II", 0x10, 4096) + bytes(40) + END,
        struct.pack("<IIBBHHHIHH", 0x10, 24, 0, 0, 0, 0, 0, 500, 24, 0) + END,
        struct.pack("<IIBBHHH", 0x80, 32, 1, 0, 0, 0, 0) + bytes(16) + END,
    ],
)
def test_damaged_attributes(body: bytes) -> None:
    with pytest.raises(NotRecognized):
        list(attributes(without_fixups(_record(body))))
