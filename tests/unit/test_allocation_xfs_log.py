"""The log reader and the recovery against logs written here: every lap, torn ends, cancels."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest

from imager.allocation.checksum import crc32c
from imager.allocation.xfs.layout import Superblock
from imager.allocation.xfs.log import Log, Operation
from imager.allocation.xfs.recovery import Place, recover
from imager.errors import ImagerError, NotRecognized, UnsupportedError
from tests.support.sources import MemorySource

UUID = bytes(range(16))
CLIENT = 0x69
START, COMMIT, CONTINUES, CONTINUED, END, UNMOUNT = 1, 2, 4, 8, 16, 32
LOG_BLOCK = 16  # where the log starts, in filesystem blocks

SUPERBLOCK = Superblock(
    block_size=4096,
    blocks_count=4096,
    realtime_blocks=0,
    uuid=UUID,
    log_start=LOG_BLOCK,
    group_blocks=4096,
    group_count=1,
    log_blocks=512,
    version=0xB4A5,
    sector_size=512,
    label=b"",
    block_log=12,
    group_log=12,
    in_progress=0,
    free_blocks=0,
    features2=0,
    ro_compat=0,
    incompat=0,
    log_incompat=0,
    metadata_uuid=UUID,
)


class LogWriter:
    """Writes a log as the kernel does, basic block by basic block."""

    def __init__(self, superblock: Superblock = SUPERBLOCK, record_size: int = 32 << 10) -> None:
        self.superblock = superblock
        self.record_size = record_size
        self.version = 2 if superblock.has_log_version_2 else 1
        self.length = superblock.log_blocks * 8
        self.blocks = [bytes(512)] * self.length
        self.head, self.cycle = 0, 1
        self.tail = 1 << 32
        self.newest: list[int] = []
        self.record([unmount()])
        self.set_tail()

    def record(self, operations: Sequence[Operation], *, torn: bool = False) -> None:
        """``torn``: with a wrong checksum."""
        payload = b"".join(map(encoded, operations))
        payload += bytes(-len(payload) % 512)
        raw = self._record(payload, len(operations))
        if torn:
            raw[-1] = raw[-1][:-1] + b"\x77"
        self.newest = [(self.head + n) % self.length for n in range(len(raw))]
        for place, block in zip(self.newest, raw, strict=True):
            self.blocks[place] = block
        self.cycle += self.head + len(raw) >= self.length
        self.head = (self.head + len(raw)) % self.length

    def set_tail(self) -> None:
        """All that was logged is on the disk."""
        self.tail = self.cycle << 32 | self.head

    def open(self) -> Log:
        return Log(self.source(), self.superblock)

    def source(self) -> MemorySource:
        return MemorySource(bytes(LOG_BLOCK * 4096) + b"".join(self.blocks))

    def _record(self, payload: bytes, operations: int) -> list[bytes]:
        wide = self.version == 2 and self.record_size > 32 << 10
        count = self.record_size >> 15 if wide else 1
        words = [payload[at : at + 4] for at in range(0, len(payload), 512)]
        total = count + len(words)
        cycles = [self.cycle + (self.head + n >= self.length) for n in range(total)]
        data = [
            struct.pack(">I", cycle) + payload[n * 512 + 4 : n * 512 + 512]
            for n, cycle in enumerate(cycles[count:])
        ]
        extensions = [
            (struct.pack(">I", cycles[n]) + b"".join(words[n * 64 : n * 64 + 64])).ljust(512, b"\0")
            for n in range(1, count)
        ]
        first = self._header(len(payload), operations, words[:64], 0)
        covered = -(-len(payload) // (32 << 10)) if self.version == 2 else 1
        register = crc32c(0xFFFFFFFF, first[:328])
        for extension in extensions[: max(covered - 1, 0)]:
            register = crc32c(register, extension[:260])
        checksum = crc32c(register, b"".join(data)) ^ 0xFFFFFFFF
        return [self._header(len(payload), operations, words[:64], checksum), *extensions, *data]

    def _header(self, length: int, operations: int, words: list[bytes], checksum: int) -> bytes:
        fields = struct.pack(
            ">4I2Q",
            0xFEEDBABE,
            self.cycle,
            self.version,
            length,
            self.cycle << 32 | self.head,
            self.tail,
        )
        fields += struct.pack("<I", checksum) + struct.pack(">2I", 0, operations)
        fields += b"".join(words).ljust(256, b"\0")
        fields += struct.pack(">I", 1) + UUID
        fields += struct.pack(">I", self.record_size if self.version == 2 else 0)
        return fields.ljust(512, b"\0")


def encoded(operation: Operation) -> bytes:
    number, client, flags, data = operation
    return struct.pack(">IIBBxx", number, len(data), client, flags) + data


def unmount() -> Operation:
    return Operation(0xB0C0D0D0, 0xAA, UNMOUNT, b"nU\0\0\0\0\0\0")


def transaction(number: int, *items: list[bytes]) -> list[Operation]:
    """A committed one of items, each of its regions."""
    header = struct.pack("<4sIII", b"NART", 40, 0, len(items))
    regions = [header, *(region for item in items for region in item)]
    return [
        Operation(number, CLIENT, START, b""),
        *(Operation(number, CLIENT, 0, region) for region in regions),
        Operation(number, CLIENT, COMMIT, b""),
    ]


def buffer(block: int, chunks: dict[int, bytes], *, flags: int = 5 << 11) -> list[bytes]:
    """A logged buffer of 8 basic blocks; of an AGF unless told."""
    bits = sum(1 << number for number in chunks)
    count = 1 + len(chunks)
    form = struct.pack("<HHHHqIQ", 0x123C, count, flags, 8, block, 2, bits)
    return [form, *chunks.values()]


def cancel(block: int) -> list[bytes]:
    return buffer(block, {}, flags=2)


def chunk(letter: str) -> bytes:
    return letter.encode() * 128


LAP = 160  # blocks of a log that is written around in little time; version 1 looks at less at once
V1 = replace(SUPERBLOCK, version=0xB0A4)
V2_WITHOUT_CHECKSUMS = replace(SUPERBLOCK, version=0xB4A4)


@pytest.mark.parametrize(
    ("superblock", "record_size"),
    [
        (V1, 32 << 10),
        (V2_WITHOUT_CHECKSUMS, 64 << 10),
        (SUPERBLOCK, 32 << 10),
        (SUPERBLOCK, 256 << 10),
    ],
)
def test_head_and_records_on_every_lap(superblock: Superblock, record_size: int) -> None:
    chance = random.Random(record_size)
    writer = LogWriter(replace(superblock, log_blocks=LAP), record_size)
    since_tail: list[Operation] = []
    for step in range(60):
        size = chance.randrange(1, record_size - 4000)
        operations = [Operation(step, CLIENT, 0, chance.randbytes(size))]
        writer.record(operations)
        since_tail += operations
        log = writer.open()
        assert not log.is_clean
        assert log.sequence == writer.cycle << 32 | writer.head
        found = list(log.operations())
        assert found == since_tail
        if len(since_tail) == (2 if record_size == 256 << 10 else 6):
            writer.set_tail()
            since_tail = []
        if step % 20 == 19:
            writer.record([unmount()])
            assert writer.open().is_clean
            writer.set_tail()
            since_tail = []
    assert writer.cycle > 1


def test_a_fresh_log_is_clean() -> None:
    assert LogWriter().open().is_clean


def test_a_zeroed_log_is_a_doubt() -> None:
    writer = LogWriter()
    writer.blocks = [bytes(512)] * writer.length
    with pytest.raises(NotRecognized, match="zeroed"):
        writer.open()


@pytest.mark.parametrize("missing", [(1,), (5, 6), (20,), (30, 31)])
@pytest.mark.parametrize("before", [3, 118, 119, 120, 121, 130])
def test_a_hole_in_the_newest_record_ends_the_log_before_it(
    before: int, missing: tuple[int, ...]
) -> None:
    """On the first lap, across the end, and on the second."""
    writer = LogWriter()
    for step in range(before):
        writer.record([Operation(step, CLIENT, 0, bytes([step]) * 16_000)])
        writer.set_tail()
    writer.record([Operation(900, CLIENT, 0, b"whole" * 100)])
    expected = writer.cycle << 32 | writer.head
    old = list(writer.blocks)
    writer.record([Operation(901, CLIENT, 0, b"h" * 16_000)])
    for number in missing:
        place = writer.newest[number]
        writer.blocks[place] = old[place]
    log = writer.open()
    assert log.sequence == expected
    assert [operation.transaction for operation in log.operations()] == [900]


def test_torn_records_at_the_end_are_left_out() -> None:
    writer = LogWriter()
    for step in range(20):
        writer.record([Operation(step, CLIENT, 0, b"x" * 700)], torn=step >= 15)
    assert [operation.transaction for operation in writer.open().operations()][-1] == 14


def test_torn_records_further_back_are_a_doubt() -> None:
    writer = LogWriter()
    for step in range(20):
        writer.record([Operation(step, CLIENT, 0, b"x" * 700)], torn=step == 8)
    with pytest.raises(NotRecognized, match="checksum"):
        list(writer.open().operations())


def test_random_damage_is_an_error_of_ours() -> None:
    chance = random.Random(5)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        writer = LogWriter(V2_WITHOUT_CHECKSUMS if chance.random() < 0.5 else SUPERBLOCK)
        for step in range(6):
            writer.record(transaction(step, buffer(8, {step: chunk("a")}), cancel(16)))
        for _ in range(chance.choice((1, 3, 40))):
            place = chance.randrange(writer.head + 3)
            block = bytearray(writer.blocks[place])
            block[chance.randrange(chance.choice((16, 64, 512)))] = chance.randrange(256)
            writer.blocks[place] = bytes(block)
        try:
            recover(writer.open().operations(), SUPERBLOCK)
            outcomes["read"] += 1
        except ImagerError:
            outcomes["refused"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 0


# --- recovery -------------------------------------------------------------------------------------


def recovered(*operations: Operation) -> dict[Place, dict[int, bytes]]:
    return recover(operations, SUPERBLOCK).chunks


def test_later_copies_win_by_piece() -> None:
    first = transaction(1, buffer(8, {0: chunk("a"), 3: chunk("b")}))
    second = transaction(2, buffer(8, {3: chunk("c")}))
    overlay = recover([*first, *second], SUPERBLOCK)
    data = overlay.patch(Place(8, 8), b"-" * 4096)
    assert data == chunk("a") + b"-" * 256 + chunk("c") + b"-" * (4096 - 512)
    assert overlay.patch(Place(16, 8), data) is data
    assert overlay.touched == {Place(8, 8)}


def test_order_is_that_of_commits() -> None:
    one, other = (
        transaction(n, buffer(8, {0: chunk(letter)})) for n, letter in ((1, "a"), (2, "b"))
    )
    mixed = [one[0], *other, *one[1:]]
    assert recovered(*mixed) == {Place(8, 8): {0: chunk("a")}}


def test_uncommitted_and_older_than_the_tail_do_not_count() -> None:
    whole = transaction(1, buffer(8, {0: chunk("a")}))
    assert recovered(*whole[:-1]) == {}
    assert recovered(*whole[1:]) == {}


def test_cancelled_buffers_are_left_out_until_they_are_used_again() -> None:
    first = transaction(1, buffer(8, {0: chunk("a")}))
    second = transaction(2, cancel(8))
    third = transaction(3, buffer(8, {1: chunk("c")}))
    overlay = recover([*first, *second], SUPERBLOCK)
    assert (overlay.chunks, overlay.touched) == ({}, set())
    assert recovered(*first, *second, *third) == {Place(8, 8): {1: chunk("c")}}


def test_regions_cut_by_the_end_of_a_record() -> None:
    whole = transaction(1, buffer(8, {0: chunk("a"), 1: chunk("b")}))
    cut = []
    for operation in whole:
        data = operation.data
        if len(data) < 16:
            cut.append(operation)
            continue
        pieces = [data[:4], data[4:8], data[8:]]
        flags = (CONTINUES, CONTINUED | CONTINUES, CONTINUED | END)
        cut += [operation._replace(flags=f, data=d) for f, d in zip(flags, pieces, strict=True)]
    assert recovered(*cut) == recovered(*whole) != {}


def test_a_run_of_pieces_may_come_in_several_regions() -> None:
    form, *_ = buffer(8, {2: chunk("a"), 3: chunk("b"), 4: chunk("c")})
    item = [form[:2] + b"\3\0" + form[4:], chunk("a") + chunk("b"), chunk("c")]
    assert recovered(*transaction(1, item)) == {
        Place(8, 8): {2: chunk("a"), 3: chunk("b"), 4: chunk("c")}
    }


def test_inodes_quotas_and_new_inodes_are_touched() -> None:
    inode = struct.pack("<HHIHHIQ16xqii", 0x123B, 1, 1, 0, 0, 0, 99, 64, 32, 0)
    old_inode = struct.pack("<HHIHHQ16xqii", 0x123B, 1, 1, 0, 0, 99, 128, 16, 0)
    quota = struct.pack("<HHIqiI", 0x123D, 1, 0, 256, 1, 0)
    created = struct.pack("<HH", 0x123F, 1) + struct.pack(">6I", 0, 40, 64, 512, 8, 1)
    overlay = recover(transaction(1, [inode], [old_inode], [quota], [created]), SUPERBLOCK)
    assert overlay.touched == {Place(64, 32), Place(128, 16), Place(256, 8), Place(320, 64)}
    assert overlay.chunks == {}


@pytest.mark.parametrize("kind", [0x1236, 0x1237, 0x1240, 0x1242, 0x1244, 0x1246, 0x1248])
def test_intents_change_nothing_by_themselves(kind: int) -> None:
    overlay = recover(transaction(1, [struct.pack("<HHII", kind, 1, 0, 0)]), SUPERBLOCK)
    assert (overlay.chunks, overlay.touched) == ({}, set())


@pytest.mark.parametrize("kind", [0x1238, 0x124A, 0x1250, 0])
def test_unknown_changes_are_a_doubt(kind: int) -> None:
    with pytest.raises(UnsupportedError, match="unknown change"):
        recovered(*transaction(1, [struct.pack("<HHII", kind, 1, 0, 0)]))


@pytest.mark.parametrize(
    "item",
    [
        buffer(1 << 20, {0: chunk("a")}),
        buffer(-8, {0: chunk("a")}),
        buffer(8, {40: chunk("a")}),
        buffer(8, {0: b"short"}),
        buffer(8, {0: chunk("a") * 2}),
        [buffer(8, {0: chunk("a")})[0][:18], chunk("a")],
    ],
)
def test_damaged_buffers_are_refused(item: list[bytes]) -> None:
    with pytest.raises(NotRecognized):
        recovered(*transaction(1, item))


def test_memory_is_bounded() -> None:
    form = struct.pack("<HHHHqII", 0x123C, 120, 5 << 11, 8, 8, 1, 1)
    big = transaction(1, [form, *[bytes(1 << 20)] * 119])
    many = [Operation(number, CLIENT, START, b"") for number in range(200_000)]
    touching = [buffer(8 * n, {}, flags=0) for n in range(100)]
    for operations in (big, many):
        with pytest.raises(UnsupportedError, match="too much"):
            recovered(*operations)
    committed = [step for number in range(2000) for step in transaction(number, *touching)]
    assert recovered(*committed) == {Place(8 * n, 8): {} for n in range(100)}  # all let go


def test_random_changes_with_right_checksums_are_an_error_of_ours() -> None:
    chance = random.Random(6)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1000):
        operations = [
            *transaction(1, buffer(8, {n: chunk("a") for n in range(3)}), cancel(16)),
            *transaction(2, [struct.pack("<HHIHHIQ16xqii", 0x123B, 1, 1, 0, 0, 0, 99, 64, 32, 0)]),
            *transaction(3, [struct.pack("<HHIqiI", 0x123D, 1, 0, 256, 1, 0)]),
        ]
        for _ in range(chance.choice((1, 2, 5))):
            at = chance.randrange(len(operations))
            operations[at] = _changed(operations[at], chance)
        try:
            recovered(*operations)
            outcomes["read"] += 1
        except ImagerError:
            outcomes["refused"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 50


def _changed(operation: Operation, chance: random.Random) -> Operation:
    kind = chance.randrange(5)
    if kind == 0:
        return operation._replace(flags=chance.randrange(64))
    if kind == 1:
        return operation._replace(transaction=chance.randrange(4))
    if kind == 2:
        return operation._replace(data=operation.data[: chance.randrange(30)])
    data = bytearray(operation.data or b"xxxx")
    for _ in range(chance.choice((1, 4))):
        data[chance.randrange(min(len(data), 24))] = chance.choice((0, 1, 0xFF, 0x7F))
    return operation._replace(data=bytes(data))
