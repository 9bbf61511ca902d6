"""The checksums that Btrfs protects its superblocks and tree nodes with.

Source: Linux fs/btrfs/fs.c (btrfs_csum); xxHash specification (XXH64) by its author.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

from imager.allocation.checksum import crc32c_of
from imager.errors import UnsupportedError

_CRC32C, _XXHASH64, _SHA256, _BLAKE2B = range(4)


def digest_of(kind: int, data: bytes) -> bytes:
    """What stands in front of ``data`` on disk. Raises UnsupportedError for an unknown kind."""
    if kind == _CRC32C:
        return (crc32c_of(0xFFFFFFFF, data) ^ 0xFFFFFFFF).to_bytes(4, "little")
    if kind == _XXHASH64:
        return xxhash64(data).to_bytes(8, "little")
    if kind == _SHA256:
        return hashlib.sha256(data).digest()
    if kind == _BLAKE2B:
        return hashlib.blake2b(data, digest_size=32).digest()
    raise UnsupportedError(f"unknown checksum type {kind}")


# Not in the standard library. A node takes about 3 ms; a wheel would be one more dependency of the
# rescue system for a checksum that few chose.

_MASK = (1 << 64) - 1
_PRIMES = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)


def xxhash64(data: bytes) -> int:
    """XXH64 with seed 0."""
    first, second, _, fourth, fifth = _PRIMES
    whole = len(data) // 32 * 32
    value = _striped(data[:whole]) if whole else fifth
    value = value + len(data) & _MASK
    for lane in _words("<Q", data[whole:]):
        value = _rotate(value ^ _round(0, lane), 27) * first + fourth & _MASK
    rest = data[len(data) // 8 * 8 :]
    for word in _words("<I", rest):
        value = _rotate(value ^ word * first & _MASK, 23) * second + _PRIMES[2] & _MASK
    for byte in rest[len(rest) // 4 * 4 :]:
        value = _rotate(value ^ byte * fifth & _MASK, 11) * first & _MASK
    return _avalanche(value)


def _striped(data: bytes) -> int:
    """Four lanes of eight bytes each, side by side, then merged."""
    first, second, _, fourth, _ = _PRIMES
    lanes = [first + second & _MASK, second, 0, -first & _MASK]
    for words in struct.iter_unpack("<4Q", data):
        lanes = [_round(lane, word) for lane, word in zip(lanes, words, strict=True)]
    value = sum(map(_rotate, lanes, (1, 7, 12, 18))) & _MASK
    for lane in lanes:
        value = (value ^ _round(0, lane)) * first + fourth & _MASK
    return value


def _round(lane: int, word: int) -> int:
    return _rotate(lane + word * _PRIMES[1] & _MASK, 31) * _PRIMES[0] & _MASK


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> 64 - bits) & _MASK


def _avalanche(value: int) -> int:
    value = (value ^ value >> 33) * _PRIMES[1] & _MASK
    value = (value ^ value >> 29) * _PRIMES[2] & _MASK
    return value ^ value >> 32


def _words(form: str, data: bytes) -> Iterator[int]:
    size = struct.calcsize(form)
    for (word,) in struct.iter_unpack(form, data[: len(data) // size * size]):
        yield word
