#!/usr/bin/env python3
"""A second reader of repositories, written from `docs/format.md` alone.

It shares no line with `imager` and imports only the standard library and `zstandard`, so the two
can disagree only where the document is wrong. It is strict: whatever the document says is checked.

    independent_reader.py REPO IMAGE [DISK] OUT.img       restore one disk
    independent_reader.py salvage PACK OUT.pack           rebuild a pack of which the end is lost

BLAKE3 is written here from its specification. `--no-digests` skips it for big images.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import zstandard

ZERO, DATA, UNUSED, UNREADABLE = range(4)
BLOCK, PAGE = 1, 2
FAN_OUT = 1024
NO_PACK = 65535
MAX_RECORDS = 4194304
MAX_PAGE_SIZE = 65536

PACK_HEADER = struct.Struct("<II8sHHI16sII")
RECORD_HEADER = struct.Struct("<II4sI48sII")
ENTRY = struct.Struct("<32sIIIB3s")
TRAILER = struct.Struct("<II8sQII32s12sI")


class BadFormat(Exception):
    """The repository does not follow the document."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadFormat(message)


# --- BLAKE3 ---------------------------------------------------------------------------------------
#
# Every chunk of the input is hashed on its own, so one Python integer holds the same 32-bit word of
# all chunks, each in a lane of 64 bits: additions carry into the upper half of the lane, which the
# mask then clears. A 64 KiB block is hashed in milliseconds instead of a fifth of a second.

IV = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
MIXES = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
CHUNK_SIZE = 1024

Words = list[int]


def compress(
    chaining: Words, block: Words, counter: int, length: int, flags: int, lanes: int
) -> Words:
    """The compression function in `lanes` lanes; the new chaining value."""
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * lanes, "little")
    mask = ones * 0xFFFFFFFF
    low, high = counter & mask, (counter >> 32) & mask
    v = [*chaining, *(word * ones for word in IV[:4]), low, high, length * ones, flags * ones]
    for round_number in range(7):
        if round_number:
            block = [block[i] for i in PERMUTATION]
        for n, (a, b, c, d) in enumerate(MIXES):
            va, vb, vc, vd = v[a], v[b], v[c], v[d]
            va = (va + vb + block[2 * n]) & mask
            vd ^= va
            vd = ((vd >> 16) | (vd << 16)) & mask
            vc = (vc + vd) & mask
            vb ^= vc
            vb = ((vb >> 12) | (vb << 20)) & mask
            va = (va + vb + block[2 * n + 1]) & mask
            vd ^= va
            vd = ((vd >> 8) | (vd << 24)) & mask
            vc = (vc + vd) & mask
            vb ^= vc
            vb = ((vb >> 7) | (vb << 25)) & mask
            v[a], v[b], v[c], v[d] = va, vb, vc, vd
    return [v[i] ^ v[i + 8] for i in range(8)]


def to_lanes(words: array[int]) -> int:
    return int.from_bytes(array("Q", words).tobytes(), "little")


def from_lanes(lanes: list[int], count: int) -> list[Words]:
    """One chaining value for each lane."""
    columns = [array("Q", word.to_bytes(8 * count, "little")) for word in lanes]
    return [[column[lane] for column in columns] for lane in range(count)]


def whole_chunks(data: memoryview) -> list[Words]:
    """The chaining values of chunks of exactly 1024 bytes, none of which is the root."""
    count = len(data) // CHUNK_SIZE
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * count, "little")
    words = array("I", data.tobytes())
    counter = to_lanes(array("I", range(count)))
    chaining = [word * ones for word in IV]
    for number in range(16):
        block = [to_lanes(words[number * 16 + i :: 256]) for i in range(16)]
        flags = (CHUNK_START if number == 0 else 0) | (CHUNK_END if number == 15 else 0)
        chaining = compress(chaining, block, counter, 64, flags, count)
    return from_lanes(chaining, count)


def one_chunk(data: memoryview, counter: int, final_flags: int) -> Words:
    blocks = max(1, -(-len(data) // 64))
    chaining = list(IV)
    for number in range(blocks):
        block = data[64 * number : 64 * number + 64].tobytes()
        flags = CHUNK_START if number == 0 else 0
        if number == blocks - 1:
            flags |= CHUNK_END | final_flags
        words = list(struct.unpack("<16I", block.ljust(64, b"\0")))
        chaining = compress(chaining, words, counter, len(block), flags, 1)
    return chaining


def blake3(content: bytes) -> bytes:
    """The digest of `content`, 32 bytes."""
    assert array("I").itemsize == 4 and sys.byteorder == "little"
    data = memoryview(content)
    if len(data) <= CHUNK_SIZE:
        return struct.pack("<8I", *one_chunk(data, 0, ROOT))
    whole = len(data) // CHUNK_SIZE * CHUNK_SIZE
    nodes = whole_chunks(data[:whole])
    if whole < len(data):
        nodes.append(one_chunk(data[whole:], len(nodes), 0))
    while len(nodes) > 1:
        nodes = merge_pairs(nodes)
    return struct.pack("<8I", *nodes[0])


def merge_pairs(nodes: list[Words]) -> list[Words]:
    """The level above: each pair becomes one node, an odd last node goes up as it is."""
    pairs = len(nodes) // 2
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * pairs, "little")
    block = [
        to_lanes(array("I", [nodes[2 * pair + side][i] for pair in range(pairs)]))
        for side in range(2)
        for i in range(8)
    ]
    flags = PARENT | (ROOT if len(nodes) == 2 else 0)
    above = from_lanes(compress([word * ones for word in IV], block, 0, 64, flags, pairs), pairs)
    return above + nodes[2 * pairs :]


# --- sealed JSON ----------------------------------------------------------------------------------


def serialise(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """A sealed document whose every byte was checked, with a version and features we know."""
    text = path.read_bytes()
    try:
        document: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise BadFormat(f"{path}: no JSON: {error}") from error
    require(isinstance(document, dict), f"{path}: not an object")
    require(serialise(document) == text, f"{path}: not in the canonical form")
    unsealed = {key: value for key, value in document.items() if key != "seal"}
    require(document.get("seal") == blake3(serialise(unsealed)).hex(), f"{path}: the seal differs")
    require(document.get("format") == 1, f"{path}: format {document.get('format')} is not 1")
    features = document.get("features")
    require(features == [], f"{path}: needs the features {features}")
    return document


# --- packs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What the table says about a record."""

    raw: bytes
    digest: bytes
    content_length: int
    frame_length: int
    frame_crc: int
    kind: int

    @classmethod
    def parse(cls, raw: bytes) -> Entry:
        *fields, zeros = ENTRY.unpack(raw)
        entry = cls(raw, *fields)
        require(zeros == bytes(3), "table entry: bytes 45 to 47 are not zero")
        require(entry.kind in (BLOCK, PAGE), f"table entry: kind {entry.kind}")
        require(entry.content_length >= 1, "table entry: no content")
        if entry.kind == PAGE:
            require(entry.content_length <= MAX_PAGE_SIZE, "table entry: the page is too long")
        return entry


def parse_header(raw: bytes, where: str) -> tuple[str, int]:
    """The id and the kind of a pack."""
    require(len(raw) == PACK_HEADER.size, f"{where}: shorter than a header")
    magic, length, name, version, kind, flags, pack_id, _, crc = PACK_HEADER.unpack(raw)
    require((magic, length, name) == (0x184D2A50, 40, b"IMGRPACK"), f"{where}: no pack")
    require(zlib.crc32(raw[:44]) == crc, f"{where}: the header's CRC differs")
    require(version == 1, f"{where}: version {version} is not 1")
    require(flags == 0, f"{where}: needs the feature flags {flags:#x}")
    require(kind in (1, 2), f"{where}: kind of pack {kind}")
    return pack_id.hex(), kind


def parse_record_header(raw: bytes, ordinal: int, where: str) -> Entry:
    require(len(raw) == RECORD_HEADER.size, f"{where}: shorter than a record header")
    magic, length, name, number, entry, zero, crc = RECORD_HEADER.unpack(raw)
    require((magic, length, name) == (0x184D2A51, 64, b"IREC"), f"{where}: no record")
    require(zlib.crc32(raw[:68]) == crc, f"{where}: the record header's CRC differs")
    require(number == ordinal and zero == 0, f"{where}: says that it is record {number}")
    return Entry.parse(entry)


class Pack:
    """An open pack whose header, table and trailer were checked."""

    def __init__(self, path: Path, pack_id: str, digests: bool) -> None:
        self.path, self.digests = path, digests
        require(path.is_file(), f"{path}: missing")
        self.file = path.open("rb")
        header = self.read(0, PACK_HEADER.size)
        found_id, self.kind = parse_header(header, str(path))
        require(found_id == pack_id, f"{path}: is the pack {found_id}")
        table = self.read_table(header)
        self.entries = [
            Entry.parse(table[at : at + ENTRY.size]) for at in range(8, len(table), ENTRY.size)
        ]
        self.offsets = [PACK_HEADER.size]
        for entry in self.entries:
            self.offsets.append(self.offsets[-1] + RECORD_HEADER.size + entry.frame_length)
        require(self.offsets[-1] == self.table_offset, f"{path}: the records do not fill the pack")

    def close(self) -> None:
        self.file.close()

    def read(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        raw = self.file.read(size)
        require(len(raw) == size, f"{self.path}: ends before {offset + size}")
        return raw

    def read_table(self, header: bytes) -> bytes:
        trailer_offset = self.path.stat().st_size - TRAILER.size
        require(trailer_offset >= PACK_HEADER.size, f"{self.path}: too short for a trailer")
        raw = self.read(trailer_offset, TRAILER.size)
        magic, length, name, offset, count, zero, digest, zeros, crc = TRAILER.unpack(raw)
        require((magic, length, name) == (0x184D2A53, 72, b"IMGRTAIL"), f"{self.path}: no trailer")
        require(zlib.crc32(raw[:76]) == crc, f"{self.path}: the trailer's CRC differs")
        require(zero == 0 and zeros == bytes(12), f"{self.path}: the trailer's padding is not zero")
        require(1 <= count <= MAX_RECORDS, f"{self.path}: {count} records")
        size = 8 + ENTRY.size * count
        require(offset + size == trailer_offset, f"{self.path}: the table is not at its place")
        table = self.read(offset, size)
        require(
            struct.unpack_from("<II", table) == (0x184D2A52, ENTRY.size * count),
            f"{self.path}: no table",
        )
        if self.digests:
            require(blake3(header + table) == digest, f"{self.path}: the table's digest differs")
        self.table_offset: int = offset
        return table

    def record(self, ordinal: int, kind: int, limit: int) -> tuple[Entry, bytes]:
        """The checked content of a record; `limit` is the most bytes it may have."""
        where = f"{self.path}, record {ordinal}"
        require(ordinal < len(self.entries), f"{where}: there are {len(self.entries)} records")
        entry, offset = self.entries[ordinal], self.offsets[ordinal]
        require(entry.kind == kind, f"{where}: is of kind {entry.kind}")
        require(entry.content_length <= limit, f"{where}: longer than {limit} bytes")
        header = self.read(offset, RECORD_HEADER.size)
        repeated = parse_record_header(header, ordinal, where)
        require(repeated.raw == entry.raw, f"{where}: differs from the table")
        frame = self.read(offset + RECORD_HEADER.size, entry.frame_length)
        content = decode(frame, entry, where)
        if self.digests:
            require(blake3(content) == entry.digest, f"{where}: the content's digest differs")
        return entry, content


def decode(frame: bytes, entry: Entry, where: str) -> bytes:
    require(zlib.crc32(frame) == entry.frame_crc, f"{where}: the frame's CRC differs")
    try:
        parameters = zstandard.get_frame_parameters(frame)
        require(parameters.content_size == entry.content_length, f"{where}: size in the frame")
        require(parameters.dict_id == 0, f"{where}: the frame needs a dictionary")
        decoder = zstandard.ZstdDecompressor()
        content = decoder.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadFormat(f"{where}: {error}") from error
    require(len(content) == entry.content_length, f"{where}: {len(content)} bytes")
    return content


# --- the block map --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """A page of `n` entries."""

    level: int
    states: bytes
    digests: list[bytes]
    packs: list[str]
    pack_indexes: tuple[int, ...]
    ordinals: tuple[int, ...]
    content: bytes

    @cached_property
    def content_digest(self) -> bytes:
        return blake3(self.content[: 16 + 33 * len(self.states)])

    def place(self, number: int) -> tuple[str, int]:
        return self.packs[self.pack_indexes[number]], self.ordinals[number]


def parse_page(content: bytes) -> Page:
    require(len(content) >= 16, "page: too short")
    name, level, zeros, count = struct.unpack_from("<8sB3sI", content)
    require(name == b"IMGRPAGE" and zeros == bytes(3), "page: wrong magic")
    require(1 <= count <= FAN_OUT, f"page: {count} entries")
    at = 16 + 33 * count
    require(len(content) >= at + 4, "page: too short")
    (pack_count,) = struct.unpack_from("<I", content, at)
    require(pack_count <= FAN_OUT, f"page: {pack_count} packs")
    require(len(content) == at + 4 + 16 * pack_count + 6 * count, "page: wrong length")
    at += 4
    page = Page(
        level,
        content[16 : 16 + count],
        [content[i : i + 32] for i in range(16 + count, 16 + 33 * count, 32)],
        [content[i : i + 16].hex() for i in range(at, at + 16 * pack_count, 16)],
        struct.unpack_from(f"<{count}H", content, at + 16 * pack_count),
        struct.unpack_from(f"<{count}I", content, at + 16 * pack_count + 2 * count),
        content,
    )
    check_entries(page)
    return page


def check_entries(page: Page) -> None:
    allowed = (ZERO, DATA, UNUSED, UNREADABLE) if page.level == 0 else (ZERO, DATA, UNUSED)
    for number, state in enumerate(page.states):
        require(state in allowed, f"page: state {state} at level {page.level}")
        if state in (ZERO, UNUSED):
            require(page.digests[number] == bytes(32), "page: a digest without a record")
            require(page.pack_indexes[number] == NO_PACK, "page: a pack without a record")
            require(page.ordinals[number] == 0, "page: an ordinal without a record")
        else:
            require(page.pack_indexes[number] < len(page.packs), "page: no such pack")


def height_of(blocks: int) -> int:
    height = 0
    while FAN_OUT ** (height + 1) < blocks:
        height += 1
    return height


@dataclass(frozen=True)
class Run:
    """Adjacent blocks of one state; a run with a place is one block."""

    first: int
    count: int
    state: int
    digest: bytes = bytes(32)
    place: tuple[str, int] | None = None


class Disk:
    """A disk of an image: its blocks in order."""

    def __init__(self, repository: Repository, described: dict[str, Any]) -> None:
        self.repository = repository
        self.name: str = described["name"]
        self.size: int = described["size"]
        self.root: str = described["root"]
        self.unreadable: list[list[int]] = described.get("unreadable", [])
        self.block_size = repository.block_size
        self.blocks = -(-self.size // self.block_size)
        self.height: int = described["height"]
        require(self.height == height_of(self.blocks), f"{self.name}: height {self.height}")
        top = described["top"]
        self.top = (top["pack"], top["ordinal"])

    def runs(self) -> Iterator[Run]:
        page = self.page(self.top, self.height, 0)
        if self.repository.digests:
            numbers = struct.pack("<QIII", self.size, self.block_size, FAN_OUT, self.height)
            root = blake3(b"imager disk v1\0\0" + numbers + page.content_digest)
            require(root.hex() == self.root, f"{self.name}: the root differs")
        yield from self.walk(page, 0)

    def page(self, place: tuple[str, int], level: int, index: int) -> Page:
        page = parse_page(self.repository.record(place, PAGE, MAX_PAGE_SIZE)[1])
        require(page.level == level, f"page at {place}: level {page.level}, not {level}")
        below = -(-self.blocks // FAN_OUT**level)
        expected = min(FAN_OUT, below - index * FAN_OUT)
        require(len(page.states) == expected, f"page at {place}: {len(page.states)} entries")
        uniform = set(page.states) in ({ZERO}, {UNUSED})
        require(level == self.height or not uniform, f"page at {place}: stored, yet uniform")
        return page

    def walk(self, page: Page, index: int) -> Iterator[Run]:
        span = FAN_OUT**page.level
        for number, state in enumerate(page.states):
            child = index * FAN_OUT + number
            if state in (ZERO, UNUSED):
                first = child * span
                yield Run(first, min(span, self.blocks - first), state)
            elif page.level == 0:
                yield Run(child, 1, state, page.digests[number], page.place(number))
            else:
                below = self.page(page.place(number), page.level - 1, child)
                if self.repository.digests:
                    same = below.content_digest == page.digests[number]
                    require(same, f"page {child} of level {below.level}: the digest differs")
                yield from self.walk(below, child)

    def block(self, run: Run) -> bytes:
        assert run.place is not None
        entry, content = self.repository.record(run.place, BLOCK, self.block_size)
        expected = min(self.block_size, self.size - run.first * self.block_size)
        require(len(content) == expected, f"block {run.first}: {len(content)} bytes")
        require(entry.digest == run.digest, f"block {run.first}: the record is another block")
        return content

    def restore(self, path: Path) -> None:
        """Write the disk to a new sparse file."""
        with path.open("xb") as out:
            out.truncate(self.size)
            for run in self.runs():
                if run.place is not None:
                    out.seek(run.first * self.block_size)
                    out.write(self.block(run))


class Repository:
    """A repository in a folder."""

    def __init__(self, root: Path, digests: bool = True) -> None:
        self.root, self.digests = root, digests
        self.packs: dict[str, Pack] = {}
        document = read_sealed(root / "repository.json")
        require(document["kind"] == "repository", "repository.json: another kind")
        require(document["digest"] == "blake3-256", "repository.json: another digest")
        self.block_size: int = document["block_size"]
        power = self.block_size & (self.block_size - 1) == 0
        require(power and 65536 <= self.block_size <= 16777216, "repository.json: block size")

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        for pack in self.packs.values():
            pack.close()

    def images(self) -> list[str]:
        names = (path.stem for path in (self.root / "manifests").glob("*.json"))
        return sorted(name for name in names if self.manifest(name)["kind"] == "image")

    def manifest(self, image: str) -> dict[str, Any]:
        require(bool(re.fullmatch(r"\d{8}t\d{6}z-[0-9a-f]{8}", image)), f"{image}: no image id")
        return read_sealed(self.root / "manifests" / f"{image}.json")

    def disks(self, image: str) -> list[Disk]:
        manifest = self.manifest(image)
        require(manifest["kind"] == "image", f"{image}: is no image but {manifest['kind']}")
        require(manifest["id"] == image, f"{image}: the manifest is of {manifest['id']}")
        require(manifest["block_size"] == self.block_size, f"{image}: another block size")
        return [Disk(self, described) for described in manifest["disks"]]

    def disk(self, image: str, name: str | None) -> Disk:
        found = [disk for disk in self.disks(image) if name in (None, disk.name)]
        require(len(found) == 1, f"{image}: {len(found)} disks fit, name one")
        return found[0]

    def pack(self, pack_id: str) -> Pack:
        if pack_id not in self.packs:
            self.packs[pack_id] = Pack(self.pack_path(pack_id), pack_id, self.digests)
        return self.packs[pack_id]

    def record(self, place: tuple[str, int], kind: int, limit: int) -> tuple[Entry, bytes]:
        pack_id, ordinal = place
        for _ in range(64):
            if pack_id in self.packs or self.pack_path(pack_id).exists():
                return self.pack(pack_id).record(ordinal, kind, limit)
            pack_id, ordinal = self.moved(pack_id, ordinal)
        raise BadFormat(f"{place}: moved packs go round in a circle")

    def pack_path(self, pack_id: str) -> Path:
        require(bool(re.fullmatch(r"[0-9a-f]{32}", pack_id)), f"{pack_id}: no id of a pack")
        return self.root / "packs" / pack_id[:2] / f"{pack_id}.pack"

    def moved(self, pack_id: str, ordinal: int) -> tuple[str, int]:
        """Where a record of a pack that was compacted is now."""
        path = self.root / "moved" / f"{pack_id}.json"
        require(path.is_file(), f"pack {pack_id}: missing")
        document = read_sealed(path)
        require(document["kind"] == "moved" and document["pack"] == pack_id, f"{path}: of another")
        end = 0
        for first, length, there, start in document["runs"]:
            require(end <= first and length > 0, f"{path}: runs out of order")
            end = first + length
            require(end <= document["records"], f"{path}: a run past the end")
            if first <= ordinal < end:
                return there, start + ordinal - first
        raise BadFormat(f"pack {pack_id}: record {ordinal} is gone")


# --- salvage --------------------------------------------------------------------------------------


def salvage(damaged: Path, rebuilt: Path) -> int:
    """Copy the whole records of a pack that lost its end, add table and trailer; their number."""
    with damaged.open("rb") as source, rebuilt.open("xb") as out:
        header = source.read(PACK_HEADER.size)
        parse_header(header, str(damaged))
        out.write(header)
        entries: list[Entry] = []
        for entry, record in walk_records(source.read, str(damaged)):
            out.write(record)
            entries.append(entry)
        require(bool(entries), f"{damaged}: no whole record is left")
        out.write(table_and_trailer(header, entries, out.tell()))
    return len(entries)


def walk_records(read: Any, where: str) -> Iterator[tuple[Entry, bytes]]:
    """The records from here on, until one is cut off, damaged, or something else."""
    for ordinal in range(MAX_RECORDS):
        header = read(RECORD_HEADER.size)
        try:
            entry = parse_record_header(header, ordinal, where)
            frame = read(entry.frame_length)
            content = decode(frame, entry, where)
            require(blake3(content) == entry.digest, f"{where}: the content's digest differs")
        except BadFormat:
            return
        yield entry, header + frame


def table_and_trailer(header: bytes, entries: list[Entry], table_offset: int) -> bytes:
    raw = b"".join(entry.raw for entry in entries)
    table = struct.pack("<II", 0x184D2A52, len(raw)) + raw
    digest = blake3(header + table)
    trailer = TRAILER.pack(
        0x184D2A53, 72, b"IMGRTAIL", table_offset, len(entries), 0, digest, bytes(12), 0
    )[:76]
    return table + trailer + struct.pack("<I", zlib.crc32(trailer))


# --- command line ---------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["salvage"]:
            return salvage_command(arguments[1:])
        return restore_command(arguments)
    except BadFormat as error:
        print(error, file=sys.stderr)
        return 1


def salvage_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="independent_reader.py salvage")
    parser.add_argument("pack", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    print(f"{salvage(options.pack, options.out)} records")
    return 0


def restore_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="independent_reader.py")
    parser.add_argument("--no-digests", action="store_true", help="check only CRCs and structure")
    parser.add_argument("repository", type=Path)
    parser.add_argument("image")
    parser.add_argument("disk", nargs="?")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    with Repository(options.repository, not options.no_digests) as repository:
        repository.disk(options.image, options.disk).restore(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
