"""Bytes of a repository's files to objects and back: `docs/format.md`, version 1. No I/O.

Every magic number, version, length and checksum is checked before anything is believed. Whatever
does not follow the document raises FormatError; a newer version or an unknown feature raises
UnsupportedError with its name.
"""

from __future__ import annotations

import json
import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from blake3 import blake3

try:  # the same CRC-32, ten times as fast; the rescue system does without
    from isal.isal_zlib import crc32 as crc32
except ImportError:
    from zlib import crc32 as crc32

from imager.errors import FormatError, UnsupportedError

VERSION = 1
FANOUT = 1024  # references in a page: 40 KiB a page, two levels reach 2^20 blocks
MIN_BLOCK_SIZE = 64 << 10  # below, a dictionary would be needed to compress well
MAX_BLOCK_SIZE = 4 << 20  # bounds the memory of a reader
MAX_PAGE_LENGTH = 64 << 10  # a page of 1024 entries from 1024 packs has 56 KiB
MAX_RECORDS = 1 << 16  # of a pack; its table has 3 MiB then
DIGEST_SIZE = 32
PACK_ID_SIZE = 16

NO_DIGEST = bytes(DIGEST_SIZE)
NO_PACK = 0xFFFF

_SKIPPABLE_HEADER, _SKIPPABLE_RECORD, _SKIPPABLE_TABLE, _SKIPPABLE_TRAILER = (
    0x184D2A50 + n for n in range(4)
)
_HEADER = struct.Struct("<II8sHHI16sI")
_RECORD = struct.Struct("<II4sI48sI")
_ENTRY = struct.Struct("<32sIIIB3s")
_FRAME = struct.Struct("<II")
_TRAILER = struct.Struct("<II8sQII32s12s")
_CRC = struct.Struct("<I")
_PAGE = struct.Struct("<8sB3sI")
_ROOT = struct.Struct("<16sQIII")

HEADER_LENGTH = _HEADER.size + _CRC.size
RECORD_HEADER_LENGTH = _RECORD.size + _CRC.size
ENTRY_LENGTH = _ENTRY.size
TRAILER_LENGTH = _TRAILER.size + _CRC.size

_IMAGE_ID = re.compile(r"\d{8}t\d{6}z-[0-9a-f]{8}\Z")
_PACK_ID = re.compile(r"[0-9a-f]{32}\Z")


class PackKind(IntEnum):
    DATA = 1
    MAP = 2


class RecordKind(IntEnum):
    BLOCK = 1
    PAGE = 2


class State(IntEnum):
    """What an image has at a block."""

    ZERO = 0
    DATA = 1
    UNUSED = 2
    UNREADABLE = 3


class Place(NamedTuple):
    """Where a record is: the id of its pack (16 bytes) and its ordinal there."""

    pack: bytes
    ordinal: int


def digest_of(content: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3-256, 32 bytes."""
    return blake3(content).digest()


# --- sealed JSON -------------------------------------------------------------------------------


def serialize(document: dict[str, Any]) -> bytes:
    """The one way in which a sealed document is written."""
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    return text.encode()


def seal(document: dict[str, Any]) -> bytes:
    """Serialise with a ``seal``: the digest of the document without it."""
    plain = {key: value for key, value in document.items() if key != "seal"}
    return serialize({**plain, "seal": digest_of(serialize(plain)).hex()})


def unseal(content: bytes, name: str) -> dict[str, Any]:
    """Parse and check a sealed document; ``name`` is for messages.

    Raises FormatError when a byte is not what was sealed, UnsupportedError for a newer format.
    """
    try:
        document = json.loads(content)
        is_object = isinstance(document, dict)
        same = is_object and seal(document) == content
    except (ValueError, RecursionError):
        raise FormatError(f"{name} is not valid JSON: it is damaged or truncated") from None
    if not is_object:
        raise FormatError(f"{name} is not a JSON object")
    check_supported(document, name)
    if not same:
        raise FormatError(f"{name} is damaged: its content does not match its seal")
    return dict(document)


def check_supported(document: dict[str, Any], name: str) -> None:
    """Raise UnsupportedError for a newer format or unknown features, FormatError for neither."""
    version, features = document.get("format"), document.get("features")
    if type(version) is not int or version < 1 or not isinstance(features, list):
        raise FormatError(f"{name} has no format version")
    hint = "use a newer version of imager"
    if version > VERSION:
        raise UnsupportedError(
            f"{name} has format {version}; this imager knows format {VERSION}", hint=hint
        )
    if features:
        names = ", ".join(str(feature) for feature in features)
        raise UnsupportedError(f"{name} needs features that are unknown here: {names}", hint=hint)


def is_image_id(text: str) -> bool:
    return _IMAGE_ID.match(text) is not None


def pack_id_bytes(text: object) -> bytes:
    """16 bytes of a pack id in hex; FormatError for anything else."""
    if not isinstance(text, str) or not _PACK_ID.match(text):
        raise FormatError(f"not a pack id: {text!r}")
    return bytes.fromhex(text)


def is_block_size(value: object) -> bool:
    return (
        isinstance(value, int)
        and MIN_BLOCK_SIZE <= value <= MAX_BLOCK_SIZE
        and value & (value - 1) == 0
    )


# --- packs -------------------------------------------------------------------------------------


class PackHeader(NamedTuple):
    kind: PackKind
    id: bytes
    number: int

    def encode(self) -> bytes:
        return _with_crc(
            _HEADER.pack(
                _SKIPPABLE_HEADER, 40, b"IMGRPACK", VERSION, self.kind, 0, self.id, self.number
            )
        )

    @classmethod
    def decode(cls, content: bytes) -> PackHeader:
        body = _checked(content, HEADER_LENGTH, "pack header")
        magic, length, name, version, kind, flags, pack_id, number = _HEADER.unpack(body)
        if (magic, length, name) != (_SKIPPABLE_HEADER, 40, b"IMGRPACK"):
            raise FormatError("pack header: not a pack")
        if version != VERSION or flags:
            raise UnsupportedError(
                f"pack has format {version}, feature flags {flags:#x}: unknown here",
                hint="use a newer version of imager",
            )
        if kind not in PackKind.__members__.values():
            raise FormatError(f"pack header: unknown kind {kind}")
        return cls(PackKind(kind), pack_id, number)


_RECORD_KINDS = {int(kind): kind for kind in RecordKind}


class Entry(NamedTuple):
    """A record's line in the table. Lengths in bytes."""

    digest: bytes
    content_length: int
    frame_length: int
    frame_crc: int
    kind: RecordKind

    def encode(self) -> bytes:
        return _ENTRY.pack(*self, bytes(3))

    @classmethod
    def decode(cls, content: bytes) -> Entry:
        return cls._from_fields(*_ENTRY.unpack(content))

    @classmethod
    def _from_fields(
        cls,
        digest: bytes,
        content_length: int,
        frame_length: int,
        crc: int,
        kind: int,
        rest: bytes,
    ) -> Entry:
        if kind not in (RecordKind.BLOCK, RecordKind.PAGE) or rest != bytes(3):
            raise FormatError(f"table entry: unknown kind {kind}")
        limit = MAX_BLOCK_SIZE if kind == RecordKind.BLOCK else MAX_PAGE_LENGTH
        # zstd never expands by more than this; a longer frame is a lie
        if not 0 < content_length <= limit or not 0 < frame_length <= content_length + 65536:
            raise FormatError(f"table entry: lengths {content_length}, {frame_length}")
        return cls(digest, content_length, frame_length, crc, _RECORD_KINDS[kind])


def encode_record_header(ordinal: int, entry: Entry) -> bytes:
    return _with_crc(_RECORD.pack(_SKIPPABLE_RECORD, 64, b"IREC", ordinal, entry.encode(), 0))


def decode_record_header(content: bytes) -> tuple[int, Entry]:
    """(ordinal, entry), to walk a pack that has lost its table."""
    body = _checked(content, RECORD_HEADER_LENGTH, "record header")
    magic, length, name, ordinal, entry, zero = _RECORD.unpack(body)
    if (magic, length, name, zero) != (_SKIPPABLE_RECORD, 64, b"IREC", 0):
        raise FormatError("record header: not a record")
    return ordinal, Entry.decode(entry)


def encode_table(entries: list[Entry]) -> bytes:
    body = b"".join(entry.encode() for entry in entries)
    return _FRAME.pack(_SKIPPABLE_TABLE, len(body)) + body


def decode_table(content: bytes) -> list[Entry]:
    magic, length = _FRAME.unpack_from(content)
    if magic != _SKIPPABLE_TABLE or length != len(content) - _FRAME.size or length % ENTRY_LENGTH:
        raise FormatError("pack table: wrong length")
    return [Entry._from_fields(*fields) for fields in _ENTRY.iter_unpack(content[_FRAME.size :])]


def table_length(records: int) -> int:
    """Bytes of the table of a pack with so many records."""
    return _FRAME.size + records * ENTRY_LENGTH


class Trailer(NamedTuple):
    table_offset: int
    records: int
    digest: bytes

    def encode(self) -> bytes:
        return _with_crc(
            _TRAILER.pack(
                _SKIPPABLE_TRAILER,
                72,
                b"IMGRTAIL",
                self.table_offset,
                self.records,
                0,
                self.digest,
                bytes(12),
            )
        )

    @classmethod
    def decode(cls, content: bytes, pack_length: int) -> Trailer:
        """``pack_length`` in bytes, of the whole file: the trailer must fit it."""
        body = _checked(content, TRAILER_LENGTH, "pack trailer")
        magic, length, name, table_offset, records, zero, digest, rest = _TRAILER.unpack(body)
        if (magic, length, name, zero, rest) != (
            _SKIPPABLE_TRAILER,
            72,
            b"IMGRTAIL",
            0,
            bytes(12),
        ):
            raise FormatError("pack trailer: not a trailer")
        if not 0 < records <= MAX_RECORDS:
            raise FormatError(f"pack trailer: {records} records")
        if table_offset + table_length(records) + TRAILER_LENGTH != pack_length:
            raise FormatError("pack trailer: it does not fit the length of the file")
        return cls(table_offset, records, digest)


def table_digest(header: bytes, table: bytes) -> bytes:
    """What the trailer says of the header and the table."""
    return digest_of(header + table)


def record_offsets(entries: list[Entry]) -> array[int]:
    """Offset of each record in its pack, and, as one more, that of the table."""
    offsets = array("Q", [HEADER_LENGTH])
    for entry in entries:
        offsets.append(offsets[-1] + RECORD_HEADER_LENGTH + entry.frame_length)
    return offsets


def _with_crc(body: bytes) -> bytes:
    return body + _CRC.pack(crc32(body))


def _checked(content: bytes, length: int, what: str) -> bytes:
    if len(content) != length:
        raise FormatError(f"{what}: truncated")
    body = content[: -_CRC.size]
    if crc32(body) != _CRC.unpack(content[-_CRC.size :])[0]:
        raise FormatError(f"{what}: damaged, its checksum does not match")
    return body


# --- block map ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Page:
    """Up to 1024 references, in columns. ``places`` is None for zero and unused entries."""

    level: int
    states: bytes
    digests: tuple[bytes, ...]
    places: tuple[Place | None, ...]

    def __len__(self) -> int:
        return len(self.states)

    def content_digest(self) -> bytes:
        """The Merkle digest: what the disk holds, wherever it is stored."""
        return digest_of(self._content())

    def _content(self) -> bytes:
        head = _PAGE.pack(b"IMGRPAGE", self.level, bytes(3), len(self.states))
        return head + self.states + b"".join(self.digests)

    def encode(self) -> bytes:
        numbers: dict[bytes, int] = {}
        packs, ordinals = array("H"), array("I")
        for place in self.places:
            if place is None:
                packs.append(NO_PACK)
                ordinals.append(0)
            else:
                packs.append(numbers.setdefault(place.pack, len(numbers)))
                ordinals.append(place.ordinal)
        return b"".join(
            (
                self._content(),
                _CRC.pack(len(numbers)),
                *numbers,
                _little_endian(packs).tobytes(),
                _little_endian(ordinals).tobytes(),
            )
        )

    @classmethod
    def decode(cls, content: bytes) -> Page:
        at = PageColumns.of(content)
        page = cls(
            at.level,
            content[at.states_at : at.digests_at],
            tuple(
                content[n : n + DIGEST_SIZE] for n in range(at.digests_at, at.packs_at, DIGEST_SIZE)
            ),
            tuple(
                _place(at.packs, number, ordinal)
                for number, ordinal in zip(at.numbers, at.ordinals, strict=True)
            ),
        )
        page._check()
        return page

    def _check(self) -> None:
        known = (0, 1, 2, 3) if self.level == 0 else (0, 1, 2)
        for state, digest, place in zip(self.states, self.digests, self.places, strict=True):
            if state not in known:
                raise FormatError(f"map page: state {state} at level {self.level}")
            if (state in (State.ZERO, State.UNUSED)) != (place is None):
                raise FormatError("map page: a place is missing, or one too many")
            if place is None and digest != NO_DIGEST:
                raise FormatError("map page: a digest without a place")


class PageColumns(NamedTuple):
    """Where a page refers to, without an object for each entry: ``numbers`` count in ``packs``."""

    level: int
    states_at: int
    digests_at: int
    packs_at: int
    packs: list[bytes]
    numbers: array[int]
    ordinals: array[int]

    @classmethod
    def of(cls, content: bytes) -> PageColumns:
        if len(content) < _PAGE.size:
            raise FormatError("map page: truncated")
        name, level, zero, count = _PAGE.unpack_from(content)
        if name != b"IMGRPAGE" or zero != bytes(3) or not 0 < count <= FANOUT:
            raise FormatError("map page: not a page")
        states_at = _PAGE.size
        digests_at = states_at + count
        packs_at = digests_at + DIGEST_SIZE * count
        if len(content) < packs_at + 4:
            raise FormatError("map page: truncated")
        (pack_count,) = _CRC.unpack_from(content, packs_at)
        numbers_at = packs_at + 4 + PACK_ID_SIZE * pack_count
        if pack_count > count or len(content) != numbers_at + 6 * count:
            raise FormatError("map page: wrong length")
        ids = [
            content[at : at + PACK_ID_SIZE] for at in range(packs_at + 4, numbers_at, PACK_ID_SIZE)
        ]
        numbers, ordinals = array("H"), array("I")
        numbers.frombytes(content[numbers_at : numbers_at + 2 * count])
        ordinals.frombytes(content[numbers_at + 2 * count :])
        return cls(
            level,
            states_at,
            digests_at,
            packs_at,
            ids,
            _little_endian(numbers),
            _little_endian(ordinals),
        )

    def places(self) -> Iterator[Place]:
        """Those that its entries refer to. Raises FormatError."""
        for number, ordinal in zip(self.numbers, self.ordinals, strict=True):
            if (place := _place(self.packs, number, ordinal)) is not None:
                yield place


def _place(ids: list[bytes], number: int, ordinal: int) -> Place | None:
    if number == NO_PACK:
        if ordinal:
            raise FormatError("map page: an ordinal without a pack")
        return None
    if number >= len(ids):
        raise FormatError("map page: a pack that it does not list")
    return Place(ids[number], ordinal)


def _little_endian(numbers: array[int]) -> array[int]:
    if struct.pack("=H", 1) != struct.pack("<H", 1):  # a big-endian machine
        numbers = numbers[:]
        numbers.byteswap()
    return numbers


def map_height(blocks: int) -> int:
    """Level of the top page for a disk of so many blocks."""
    height = 0
    while FANOUT ** (height + 1) < blocks:
        height += 1
    return height


def page_entries(blocks: int, level: int, index: int) -> int:
    """How many entries page ``index`` of ``level`` must have."""
    below = -(-blocks // FANOUT**level)
    return int(min(FANOUT, below - index * FANOUT))


def root_digest(size: int, block_size: int, height: int, top: bytes) -> bytes:
    """The one value that vouches for a disk of ``size`` bytes; ``top`` is a content digest."""
    name = b"imager disk v1\0\0"
    return digest_of(_ROOT.pack(name, size, block_size, FANOUT, height) + top)
