"""Checksums against published vectors, and the fast CRC against the plain one."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager.allocation.btrfs.digest import digest_of, xxhash64
from imager.allocation.checksum import crc32c, crc32c_of
from imager.errors import UnsupportedError


def test_crc32c_vector() -> None:
    """RFC 3720, B.4: 32 bytes of zeros; and the usual check value."""
    assert digest_of(0, bytes(32)) == bytes.fromhex("aa36918a")
    assert digest_of(0, b"123456789") == (0xE3069283).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_xxhash64_vectors(data: bytes, expected: int) -> None:
    assert xxhash64(data) == expected


def test_long_digests() -> None:
    assert digest_of(2, b"x") == hashlib.sha256(b"x").digest()
    assert digest_of(3, b"x") == hashlib.blake2b(b"x", digest_size=32).digest()
    with pytest.raises(UnsupportedError, match="checksum type 4"):
        digest_of(4, b"")


@given(st.binary(max_size=5000), st.integers(0, 0xFFFFFFFF))
def test_folded_crc_equals_the_plain_one(data: bytes, register: int) -> None:
    assert crc32c_of(register, data) == crc32c(register, data)


@pytest.mark.parametrize("length", [63, 64, 65, 4064, 16352, 65504])
def test_folded_crc_of_usual_lengths(length: int) -> None:
    data = hashlib.shake_128(b"seed").digest(length)
    assert crc32c_of(0xFFFFFFFF, data) == crc32c(0xFFFFFFFF, data)
