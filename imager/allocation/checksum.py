"""CRC-32C and CRC-16 as ext4 and jbd2 use them: a raw register, no inversion before or after.

Plain Python does 15 MB/s, too slow for the 256 MiB of bitmaps of 8 TiB. But a CRC
is linear over GF(2): the register after a bitmap is the register after as many zero bits, XOR
one constant for each set bit. Summed up from the bitmap's end, a run of set bits costs just two
constants, one for each of its edges (``EdgeChecksum``). The edges are needed anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, reduce
from itertools import accumulate
from operator import xor

_CRC32C_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected (RFC 3720, B.4)
_CRC16_POLYNOMIAL = 0xA001  # CRC-16/ARC, reflected (linux/lib/crc/crc16.c)


def _table(polynomial: int) -> list[int]:
    return [reduce(lambda crc, _: _shift(crc, polynomial), range(8), byte) for byte in range(256)]


def _shift(register: int, polynomial: int) -> int:
    return register >> 1 ^ (polynomial if register & 1 else 0)


_CRC32C_TABLE = _table(_CRC32C_POLYNOMIAL)
_CRC16_TABLE = _table(_CRC16_POLYNOMIAL)


def crc32c(register: int, data: Iterable[int]) -> int:
    """The CRC-32C register after ``data``; start with 0xFFFFFFFF unless a seed is given."""
    table = _CRC32C_TABLE
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register


def crc32c_of(register: int, data: bytes) -> int:
    """The same register as ``crc32c``'s, for long data some 15 times as fast.

    As polynomials, ``data`` = head * x^n + tail, and x^n may be replaced by its remainder. So the
    head is folded into the tail, half of the data a time, by a few shifts of one long integer.
    """
    if len(data) < 64:
        return crc32c(register, data)
    bits = int.from_bytes(data, "little") ^ register
    for head, shifts in _folds(len(data)):
        low = bits & (1 << head) - 1
        bits >>= head
        for shift in shifts:
            bits ^= low << shift
    return crc32c(0, bits.to_bytes(_FOLDED, "little"))


_FOLDED = 32  # bytes that are left for the table


@lru_cache(maxsize=16)
def _folds(length: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Steps that shorten ``length`` bytes to ``_FOLDED``: how many leading bits to fold, and
    where each bit of the remainder puts them.

    The lowest bit of the integer is the highest power of x.
    """
    steps = []
    bits = length * 8
    while bits > _FOLDED * 8:
        head = min((bits - 32) // 2, bits - _FOLDED * 8)
        rest = bits - head
        power = _power_of_x(rest)
        # Bit 31 - j of a register is x^j.
        shifts = tuple(rest - head - j for j in range(32) if power >> 31 - j & 1)
        steps.append((head, shifts))
        bits = rest
    return tuple(steps)


def _power_of_x(exponent: int) -> int:
    """x^exponent modulo the polynomial of CRC-32C, as a register."""
    result, square = 1 << 31, 1 << 30  # 1 and x
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result


def _product(one: int, other: int) -> int:
    result = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            result ^= other
        other = _shift(other, _CRC32C_POLYNOMIAL)
    return result


def crc16(register: int, data: Iterable[int]) -> int:
    """The CRC-16 register after ``data``."""
    table = _CRC16_TABLE
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register


class EdgeChecksum:
    """CRC-32C of bitmaps of one length and seed, from their edges (see ``bitmap.edges``)."""

    def __init__(self, seed: int, length: int) -> None:
        """``length`` of the bitmaps in bytes."""
        bits = length * 8
        self._of_zeros = crc32c(seed, bytes(length))
        self._from_edge = [0] * (bits + 1)
        # A set last bit enters the register as the polynomial itself; each bit before it has
        # one more shift behind it.
        one_bit = accumulate(
            range(bits - 1),
            lambda crc, _: _shift(crc, _CRC32C_POLYNOMIAL),
            initial=_CRC32C_POLYNOMIAL,
        )
        self._from_edge[:bits] = list(accumulate(one_bit, xor))[::-1]

    def of(self, bitmap_edges: list[int]) -> int:
        """The register after the bitmap with these edges, all within its length."""
        return reduce(xor, map(self._from_edge.__getitem__, bitmap_edges), self._of_zeros)
