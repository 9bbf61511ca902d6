"""The format's structures one by one: round trips, and refusals of all that does not follow it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager.errors import FormatError, UnsupportedError
from imager.format import (
    FANOUT,
    HEADER_LENGTH,
    MAX_RECORDS,
    NO_DIGEST,
    Entry,
    PackHeader,
    PackKind,
    Page,
    Place,
    RecordKind,
    State,
    Trailer,
    decode_record_header,
    decode_table,
    digest_of,
    encode_record_header,
    encode_table,
    map_height,
    page_entries,
    record_offsets,
    root_digest,
    seal,
    serialize,
    table_length,
    unseal,
)
from imager.manifest import Manifest

HEADER = PackHeader(PackKind.DATA, bytes(range(16)), 7)
ENTRY = Entry(bytes(range(32)), 65536, 4321, 0xDEADBEEF, RecordKind.BLOCK)
ENTRIES = [ENTRY, ENTRY._replace(content_length=1, frame_length=10, kind=RecordKind.PAGE)]
TABLE_OFFSET = record_offsets(ENTRIES)[-1]
TRAILER = Trailer(TABLE_OFFSET, 2, bytes(range(32, 64)))
PACK_LENGTH = TABLE_OFFSET + table_length(2) + 80
PAGE = Page(
    0,
    bytes([State.DATA, State.ZERO, State.UNREADABLE, State.UNUSED, State.DATA]),
    (bytes([1] * 32), NO_DIGEST, bytes([2] * 32), NO_DIGEST, bytes([3] * 32)),
    (Place(b"A" * 16, 5), None, Place(b"B" * 16, 0), None, Place(b"A" * 16, 0xFFFFFFFF)),
)


def decode_trailer(content: bytes) -> Trailer:
    return Trailer.decode(content, PACK_LENGTH)


STRUCTURES: dict[str, tuple[bytes, Callable[[bytes], object], object]] = {
    "header": (HEADER.encode(), PackHeader.decode, HEADER),
    "record": (encode_record_header(3, ENTRY), decode_record_header, (3, ENTRY)),
    "table": (encode_table(ENTRIES), decode_table, ENTRIES),
    "trailer": (TRAILER.encode(), decode_trailer, TRAILER),
    "page": (PAGE.encode(), Page.decode, PAGE),
}
every_structure = pytest.mark.parametrize("name", STRUCTURES)


@every_structure
def test_round_trip(name: str) -> None:
    content, decode, value = STRUCTURES[name]
    assert decode(content) == value


@every_structure
def test_every_other_length_is_refused(name: str) -> None:
    content, decode, _ = STRUCTURES[name]
    for length in range(8 if name == "table" else 0, len(content)):
        with pytest.raises(FormatError):
            decode(content[:length])
    with pytest.raises(FormatError):
        decode(content + b"\0")


@pytest.mark.parametrize("name", ["header", "record", "trailer"])
def test_every_flipped_bit_is_refused(name: str) -> None:
    content, decode, _ = STRUCTURES[name]
    for bit in range(8 * len(content)):
        with pytest.raises(FormatError):
            decode(flipped(content, bit))


@pytest.mark.parametrize("name", ["table", "page"])
def test_flipped_bits_are_refused_or_give_another_value(name: str) -> None:
    """These have no checksum of their own; a digest elsewhere vouches for them."""
    content, decode, value = STRUCTURES[name]
    for bit in range(8 * len(content)):
        try:
            assert decode(flipped(content, bit)) != value
        except FormatError:
            continue


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def patched(content: bytes, at: int, kind: str, value: int) -> bytes:
    """With one field changed and, where the structure has one, the CRC made right again."""
    changed = bytearray(content)
    struct.pack_into(f"<{kind}", changed, at, value)
    struct.pack_into("<I", changed, len(changed) - 4, zlib.crc32(changed[:-4]))
    return bytes(changed)


# --- packs ------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_document() -> None:
    assert len(HEADER.encode()) == HEADER_LENGTH == 48
    assert len(encode_record_header(0, ENTRY)) == 72
    assert len(ENTRY.encode()) == 48
    assert len(TRAILER.encode()) == 80
    assert list(record_offsets(ENTRIES)) == [48, 48 + 72 + 4321, 48 + 72 + 4321 + 72 + 10]


def test_newer_pack_is_refused_by_its_version() -> None:
    with pytest.raises(UnsupportedError, match="format 2"):
        PackHeader.decode(patched(HEADER.encode(), 16, "H", 2))


def test_unknown_flags_of_a_pack_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="0x80"):
        PackHeader.decode(patched(HEADER.encode(), 20, "I", 0x80))


@pytest.mark.parametrize(
    ("at", "kind", "value"), [(0, "I", 0x184D2A51), (4, "I", 41), (18, "H", 3)]
)
def test_impossible_headers_are_refused(at: int, kind: str, value: int) -> None:
    with pytest.raises(FormatError):
        PackHeader.decode(patched(HEADER.encode(), at, kind, value))


@pytest.mark.parametrize(
    ("at", "kind", "value"),
    [
        (16, "Q", TABLE_OFFSET + 1),
        (16, "Q", (1 << 64) - 1),
        (24, "I", 0),
        (24, "I", 3),
        (24, "I", MAX_RECORDS + 1),
        (28, "I", 1),
        (64, "I", 1),
        (72, "I", 1),
    ],
)
def test_impossible_trailers_are_refused(at: int, kind: str, value: int) -> None:
    with pytest.raises(FormatError):
        decode_trailer(patched(TRAILER.encode(), at, kind, value))


def test_trailer_must_fit_its_file() -> None:
    for length in (0, 80, PACK_LENGTH - 1, PACK_LENGTH + 1):
        with pytest.raises(FormatError):
            Trailer.decode(TRAILER.encode(), length)


@pytest.mark.parametrize(
    "entry",
    [
        ENTRY._replace(content_length=0),
        ENTRY._replace(content_length=(16 << 20) + 1),
        ENTRY._replace(content_length=(64 << 10) + 1, kind=RecordKind.PAGE),
        ENTRY._replace(frame_length=0),
        ENTRY._replace(frame_length=0xFFFFFFFF),
    ],
)
def test_impossible_lengths_of_records_are_refused(entry: Entry) -> None:
    with pytest.raises(FormatError, match="lengths"):
        Entry.decode(entry.encode())


def test_unknown_kinds_of_records_are_refused() -> None:
    for at, value in ((44, 0), (44, 3), (45, 1), (47, 1)):
        changed = bytearray(ENTRY.encode())
        changed[at] = value
        with pytest.raises(FormatError, match="kind"):
            Entry.decode(bytes(changed))


# --- pages ------------------------------------------------------------------------------------

places = st.builds(
    Place, st.sampled_from([bytes([n] * 16) for n in range(5)]), st.integers(0, 0xFFFFFFFF)
)


@st.composite
def pages(draw: st.DrawFn) -> Page:
    level = draw(st.integers(0, 3))
    states = draw(st.lists(st.integers(0, 3 if level == 0 else 2), min_size=1, max_size=40))
    stored = [state in (State.DATA, State.UNREADABLE) for state in states]
    return Page(
        level,
        bytes(states),
        tuple(draw(st.binary(min_size=32, max_size=32)) if is_ else NO_DIGEST for is_ in stored),
        tuple(draw(places) if is_ else None for is_ in stored),
    )


@given(pages())
def test_pages_round_trip(page: Page) -> None:
    content = page.encode()
    assert Page.decode(content) == page
    assert page.content_digest() == digest_of(content[: 16 + 33 * len(page)])


@given(pages(), st.binary(min_size=16, max_size=16))
def test_content_digest_does_not_depend_on_places(page: Page, pack: bytes) -> None:
    moved = tuple(None if place is None else Place(pack, 1) for place in page.places)
    other = Page(page.level, page.states, page.digests, moved)
    assert other.content_digest() == page.content_digest()


def test_page_of_a_thousand_packs() -> None:
    count = FANOUT
    page = Page(
        0,
        bytes([State.DATA]) * count,
        tuple(n.to_bytes(32, "big") for n in range(count)),
        tuple(Place(n.to_bytes(16, "big"), n) for n in range(count)),
    )
    content = page.encode()
    assert len(content) == 16 + 33 * count + 4 + 16 * count + 6 * count < 64 << 10
    assert Page.decode(content) == page


def page_with(at: int, value: bytes) -> bytes:
    content = PAGE.encode()
    return content[:at] + value + content[at + len(value) :]


STATES_AT, DIGESTS_AT, PACKS_AT = 16, 16 + 5, 16 + 33 * 5
NUMBERS_AT = PACKS_AT + 4 + 2 * 16
ORDINALS_AT = NUMBERS_AT + 2 * 5


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(8, b"\1", id="unreadable above level 0"),
        pytest.param(9, b"\1", id="padding"),
        pytest.param(12, bytes(4), id="no entries"),
        pytest.param(12, struct.pack("<I", 1025), id="too many entries"),
        pytest.param(12, struct.pack("<I", 0xFFFFFFFF), id="far too many entries"),
        pytest.param(STATES_AT, b"\4", id="unknown state"),
        pytest.param(STATES_AT, b"\0", id="a place for zeros"),
        pytest.param(STATES_AT + 1, b"\1", id="data without a place"),
        pytest.param(DIGESTS_AT + 32, b"\1", id="a digest for zeros"),
        pytest.param(PACKS_AT, struct.pack("<I", 3), id="too many packs"),
        pytest.param(PACKS_AT, struct.pack("<I", 0xFFFFFFFF), id="far too many packs"),
        pytest.param(NUMBERS_AT, struct.pack("<H", 2), id="a pack that is not listed"),
        pytest.param(ORDINALS_AT + 4, struct.pack("<I", 1), id="an ordinal for zeros"),
    ],
)
def test_impossible_pages_are_refused(at: int, value: bytes) -> None:
    with pytest.raises(FormatError):
        Page.decode(page_with(at, value))


@given(st.binary(max_size=300), st.integers(0, 250))
def test_page_of_foreign_bytes_is_an_error(noise: bytes, at: int) -> None:
    for content in (noise, b"IMGRPAGE" + noise, page_with(at, noise[: len(PAGE.encode()) - at])):
        try:
            Page.decode(content)
        except FormatError:
            continue


@given(st.integers(1, 1 << 45))
def test_height_is_the_least_that_suffices(blocks: int) -> None:
    height = map_height(blocks)
    assert FANOUT ** (height + 1) >= blocks
    assert height == 0 or FANOUT**height < blocks


@given(st.integers(1, 1 << 31), st.integers(0, 3))
def test_page_entries_add_up(blocks: int, level: int) -> None:
    below = -(-blocks // FANOUT**level)
    pages_there = -(-below // FANOUT)
    last = page_entries(blocks, level, pages_there - 1)
    assert 1 <= last <= FANOUT
    assert (pages_there - 1) * FANOUT + last == below


def test_root_digest_depends_on_all_it_vouches_for() -> None:
    roots = {
        root_digest(*arguments)
        for arguments in (
            (1 << 20, 65536, 0, NO_DIGEST),
            ((1 << 20) + 1, 65536, 0, NO_DIGEST),
            (1 << 20, 131072, 0, NO_DIGEST),
            (1 << 20, 65536, 1, NO_DIGEST),
            (1 << 20, 65536, 0, bytes([1] * 32)),
        )
    }
    assert len(roots) == 5


# --- sealed JSON ------------------------------------------------------------------------------

DOCUMENT = {"kind": "test", "format": 1, "features": [], "z": {"b": [1, 2], "a": None}, "ü": "é\n"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abü", max_size=3), inner),
    max_leaves=12,
)


@given(json_values)
def test_sealed_documents_round_trip(value: Any) -> None:
    document = {**DOCUMENT, "value": value}
    found = unseal(seal(document), "it")
    assert found.pop("seal")
    assert found == document


def test_every_flipped_bit_of_a_document_is_refused() -> None:
    content = seal(DOCUMENT)
    for bit in range(8 * len(content)):
        with pytest.raises((FormatError, UnsupportedError)):
            unseal(flipped(content, bit), "it")


def test_every_truncation_of_a_document_is_refused() -> None:
    content = seal(DOCUMENT)
    for length in range(len(content)):
        with pytest.raises(FormatError):
            unseal(content[:length], "it")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(serialize(DOCUMENT), id="no seal"),
        pytest.param(seal(DOCUMENT) + b"\n", id="another line"),
        pytest.param(seal(DOCUMENT).replace(b"\n", b"\r\n"), id="other line ends"),
        pytest.param(seal(DOCUMENT).replace(b"{\n", b'{\n "kind": "test",\n', 1), id="key twice"),
        pytest.param(b"[" * 100_000, id="deeply nested"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b'{"format": ' + b"9" * 5000 + b"}", id="a huge number"),
        pytest.param(b'{"features": [], "format": 1, "seal": "\\ud800"}', id="a lone surrogate"),
        pytest.param(seal({**DOCUMENT, "features": None}), id="no features"),
        pytest.param(seal({**DOCUMENT, "format": "1"}), id="version as text"),
    ],
)
def test_what_is_no_sealed_document_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError, match="it "):
        unseal(content, "it")


def test_newer_documents_are_refused_by_version() -> None:
    with pytest.raises(UnsupportedError, match="format 2"):
        unseal(seal({**DOCUMENT, "format": 2}), "it")


def test_unknown_features_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="encryption, tape"):
        unseal(seal({**DOCUMENT, "features": ["encryption", "tape"]}), "it")


def test_newer_document_is_refused_as_newer_even_if_it_is_sealed_in_another_way() -> None:
    with pytest.raises(UnsupportedError, match="format 2"):
        unseal(b'{"format": 2, "features": []}', "it")


# --- manifests --------------------------------------------------------------------------------

DISK = {
    "name": "sda",
    "size": 100_000,
    "height": 0,
    "top": {"pack": "ab" * 16, "ordinal": 0},
    "root": "cd" * 32,
}
MANIFEST = {
    "kind": "image",
    "format": 1,
    "features": [],
    "id": "20240229t235959z-0123abcd",
    "block_size": 65536,
    "disks": [DISK],
}


def test_least_manifest_is_enough() -> None:
    manifest = Manifest.from_document(MANIFEST, "it")
    (disk,) = manifest.disks
    assert (disk.blocks, disk.logical_sector, disk.top) == (2, 512, Place(b"\xab" * 16, 0))
    assert (manifest.name, manifest.partial, list(disk.unreadable)) == ("", False, [])


@pytest.mark.parametrize("key", ["kind", "id", "block_size", "disks"])
def test_manifest_without_a_needed_key_is_refused(key: str) -> None:
    document = {name: value for name, value in MANIFEST.items() if name != key}
    with pytest.raises(FormatError, match="it: "):
        Manifest.from_document(document, "it")


@pytest.mark.parametrize("key", list(DISK))
@pytest.mark.parametrize("value", ["absent", None, -1, 1 << 70, "x", [], {}, {"pack": 1}])
def test_disk_with_an_impossible_value_is_refused(key: str, value: object) -> None:
    if key == "name" and value in ("absent", "x"):
        value = 7
    disk = {**DISK, key: value}
    if value == "absent":
        del disk[key]
    with pytest.raises(FormatError, match="it: "):
        Manifest.from_document({**MANIFEST, "disks": [disk]}, "it")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "session"),
        ("id", "20240229t235959z-0123ABCD"),
        ("id", "../../etc/passwd"),
        ("id", 7),
        ("block_size", 65537),
        ("block_size", 32768),
        ("block_size", 1 << 25),
        ("block_size", "65536"),
        ("disks", []),
        ("disks", [DISK, DISK]),
        ("disks", {"sda": DISK}),
        ("disks", 5),
    ],
)
def test_impossible_manifests_are_refused(key: str, value: object) -> None:
    with pytest.raises(FormatError, match="it: "):
        Manifest.from_document({**MANIFEST, key: value}, "it")


@pytest.mark.parametrize(
    "ranges", [{}, [1], [[0, 0]], [[-1, 5]], [[99_999, 2]], [[0, "1"]], [[0.0, 1]]]
)
def test_impossible_unreadable_ranges_are_refused(ranges: object) -> None:
    manifest = Manifest.from_document({**MANIFEST, "disks": [{**DISK, "unreadable": ranges}]}, "it")
    with pytest.raises(FormatError):
        _ = manifest.disks[0].unreadable
