"""The log of an XFS: where it ends, where a recovery would start, and the records between.

The log is a ring of basic blocks (512 bytes). The first word of each holds the number of the
lap (*cycle*) in which it was written; a record's header keeps the words that the cycles
replaced. So the newest record, the head, is found by a binary search over cycles, and the log
is never read whole.

Source: Linux fs/xfs/libxfs/xfs_log_format.h, fs/xfs/xfs_log_recover.c. Headers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

from imager.allocation.checksum import crc32c, crc32c_of
from imager.allocation.model import require
from imager.allocation.xfs.layout import BASIC_BLOCK, Superblock
from imager.blocksource import BlockSource
from imager.errors import NotRecognized

_MAGIC = 0xFEEDBABE
_CYCLES_PER_HEADER = 64
_HEADER_PAYLOAD = _CYCLES_PER_HEADER * BASIC_BLOCK  # 32 KiB for each header block
_LARGEST_RECORD = {1: 32 << 10, 2: 256 << 10}  # payload bytes by log version
_CONCURRENT_RECORDS = 8  # may be under way at once, and then be missing or torn (XLOG_MAX_ICLOGS)

_HEADER_CHECKSUM_OFFSET = 32
_HEADER_CHECKED = 328  # bytes of the first header that its checksum covers
_EXTENSION_CHECKED = 260  # and of each further one
_LITTLE_ENDIAN_LINUX = 1

_READ_BLOCKS = 2048  # basic blocks read at once: 1 MiB

_OPERATION = struct.Struct(">IIBBxx")
_UNMOUNT = 0x20


class Operation(NamedTuple):
    """A piece of a transaction."""

    transaction: int
    client: int
    flags: int
    data: bytes


class _Header(NamedTuple):
    cycle: int
    version: int
    length: int
    """Payload bytes."""
    sequence: int
    """Cycle in the high, block in the low 32 bits."""
    tail: int
    checksum: int
    operations: int
    format: int
    uuid: bytes
    record_size: int

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        magic, cycle, version, length, sequence, tail = struct.unpack_from(">4I2Q", raw)
        require(magic == _MAGIC, "a record of the log has no header")
        (checksum,) = struct.unpack_from("<I", raw, _HEADER_CHECKSUM_OFFSET)
        (operations,) = struct.unpack_from(">I", raw, 40)
        (format_,) = struct.unpack_from(">I", raw, 300)
        (record_size,) = struct.unpack_from(">I", raw, 320)
        return cls(
            cycle,
            version,
            length,
            sequence,
            tail,
            checksum,
            operations,
            format_,
            raw[304:320],
            record_size,
        )

    @property
    def header_blocks(self) -> int:
        if self.version & 2 and self.record_size > _HEADER_PAYLOAD:
            return -(-self.record_size // _HEADER_PAYLOAD)
        return 1

    @property
    def blocks(self) -> int:
        """Basic blocks of the record with its headers."""
        return self.header_blocks + -(-self.length // BASIC_BLOCK)


class _Record(NamedTuple):
    block: int
    header: _Header
    raw: bytes
    """Headers and payload as they lie on the disk."""

    @property
    def checksum(self) -> int:
        """What its header should say."""
        raw, at = self.raw, _HEADER_CHECKSUM_OFFSET
        register = crc32c(0xFFFFFFFF, raw[:at])
        register = crc32c(register, bytes(4))
        register = crc32c(register, raw[at + 4 : _HEADER_CHECKED])
        extensions = -(-self.header.length // _HEADER_PAYLOAD) if self.header.version & 2 else 1
        for number in range(1, min(extensions, self.header.header_blocks)):
            start = number * BASIC_BLOCK
            register = crc32c(register, raw[start : start + _EXTENSION_CHECKED])
        start = self.header.header_blocks * BASIC_BLOCK
        payload = raw[start : start + self.header.length]
        return _crc32c_in_pieces(register, payload) ^ 0xFFFFFFFF

    @property
    def is_unmount(self) -> bool:
        start = self.header.header_blocks * BASIC_BLOCK
        _, _, _, flags = _OPERATION.unpack_from(self.raw, start)
        return self.header.operations == 1 and bool(flags & _UNMOUNT)

    def operations(self) -> Iterator[Operation]:
        """Raises NotRecognized for damage."""
        data = self._payload()
        at = 0
        for _ in range(self.header.operations):
            require(at + _OPERATION.size <= len(data), "a record of the log is too short")
            transaction, length, client, flags = _OPERATION.unpack_from(data, at)
            at += _OPERATION.size
            require(length <= len(data) - at, "a record of the log is too short")
            yield Operation(transaction, client, flags, data[at : at + length])
            at += length

    def _payload(self) -> bytes:
        """With the words put back that cycles had replaced."""
        headers = self.header.header_blocks
        payload = bytearray(self.raw[headers * BASIC_BLOCK :])
        for number in range(len(payload) // BASIC_BLOCK):
            header, index = divmod(number, _CYCLES_PER_HEADER)
            require(header < headers, "a record of the log has too few headers")
            # the first header has fields before its words, the others only their cycle
            kept = header * BASIC_BLOCK + (4 if header else 44) + 4 * index
            at = number * BASIC_BLOCK
            payload[at : at + 4] = self.raw[kept : kept + 4]
        return bytes(payload[: self.header.length])


def _crc32c_in_pieces(register: int, data: bytes) -> int:
    """Records have any length, and the fast checksum prepares itself for each length anew."""
    at = 0
    for size in (BASIC_BLOCK << power for power in range(6, -1, -1)):
        while len(data) - at >= size:
            register = crc32c_of(register, data[at : at + size])
            at += size
    return crc32c(register, data[at:])


class Log:
    """An internal log. Positions are basic blocks from its start."""

    def __init__(self, source: BlockSource, superblock: Superblock) -> None:
        """Finds the head. Raises NotRecognized for damage, OSError."""
        self._source = source
        self._uuid = superblock.uuid
        self._must_have_checksums = superblock.has_checksums
        self._start = superblock.log_first_block * superblock.block_size
        self._length = superblock.log_blocks * superblock.basic_blocks_per_block
        self._version = 2 if superblock.has_log_version_2 else 1
        self._record_blocks = _LARGEST_RECORD[self._version] // BASIC_BLOCK
        self._head = self._find_head()
        self._newest = self._record_before(self._head)

    @property
    def is_clean(self) -> bool:
        """Whether the newest record says that the filesystem was unmounted."""
        return self._newest.is_unmount

    @property
    def sequence(self) -> int:
        """Of the next record to be written: no block of the filesystem can have a later one."""
        newest = self._newest
        end = newest.block + newest.header.blocks
        cycle = newest.header.cycle + (end >= self._length)
        return cycle << 32 | self._head

    def operations(self) -> Iterator[Operation]:
        """What a recovery would read, oldest first. Raises NotRecognized for damage, OSError."""
        self._forget_torn_records()
        for record in self._records():
            yield from record.operations()

    # --- head ---------------------------------------------------------------------------------

    def _find_head(self) -> int:
        """Where the next record would go. Several writes may have been under way at the end, so
        what the search finds may lie behind a hole; xlog_find_head has the cases drawn."""
        first, last = self._cycle(0), self._cycle(self._length - 1)
        require(first != 0, "its log was zeroed")
        window = min(_CONCURRENT_RECORDS * self._record_blocks, self._length)
        if last == 0:
            require(first == 1, "its log has no start")
            head, stop = self._first_of(0), 0
        elif first == last:
            head, stop = self._length, last - 1
        else:
            head, stop = self._first_of(last), last
        before = head - window
        if before < 0 and last != 0:
            hole = self._find_cycle(self._length + before, self._length, stop - 1)
            if hole is not None:
                return self._without_partial_record(hole)
        hole = self._find_cycle(max(before, 0), head, stop)
        return self._without_partial_record(head if hole is None else hole)

    def _first_of(self, cycle: int) -> int:
        """Binary search for the first block of that cycle; the last block is of it."""
        low, high = 0, self._length - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._cycle(middle) == cycle:
                high = middle
            else:
                low = middle
        return high

    def _find_cycle(self, start: int, end: int, cycle: int) -> int | None:
        """The first block of that cycle in ``[start, end)``."""
        return next((block for block, found in self._cycles(start, end) if found == cycle), None)

    def _without_partial_record(self, head: int) -> int:
        """The head, or the start of the record before it when that is not whole."""
        block, header = self._header_before(head)
        whole = (head - block - 1) % self._length + 1 == header.blocks
        return head % self._length if whole else block

    def _record_before(self, head: int) -> _Record:
        block, header = self._header_before(head or self._length)
        require((block + header.blocks) % self._length == head, "the log's end is damaged")
        record = self._read_record(block)
        # mkfs leaves the checksum of its own record, an unmount, zero
        require(
            not record.is_unmount or record.header.checksum in (0, record.checksum),
            "a wrong checksum at the log's end",
        )
        return record

    def _header_before(self, head: int) -> tuple[int, _Header]:
        """Searched backwards, no further than the largest record is long."""
        reach = min(self._record_blocks + self._record_blocks // _CYCLES_PER_HEADER, self._length)
        start = head - reach
        spans = [(max(start, 0), head), (self._length + start, self._length)]
        for low, high in spans[: 1 if start >= 0 else 2]:
            data = self._read(low, high - low) if high > low else b""
            for at in range(len(data) - BASIC_BLOCK, -1, -BASIC_BLOCK):
                if int.from_bytes(data[at : at + 4], "big") == _MAGIC:
                    block = low + at // BASIC_BLOCK
                    return block, self._parse(block, data[at : at + BASIC_BLOCK])
        raise NotRecognized("its log has no record before its end")

    # --- records ------------------------------------------------------------------------------

    def _records(self) -> Iterator[_Record]:
        """From the tail to the head."""
        cycle, block = divmod(self._newest.header.tail, 1 << 32)
        require(block < self._length and block != self._head, "the log's tail is damaged")
        left = (self._head - block) % self._length
        while left > 0:
            record = self._read_record(block)
            require(
                record.header.cycle == cycle and record.header.blocks <= left,
                f"the record at block {block} of the log is not of this lap",
            )
            yield record
            left -= record.header.blocks
            block += record.header.blocks
            if block >= self._length:
                block, cycle = block - self._length, cycle + 1

    def _forget_torn_records(self) -> None:
        """Records that were under way when the power went may be torn: as the kernel does
        (xlog_verify_head), the log ends before the first of those."""
        last_good = first_broken = None
        behind = 0
        for record in self._records():
            if first_broken is not None:
                behind += 1
            elif self._is_intact(record):
                last_good = record
            else:
                first_broken = record
        if first_broken is None:
            return
        if last_good is None or behind >= _CONCURRENT_RECORDS:
            raise NotRecognized(f"a wrong checksum at block {first_broken.block} of the log")
        self._head, self._newest = first_broken.block, last_good
        require(all(map(self._is_intact, self._records())), "a wrong checksum in the log")

    def _is_intact(self, record: _Record) -> bool:
        """Old kernels without checksums on blocks left those of records zero too."""
        stored = record.header.checksum
        if stored == 0 and not self._must_have_checksums:
            return True
        return stored == record.checksum

    def _read_record(self, block: int) -> _Record:
        header = self._parse(block, self._read(block, 1))
        return _Record(block, header, self._read(block, header.blocks))

    def _parse(self, block: int, raw: bytes) -> _Header:
        header = _Header.parse(raw)
        where = f"the record at block {block} of the log"
        require(header.uuid == self._uuid, f"{where} is of another filesystem")
        require(
            header.sequence == header.cycle << 32 | block
            and header.version in (1, self._version)
            and 0 < header.length <= _LARGEST_RECORD[self._version]
            and header.record_size <= _LARGEST_RECORD[self._version]
            and header.blocks <= self._length,
            f"{where} is damaged",
        )
        require(header.format == _LITTLE_ENDIAN_LINUX, f"{where} is of another kind of machine")
        return header

    # --- blocks -------------------------------------------------------------------------------

    def _cycle(self, block: int) -> int:
        return next(self._cycles(block, block + 1))[1]

    def _cycles(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(block, cycle) for a range that does not wrap."""
        for low in range(start, end, _READ_BLOCKS):
            data = self._read(low, min(_READ_BLOCKS, end - low))
            for index in range(len(data) // BASIC_BLOCK):
                word, second = struct.unpack_from(">II", data, index * BASIC_BLOCK)
                yield low + index, second if word == _MAGIC else word

    def _read(self, block: int, count: int) -> bytes:
        """Basic blocks, around the end if need be."""
        before_end = min(count, self._length - block)
        data = self._source.pread(self._start + block * BASIC_BLOCK, before_end * BASIC_BLOCK)
        if before_end < count:
            data += self._source.pread(self._start, (count - before_end) * BASIC_BLOCK)
        return data
