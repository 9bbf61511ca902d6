"""Packs: files of many compressed records (`docs/format.md`, "Packs")."""

from __future__ import annotations

import secrets
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from types import TracebackType
from typing import NamedTuple, Self

import zstandard

from imager.errors import FormatError, ImagerError, IntegrityError, ObjectMissing
from imager.format import (
    HEADER_LENGTH,
    NO_DIGEST,
    PACK_ID_SIZE,
    RECORD_HEADER_LENGTH,
    TRAILER_LENGTH,
    Entry,
    PackHeader,
    PackKind,
    Place,
    RecordKind,
    Trailer,
    crc32,
    decode_table,
    digest_of,
    encode_record_header,
    encode_table,
    record_offsets,
    table_digest,
    table_length,
)
from imager.moved import moved_name, read_moved
from imager.store import ReadStore, WriteStore

# Large enough for a disk or an object store to stream, small enough to send again.
PACK_TARGET_SIZE = 64 << 20

# Blocks that compress to nearly nothing would make packs with huge tables.
_PACK_MAX_RECORDS = 1 << 13


def pack_name(pack_id: bytes) -> str:
    text = pack_id.hex()
    return f"packs/{text[:2]}/{text}.pack"


class Record(NamedTuple):
    """A compressed record, ready to be stored."""

    entry: Entry
    frame: bytes


class Encoder:
    """Compresses records. Not shared between threads."""

    def __init__(self, level: int, content_size: int) -> None:
        """``content_size``: what records have at most, in bytes."""
        self._compressor = zstandard.ZstdCompressor(
            compression_params=_parameters(level, content_size)
        )

    def encode(
        self, kind: RecordKind, digest: bytes, content: bytes | bytearray | memoryview
    ) -> Record:
        frame = self._compressor.compress(content)
        return Record(Entry(digest, len(content), len(frame), crc32(frame), kind), frame)


def _parameters(level: int, content_size: int) -> zstandard.ZstdCompressionParameters:
    """zstd's own for the level, but for level 1 a hash table of 128 KiB instead of 64: a core's
    second-level cache holds it, packs get 0.4 % smaller, and it is no slower."""
    tuned = {"hash_log": 15, "min_match": 6} if level == 1 else {}
    return zstandard.ZstdCompressionParameters.from_level(
        level, source_size=content_size, write_content_size=True, write_checksum=False, **tuned
    )


class Decoder:
    """Decompresses and checks records. Not shared between threads."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()

    def decode_into(
        self, entry: Entry, frame: bytes | memoryview, target: memoryview, *, check_crc: bool
    ) -> None:
        """Decode to exactly ``target`` and compare the digest.

        Raises IntegrityError; ``target`` holds garbage then. ``check_crc`` also vouches for bits
        of the frame that do not influence its content.
        """
        if entry.content_length != len(target):
            raise IntegrityError(f"holds {entry.content_length} bytes instead of {len(target)}")
        if check_crc and crc32(frame) != entry.frame_crc:
            raise IntegrityError("the stored bytes do not match their checksum")
        try:
            with self._decompressor.stream_reader(frame, read_size=len(frame)) as reader:
                count = reader.readinto(target)
                rest = reader.read(1)
        except (zstandard.ZstdError, MemoryError) as error:
            raise IntegrityError(f"cannot be decompressed: {error}") from None
        if count != len(target) or rest:
            raise IntegrityError("decompresses to another length")
        if digest_of(target) != entry.digest:
            raise IntegrityError("the content does not match its digest")

    def decode(self, entry: Entry, frame: bytes | memoryview) -> bytes:
        target = bytearray(entry.content_length)
        self.decode_into(entry, frame, memoryview(target), check_crc=True)
        return bytes(target)


# A pack that was moved to one that was moved, and so on; more than this is a lie.
_MAX_MOVES = 64


class Pack:
    """A pack to read from: its table is checked on opening, its records when they are decoded.

    One that was compacted, before or after it was opened, is read from where its records are now;
    those that are gone have no frame (``is_gone``). Raises ObjectMissing, FormatError or
    UnsupportedError, each naming the pack.
    """

    def __init__(self, store: ReadStore, pack_id: bytes, *, moves: int = 0) -> None:
        """``moves``: how many packs led to this one."""
        self.id = pack_id
        self.name = pack_name(pack_id)
        self._store = store
        self._moves = moves
        self._elsewhere: dict[int, tuple[Pack, int]] | None = None
        try:
            self.length = store.size(self.name)
            self.kind, self.entries = self._read_table()
        except ObjectMissing as missing:
            self._elsewhere, records = self._follow(missing)
            self.kind, self.entries = _moved_table(self._elsewhere, records)
            self.length = record_offsets(self.entries)[-1] + table_length(records) + TRAILER_LENGTH
        except FormatError as error:
            raise FormatError(f"{store.url}/{self.name}: {error.message}") from None
        self.offsets: array[int] = record_offsets(self.entries)

    @property
    def is_moved(self) -> bool:
        return self._elsewhere is not None

    def is_gone(self, ordinal: int) -> bool:
        return not self.entries[ordinal].frame_length

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of all objects that it is read from."""
        if self._elsewhere is None:
            return (self.name,)
        below = {pack.id: pack for pack, _ in self._elsewhere.values()}
        return (moved_name(self.id), *(name for pack in below.values() for name in pack.objects))

    def read(self, first: int, count: int) -> bytes:
        """The bytes of ``count`` neighbouring records, from the first one's header on."""
        if self._elsewhere is None:
            try:
                return self._read_here(first, count)
            except ObjectMissing as missing:
                self._elsewhere, _ = self._follow(missing)
        return self._read_elsewhere(self._elsewhere, first, count)

    def _read_here(self, first: int, count: int) -> bytes:
        start = self.offsets[first]
        length = self.offsets[first + count] - start
        content = self._store.read(self.name, start, length)
        if len(content) != length:
            raise IntegrityError(f"{self._store.url}/{self.name} is truncated")
        return content

    def _follow(self, missing: ObjectMissing) -> tuple[dict[int, tuple[Pack, int]], int]:
        """Where each record is now that the pack is missing, and how many it had."""
        where = f"{self._store.url}/{moved_name(self.id)}"
        if self._moves >= _MAX_MOVES:
            raise FormatError(f"{where}: packs that were moved go round in a circle")
        try:
            moved = read_moved(self._store, self.id)
        except ObjectMissing:
            raise missing from None
        packs = {
            pack: Pack(self._store, pack, moves=self._moves + 1) for pack in sorted(moved.targets())
        }
        found = {}
        for n, (pack_id, ordinal) in moved.places():
            pack = packs[pack_id]
            if ordinal >= len(pack.entries):
                raise FormatError(f"{where}: {pack.name} has no record {ordinal}")
            if not pack.is_gone(ordinal):  # since that was moved too
                found[n] = pack, ordinal
        if not found or len({pack.kind for pack in packs.values()}) != 1:
            raise FormatError(f"{where}: it leads nowhere, or to packs of two kinds")
        return found, moved.records

    def _read_elsewhere(
        self, elsewhere: dict[int, tuple[Pack, int]], first: int, count: int
    ) -> bytes:
        """As if they still lay here; zeros for what is gone."""
        parts: list[bytes | memoryview] = []
        for ordinal in range(first, first + count):
            entry = self.entries[ordinal]
            parts.append(encode_record_header(ordinal, entry))
            pack, there = elsewhere.get(ordinal, (None, 0))
            if pack is None:
                parts.append(bytes(entry.frame_length))
            elif pack.entries[there] != entry:
                raise IntegrityError(f"{self._store.url}/{self.name}: record {ordinal} is lost")
            else:
                parts.append(pack.frame(pack.read(there, 1), there, there))
        return b"".join(parts)

    def frame(self, content: bytes | memoryview, first: int, ordinal: int) -> memoryview:
        """One record's zstd frame within what ``read(first, …)`` returned."""
        start = self.offsets[ordinal] - self.offsets[first] + RECORD_HEADER_LENGTH
        return memoryview(content)[start : start + self.entries[ordinal].frame_length]

    def header_is_right(self, content: bytes | memoryview, first: int, ordinal: int) -> bool:
        """Whether the record's header is byte for byte what the table says."""
        start = self.offsets[ordinal] - self.offsets[first]
        header = memoryview(content)[start : start + RECORD_HEADER_LENGTH]
        return header.tobytes() == encode_record_header(ordinal, self.entries[ordinal])

    def _read_table(self) -> tuple[PackKind, list[Entry]]:
        if self.length < HEADER_LENGTH + TRAILER_LENGTH:
            raise FormatError("truncated")
        header = self._store.read(self.name, 0, HEADER_LENGTH)
        decoded = PackHeader.decode(header)
        if decoded.id != self.id:
            raise FormatError("it holds another pack: its header names " + decoded.id.hex())
        end = self._store.read(self.name, self.length - TRAILER_LENGTH, TRAILER_LENGTH)
        trailer = Trailer.decode(end, self.length)
        table = self._store.read(self.name, trailer.table_offset, table_length(trailer.records))
        if table_digest(header, table) != trailer.digest:
            raise FormatError("its table is damaged")
        entries = decode_table(table)
        if record_offsets(entries)[-1] != trailer.table_offset:
            raise FormatError("its records do not fit its length")
        return decoded.kind, entries


def _moved_table(
    elsewhere: dict[int, tuple[Pack, int]], records: int
) -> tuple[PackKind, list[Entry]]:
    """The table that a moved pack had, as far as its records are still there."""
    kind = next(pack.kind for pack, _ in elsewhere.values())
    gone = Entry(NO_DIGEST, 0, 0, 0, _KIND_WITHIN[kind])
    entries = [gone] * records
    for ordinal, (pack, there) in elsewhere.items():
        entries[ordinal] = pack.entries[there]
    return kind, entries


_KIND_WITHIN = {PackKind.DATA: RecordKind.BLOCK, PackKind.MAP: RecordKind.PAGE}


class PackWriter:
    """One pack under construction."""

    def __init__(self, store: WriteStore, kind: PackKind, number: int) -> None:
        self.id = secrets.token_bytes(PACK_ID_SIZE)
        self.length = 0
        self._is_whole = True  # false while a record is being written
        self._entries: list[Entry] = []
        self._header = PackHeader(kind, self.id, number).encode()
        self._stack = ExitStack()
        self._writer = self._stack.enter_context(store.writer(pack_name(self.id)))
        self._write(self._header)

    def close(self) -> None:
        """Free its memory; what was not finished is discarded."""
        self._stack.close()

    def append(self, record: Record) -> Place:
        ordinal = len(self._entries)
        self._is_whole = False
        self._write(encode_record_header(ordinal, record.entry))
        self._write(record.frame)
        self._entries.append(record.entry)
        self._is_whole = True
        return Place(self.id, ordinal)

    def finish(self) -> None:
        """Write table and trailer, and make the pack appear, durably.

        Raises ImagerError when an interrupt or an error cut a record short.
        """
        if not self._is_whole:
            raise ImagerError(f"pack {self.id.hex()} ends within a record")
        table = encode_table(self._entries)
        trailer = Trailer(self.length, len(self._entries), table_digest(self._header, table))
        self._write(table)
        self._write(trailer.encode())
        self._writer.commit()

    def _write(self, content: bytes) -> None:
        self._writer.write(content)
        self.length += len(content)


class Packer:
    """Fills packs one after the other, and makes full ones durable in the background.

    A context manager: leaving it with an error keeps what was appended so far as a pack, so that
    the next capture finds it; only a store that fails loses the unfinished pack.
    """

    def __init__(
        self, store: WriteStore, kind: PackKind, *, target_size: int = PACK_TARGET_SIZE
    ) -> None:
        self._store = store
        self._kind = kind
        self._target_size = target_size
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finisher")
        self._finishing: Future[None] | None = None
        self._current: PackWriter | None = None
        self._number = 0
        self.bytes_written = 0
        self.bytes_begun = 0
        """Of all records so far, whether or not their packs are complete."""
        self.pack_ids: set[bytes] = set()

    def __enter__(self) -> Self:
        return self

    def append(self, record: Record) -> Place:
        if self._current is None:
            self._current = PackWriter(self._store, self._kind, self._number)
            self._number += 1
            self.pack_ids.add(self._current.id)
        place = self._current.append(record)
        self.bytes_begun += len(record.frame)
        if self._current.length >= self._target_size or place.ordinal + 1 >= _PACK_MAX_RECORDS:
            self._finish_current()
        return place

    def finish(self) -> None:
        """Returns when everything appended is durable."""
        self._finish_current()
        self._await_finishing()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                with suppress(ImagerError):
                    self.finish()
            else:
                self.finish()
        finally:
            self._finisher.shutdown()
            if self._current is not None:
                self._current.close()

    def _finish_current(self) -> None:
        self._await_finishing()
        if self._current is not None:
            current, self._current = self._current, None
            self._finishing = self._finisher.submit(self._finish, current)

    def _finish(self, pack: PackWriter) -> None:
        with closing(pack):
            pack.finish()
        self.bytes_written += pack.length

    def _await_finishing(self) -> None:
        if self._finishing is not None:
            finishing, self._finishing = self._finishing, None
            finishing.result()
