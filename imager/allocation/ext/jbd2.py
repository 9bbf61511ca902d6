"""The journal of ext3 and ext4: which blocks a replay would write, and with what.

Source: Linux include/linux/jbd2.h, fs/jbd2/recovery.c. All integers big-endian. Only reads:
nothing is ever replayed onto the source.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

from imager.allocation.checksum import crc32c
from imager.allocation.model import require
from imager.errors import UnsupportedError

MAGIC = 0xC03B3998
_MAGIC_BYTES = MAGIC.to_bytes(4, "big")

_DESCRIPTOR, _COMMIT, _SUPERBLOCK_V1, _SUPERBLOCK_V2, _REVOKE = 1, 2, 3, 4, 5

_COMPAT_CHECKSUM = 0x1
_INCOMPAT_REVOKE = 0x1
_INCOMPAT_64BIT = 0x2
_INCOMPAT_CSUM_V2 = 0x8
_INCOMPAT_CSUM_V3 = 0x10
# Not async_commit (commits may be torn) and not fast_commit (changes that are no block copies).
_INCOMPAT_KNOWN = _INCOMPAT_REVOKE | _INCOMPAT_64BIT | _INCOMPAT_CSUM_V2 | _INCOMPAT_CSUM_V3

_TAG_ESCAPED, _TAG_SAME_UUID, _TAG_LAST = 0x1, 0x2, 0x8

_HEADER_SIZE = 12
_SUPERBLOCK_SIZE = 1024
_COMMIT_CHECKSUM_OFFSET = 16
_SEQUENCE_MASK = 0xFFFFFFFF

# 4 GiB of 4 KiB blocks; bounds memory and time of a replay.
MAX_LOG_BLOCKS = 1 << 20


class Tag(NamedTuple):
    """One entry of a descriptor block: the log holds a copy of ``block``."""

    block: int
    flags: int
    checksum: int


class LogCopy(NamedTuple):
    """Where the log holds the newest committed copy of a block."""

    log_block: int
    age: int
    """Transactions before this one in the log."""
    tag: Tag


class _Transaction(NamedTuple):
    copies: list[LogCopy]
    revoked: list[int]


class _Cursor:
    """Walks the log's ring, at most once around."""

    def __init__(self, at: int, first: int, length: int) -> None:
        self._at, self._first, self._length = at, first, length
        self._left = length - first + 1  # the block behind a full log's end is its first again

    def take(self) -> int:
        """The current log block; the cursor moves on. Raises NotRecognized at the second lap."""
        require(self._left > 0, "a journal that runs in circles")
        taken = self._at
        self._left -= 1
        self._at = taken + 1 if taken + 1 < self._length else self._first
        return taken


@dataclass(frozen=True)
class _Superblock:
    raw: bytes
    block_size: int
    length: int
    first: int
    sequence: int
    start: int
    error: int
    compat: int
    incompat: int

    @classmethod
    def parse(cls, block: bytes) -> Self:
        require(len(block) >= _SUPERBLOCK_SIZE, "a journal with tiny blocks")
        magic, kind, _ = struct.unpack_from(">3I", block)
        require(
            magic == MAGIC and kind in (_SUPERBLOCK_V1, _SUPERBLOCK_V2), "no journal superblock"
        )
        block_size, length, first, sequence, start, error = struct.unpack_from(">6I", block, 12)
        compat, incompat, _ = struct.unpack_from(">3I", block, 0x24)
        if kind == _SUPERBLOCK_V1:
            compat = incompat = 0
        raw = block[:_SUPERBLOCK_SIZE]
        return cls(raw, block_size, length, first, sequence, start, error, compat, incompat)

    @property
    def has_checksums(self) -> bool:
        return bool(self.incompat & (_INCOMPAT_CSUM_V2 | _INCOMPAT_CSUM_V3))

    @property
    def checksum_seed(self) -> int:
        return crc32c(0xFFFFFFFF, self.raw[0x30:0x40])

    def check(self, block_size: int, available: int) -> None:
        require(self.block_size == block_size, "the journal's block size is not the filesystem's")
        require(
            0 < self.first < self.length <= available
            and (self.start == 0 or self.first <= self.start < self.length),
            "the journal's superblock points outside of the journal",
        )
        require(self.error == 0, "the journal is marked as having errors")
        if not self.has_checksums:
            return
        bare = bytearray(self.raw)
        bare[0xFC:0x100] = bytes(4)
        require(
            self.raw[0x50] == 4 and crc32c(0xFFFFFFFF, bare) == _be32(self.raw, 0xFC),
            "the checksum of the journal's superblock is wrong",
        )


class Journal:
    """A journal that is read through ``read``: log block number to its bytes."""

    def __init__(self, read: Callable[[int], bytes], block_size: int, available: int) -> None:
        """``available``: blocks that can be read. Raises NotRecognized, OSError."""
        self._read = read
        self._block_size = block_size
        self._superblock = _Superblock.parse(read(0))
        self._superblock.check(block_size, available)
        self._seed = self._superblock.checksum_seed

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to replay."""
        return self._superblock.start == 0

    def committed(self) -> dict[int, LogCopy]:
        """Filesystem block to its newest copy in a committed transaction that no later revoke
        record cancels.

        Raises UnsupportedError for features that a replay here can't follow, NotRecognized for
        damage, OSError.
        """
        self._check_replayable()
        copies: dict[int, LogCopy] = {}
        revoked: dict[int, int] = {}
        for age, transaction in enumerate(self._transactions()):
            copies.update((copy.tag.block, copy) for copy in transaction.copies)
            revoked.update(dict.fromkeys(transaction.revoked, age))
        return {block: copy for block, copy in copies.items() if copy.age > revoked.get(block, -1)}

    def content(self, copy: LogCopy) -> bytes:
        """A block as the replay would write it. Raises NotRecognized when damaged, OSError."""
        data = self._read(copy.log_block)
        self._check_copy(copy, data)
        return _MAGIC_BYTES + data[4:] if copy.tag.flags & _TAG_ESCAPED else data

    def _check_replayable(self) -> None:
        unknown = self._superblock.incompat & ~_INCOMPAT_KNOWN
        if unknown:
            raise UnsupportedError(f"unknown feature bits {unknown:#x} of a journal in use")
        if self._superblock.compat & _COMPAT_CHECKSUM:
            raise UnsupportedError("old transaction checksums in a journal in use")
        both = _INCOMPAT_CSUM_V2 | _INCOMPAT_CSUM_V3
        require(self._superblock.incompat & both != both, "two checksum versions in one journal")
        require(self._superblock.length <= MAX_LOG_BLOCKS, "a journal in use that is too big")

    def _transactions(self) -> Iterator[_Transaction]:
        """Committed transactions, oldest first. The log ends at the first block that is not of
        the expected transaction."""
        log = self._superblock
        if self.is_empty:
            return
        cursor, age = _Cursor(log.start, log.first, log.length), 0
        while transaction := self._transaction(cursor, age):
            yield transaction
            age += 1

    def _transaction(self, cursor: _Cursor, age: int) -> _Transaction | None:
        """The next transaction; None when it has no commit block."""
        sequence = self._sequence(age)
        transaction = _Transaction([], [])
        while True:
            block = self._read(cursor.take())
            magic, kind, stored_sequence = struct.unpack_from(">3I", block)
            if magic != MAGIC or stored_sequence != sequence:
                return None
            if kind == _DESCRIPTOR:
                self._check_tail(block)
                transaction.copies.extend(
                    LogCopy(cursor.take(), age, tag) for tag in self._tags(block)
                )
            elif kind == _REVOKE:
                self._check_tail(block)
                transaction.revoked.extend(self._revoked(block))
            elif kind == _COMMIT:
                self._check_commit(block)
                return transaction
            else:
                return None

    def _sequence(self, age: int) -> int:
        return self._superblock.sequence + age & _SEQUENCE_MASK

    def _tags(self, descriptor: bytes) -> Iterator[Tag]:
        at = _HEADER_SIZE
        end = self._block_size - (4 if self._superblock.has_checksums else 0)
        while at + self._tag_size <= end:
            tag = self._tag(descriptor, at)
            yield tag
            if tag.flags & _TAG_LAST:
                return
            at += self._tag_size + (0 if tag.flags & _TAG_SAME_UUID else 16)

    @cached_property
    def _tag_size(self) -> int:
        """Bytes (journal_tag_bytes in fs/jbd2/journal.c)."""
        if self._superblock.incompat & _INCOMPAT_CSUM_V3:
            return 16
        return (
            8
            + (4 if self._superblock.incompat & _INCOMPAT_64BIT else 0)
            + (2 if self._superblock.incompat & _INCOMPAT_CSUM_V2 else 0)
        )

    def _tag(self, descriptor: bytes, at: int) -> Tag:
        wide = self._superblock.incompat & _INCOMPAT_64BIT
        if self._superblock.incompat & _INCOMPAT_CSUM_V3:
            block, flags, high, checksum = struct.unpack_from(">4I", descriptor, at)
        else:
            block, checksum, flags = struct.unpack_from(">IHH", descriptor, at)
            high = _be32(descriptor, at + 8) if wide else 0
        return Tag(block | (high << 32 if wide else 0), flags, checksum)

    def _revoked(self, block: bytes) -> list[int]:
        used = _be32(block, _HEADER_SIZE)
        code = ">Q" if self._superblock.incompat & _INCOMPAT_64BIT else ">I"
        end = self._block_size - (4 if self._superblock.has_checksums else 0)
        start = _HEADER_SIZE + 4
        require(
            start <= used <= end and (used - start) % struct.calcsize(code) == 0,
            "a damaged revoke block in the journal",
        )
        return [number for (number,) in struct.iter_unpack(code, block[start:used])]

    def _check_tail(self, block: bytes) -> None:
        if self._superblock.has_checksums:
            computed = crc32c(self._seed, block[:-4] + bytes(4))
            require(computed == _be32(block, len(block) - 4), "a wrong checksum in the journal")

    def _check_commit(self, block: bytes) -> None:
        if self._superblock.has_checksums:
            at = _COMMIT_CHECKSUM_OFFSET
            computed = crc32c(self._seed, block[:at] + bytes(4) + block[at + 4 :])
            require(computed == _be32(block, at), "a wrong checksum of a commit in the journal")

    def _check_copy(self, copy: LogCopy, data: bytes) -> None:
        if not self._superblock.has_checksums:
            return
        sequence = self._sequence(copy.age).to_bytes(4, "big")
        computed = crc32c(crc32c(self._seed, sequence), data)
        if not self._superblock.incompat & _INCOMPAT_CSUM_V3:
            computed &= 0xFFFF
        require(
            computed == copy.tag.checksum,
            f"the journal's copy of block {copy.tag.block} has a wrong checksum",
        )


def _be32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")
