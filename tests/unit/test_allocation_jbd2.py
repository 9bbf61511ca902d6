"""The journal reader against journals written here, in every tag format."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from imager.allocation.checksum import crc32c
from imager.allocation.ext.jbd2 import MAGIC, Journal
from imager.errors import ImagerError, NotRecognized, UnsupportedError

SIZE = 1024  # bytes of a block
UUID = bytes(range(16))
REVOKE, WIDE, ASYNC, V2, V3, FAST = 1, 2, 4, 8, 16, 32
SEED = crc32c(0xFFFFFFFF, UUID)


@dataclass
class Log:
    """Writes a journal of ``length`` blocks, transactions from ``start`` on."""

    incompat: int
    length: int = 16
    start: int = 1
    sequence: int = 7
    blocks: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._at = self.start
        self._next_sequence = self.sequence

    @property
    def checksums(self) -> bool:
        return bool(self.incompat & (V2 | V3))

    def transaction(
        self, copies: dict[int, bytes], revoked: tuple[int, ...] = (), *, commit: bool = True
    ) -> None:
        if copies:
            self._put(self._descriptor(copies))
            for data in copies.values():
                self._put(self._escaped(data))
        if revoked:
            self._put(self._revoke(revoked))
        if commit:
            block = struct.pack(">3I", MAGIC, 2, self._next_sequence).ljust(SIZE, b"\0")
            if self.checksums:
                checksum = crc32c(SEED, block).to_bytes(4, "big")
                block = block[:16] + checksum + block[20:]
            self._put(block)
        self._next_sequence = self._next_sequence + 1 & 0xFFFFFFFF

    def open(self) -> Journal:
        self.blocks[0] = self._superblock()
        return Journal(lambda n: self.blocks.get(n, bytes(SIZE)), SIZE, self.length)

    def _put(self, block: bytes) -> None:
        self.blocks[self._at] = block
        self._at = self._at + 1 if self._at + 1 < self.length else 1

    def _superblock(self) -> bytes:
        raw = bytearray(SIZE)
        head = (MAGIC, 4, 0, SIZE, self.length, 1, self.sequence, self.start, 0, 0, self.incompat)
        struct.pack_into(">11I", raw, 0, *head)
        raw[0x30:0x40] = UUID
        if self.checksums:
            raw[0x50] = 4
            raw[0xFC:0x100] = crc32c(0xFFFFFFFF, raw).to_bytes(4, "big")
        return bytes(raw)

    @staticmethod
    def _escaped(data: bytes) -> bytes:
        return bytes(4) + data[4:] if data[:4] == MAGIC.to_bytes(4, "big") else data

    def _descriptor(self, copies: dict[int, bytes]) -> bytes:
        raw = struct.pack(">3I", MAGIC, 1, self._next_sequence)
        for n, (block, data) in enumerate(copies.items()):
            flags = (1 if self._escaped(data) != data else 0) | (2 if n else 0)
            flags |= 8 if n == len(copies) - 1 else 0
            sequence = self._next_sequence.to_bytes(4, "big")
            checksum = crc32c(crc32c(SEED, sequence), self._escaped(data)) if self.checksums else 0
            raw += self._tag(block, flags, checksum) + (b"" if flags & 2 else UUID)
        return self._with_tail(raw)

    def _tag(self, block: int, flags: int, checksum: int) -> bytes:
        low, high = block & 0xFFFFFFFF, block >> 32
        if self.incompat & V3:
            return struct.pack(">4I", low, flags, high, checksum)
        tag = struct.pack(">IHH", low, checksum & 0xFFFF, flags)
        tag += struct.pack(">I", high) if self.incompat & WIDE else b""
        return tag + (bytes(2) if self.incompat & V2 else b"")

    def _revoke(self, revoked: tuple[int, ...]) -> bytes:
        code = ">Q" if self.incompat & WIDE else ">I"
        records = b"".join(struct.pack(code, block) for block in revoked)
        head = struct.pack(">4I", MAGIC, 5, self._next_sequence, 16 + len(records))
        return self._with_tail(head + records)

    def _with_tail(self, raw: bytes) -> bytes:
        block = raw.ljust(SIZE, b"\0")
        if self.checksums:
            block = block[:-4] + crc32c(SEED, block).to_bytes(4, "big")
        return block


def replay(log: Log) -> dict[int, bytes]:
    journal = log.open()
    return {block: journal.content(copy) for block, copy in journal.committed().items()}


def filled(byte: int) -> bytes:
    return bytes([byte]) * SIZE


FORMATS = [0, REVOKE, WIDE | REVOKE, V2, V2 | WIDE, V3, V3 | WIDE | REVOKE]


@pytest.mark.parametrize("incompat", FORMATS)
def test_newest_committed_copy_wins(incompat: int) -> None:
    log = Log(incompat)
    far = 5 << 32 | 9 if incompat & WIDE else 9
    log.transaction({1: filled(1), 2: filled(2), far: filled(3)})
    log.transaction({2: filled(4)})
    log.transaction({1: filled(5)}, commit=False)
    assert replay(log) == {1: filled(1), 2: filled(4), far: filled(3)}


@pytest.mark.parametrize("incompat", FORMATS)
def test_escaped_block_gets_its_magic_back(incompat: int) -> None:
    data = MAGIC.to_bytes(4, "big") + bytes(range(256)) * 3 + bytes(252)
    log = Log(incompat)
    log.transaction({3: data})
    assert replay(log) == {3: data}


@pytest.mark.parametrize("incompat", FORMATS)
def test_revoked_until_written_again(incompat: int) -> None:
    log = Log(incompat)
    log.transaction({1: filled(1), 2: filled(2)})
    log.transaction({}, revoked=(1, 2))
    log.transaction({2: filled(3)})
    assert replay(log) == {2: filled(3)}


def test_revoke_holds_in_its_own_transaction() -> None:
    log = Log(REVOKE)
    log.transaction({1: filled(1), 2: filled(2)}, revoked=(1,))
    assert replay(log) == {2: filled(2)}


@pytest.mark.parametrize("incompat", FORMATS)
def test_wraps_around_in_log_and_sequence(incompat: int) -> None:
    log = Log(incompat, length=12, start=9, sequence=0xFFFFFFFF)
    log.transaction({n: filled(n) for n in range(1, 5)})
    log.transaction({2: filled(9)})
    assert replay(log) == {1: filled(1), 2: filled(9), 3: filled(3), 4: filled(4)}


def test_full_log_ends_at_its_start() -> None:
    log = Log(0, length=7, start=4)
    log.transaction({1: filled(1)})
    log.transaction({2: filled(2)})
    assert replay(log) == {1: filled(1), 2: filled(2)}


def test_nothing_to_replay() -> None:
    journal = Log(V3, start=0).open()
    assert journal.is_empty and journal.committed() == {}


@pytest.mark.parametrize("incompat", [V2, V3])
@pytest.mark.parametrize("position", [0, 1, 2, 3], ids=["superblock", "tags", "data", "commit"])
def test_checksums_are_checked(incompat: int, position: int) -> None:
    log = Log(incompat)
    log.transaction({1: filled(1)})
    journal = log.open()
    damaged = bytearray(log.blocks[position])
    damaged[200] ^= 1
    log.blocks[position] = bytes(damaged)
    with pytest.raises(NotRecognized, match="checksum"):
        if position == 0:
            Journal(lambda n: log.blocks[n], SIZE, log.length)
        else:
            journal.content(journal.committed()[1])


@pytest.mark.parametrize("incompat", [ASYNC, FAST, 64])
def test_features_beyond_this_reader_are_refused(incompat: int) -> None:
    log = Log(incompat)
    log.transaction({1: filled(1)})
    with pytest.raises(UnsupportedError, match="feature bits"):
        log.open().committed()


def test_endless_transaction_ends() -> None:
    log = Log(0, length=4)
    revoke = struct.pack(">4I", MAGIC, 5, 7, 16).ljust(SIZE, b"\0")
    log.blocks.update({1: revoke, 2: revoke, 3: revoke})
    with pytest.raises(NotRecognized, match="circles"):
        log.open().committed()


@pytest.mark.parametrize("used", [0, 15, 17, SIZE + 1, 0xFFFFFFFF])
def test_damaged_revoke_block(used: int) -> None:
    log = Log(REVOKE)
    log.blocks[1] = struct.pack(">4I", MAGIC, 5, 7, used).ljust(SIZE, b"\0")
    with pytest.raises(ImagerError, match="revoke"):
        log.open().committed()
