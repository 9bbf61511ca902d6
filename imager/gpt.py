"""GUID partition table: structures and their two copies on a disk.

Source: UEFI Specification 2.10, chapter 5.3 (GUID Partition Table Disk Layout), tables 5.5
(header) and 5.6 (entry). All numbers are little-endian; all LBAs count logical sectors.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

SIGNATURE = b"EFI PART"
PRIMARY_LBA = 1

# signature, revision, header size, header CRC, reserved, own LBA, LBA of the other copy, first
# and last usable LBA, disk GUID, LBA of the entries, their number, size of one, their CRC
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_HEADER_CRC = slice(16, 20)

# type GUID, partition GUID, first and last LBA, attribute bits, name in UTF-16LE
_ENTRY = struct.Struct("<16s16sQQQ72s")
_UNUSED = bytes(16)

# The usual table has 16 KiB (128 entries of 128 bytes); this leaves room for 32768 entries.
MAX_ENTRIES_BYTES = 4 << 20


@dataclass(frozen=True)
class GptHeader:
    """One header whose checksum was right. LBAs and counts in sectors, sizes in bytes."""

    revision: int
    own_lba: int
    other_lba: int
    first_usable: int
    last_usable: int
    disk_guid: bytes
    entries_lba: int
    entry_count: int
    entry_size: int
    entries_crc: int
    tail: bytes  # what a header of more than 92 bytes has behind the known fields

    @property
    def entries_bytes(self) -> int:
        return self.entry_count * self.entry_size

    def pack(self, sector_size: int) -> bytes:
        """The header's sector, with a new header checksum."""
        size = _HEADER.size + len(self.tail)
        fields = (
            self.own_lba,
            self.other_lba,
            self.first_usable,
            self.last_usable,
            self.disk_guid,
            self.entries_lba,
            self.entry_count,
            self.entry_size,
            self.entries_crc,
        )
        raw = bytearray(_HEADER.pack(SIGNATURE, self.revision, size, 0, 0, *fields) + self.tail)
        raw[_HEADER_CRC] = struct.pack("<I", zlib.crc32(raw))
        return bytes(raw).ljust(sector_size, b"\0")


@dataclass(frozen=True)
class GptEntry:
    """A used entry. ``number`` counts from 1; LBAs are inclusive."""

    number: int
    type_guid: str
    guid: str
    first_lba: int
    last_lba: int
    attributes: int
    name: str


@dataclass(frozen=True)
class GptCopy:
    """A header and its entries, both with right checksums."""

    header: GptHeader
    entries: bytes
    sector_size: int

    @property
    def extents(self) -> Extents:
        """Where this copy lies, in bytes."""
        unit = self.sector_size
        return Extents(
            [
                (self.header.own_lba * unit, unit),
                (self.header.entries_lba * unit, round_up(len(self.entries), unit)),
            ]
        )

    def same_table(self, other: GptCopy) -> bool:
        """Whether both describe the same disk and partitions."""
        return self.entries == other.entries and self.header.disk_guid == other.header.disk_guid

    def used_entries(self) -> Iterator[GptEntry]:
        size = self.header.entry_size
        for index in range(self.header.entry_count):
            kind, guid, first, last, attributes, name = _ENTRY.unpack_from(
                self.entries, index * size
            )
            if kind != _UNUSED:
                yield GptEntry(
                    number=index + 1,
                    type_guid=guid_text(kind).upper(),
                    guid=guid_text(guid),
                    first_lba=first,
                    last_lba=last,
                    attributes=attributes,
                    name=name.decode("utf-16-le", errors="replace").partition("\0")[0],
                )


@dataclass(frozen=True)
class GptSearch:
    """What a disk has of the two copies; ``…_fault`` says why one is not there."""

    sector_size: int
    primary: GptCopy | None
    backup: GptCopy | None
    primary_fault: str
    backup_fault: str

    @property
    def copy(self) -> GptCopy | None:
        """The copy to believe: the primary one when it is sound."""
        return self.primary or self.backup


def find_gpt(source: BlockSource, sector_size: int, protective_last_lba: int | None) -> GptSearch:
    """Look for both copies on a disk with sectors of ``sector_size`` bytes.

    The backup's place is what the primary header says, else the last sector, else where the
    protective MBR ends (``protective_last_lba``): a disk that was copied to a bigger one.
    """
    primary, primary_fault = _try_copy(source, sector_size, PRIMARY_LBA)
    places = [source.size // sector_size - 1]
    if primary:
        places.insert(0, primary.header.other_lba)
    elif (lba := _other_lba(source, sector_size)) is not None:
        places.insert(0, lba)
    elif protective_last_lba is not None:
        places.append(protective_last_lba)
    backup, backup_fault = None, ""
    for lba in places:
        if lba > PRIMARY_LBA and backup is None:
            backup, fault = _try_copy(source, sector_size, lba)
            backup_fault = backup_fault or fault
    return GptSearch(sector_size, primary, backup, primary_fault, backup_fault)


def read_copy(source: BlockSource, sector_size: int, lba: int) -> GptCopy:
    """The copy whose header is at ``lba``. Raises NotRecognized with the reason."""
    header = read_header(source, sector_size, lba)
    entries = peek(source, header.entries_lba * sector_size, header.entries_bytes)
    if entries is None:
        raise NotRecognized("its entries are outside of the disk or unreadable")
    if zlib.crc32(entries) != header.entries_crc:
        raise NotRecognized("the checksum of its entries is wrong")
    return GptCopy(header, entries, sector_size)


def read_header(source: BlockSource, sector_size: int, lba: int) -> GptHeader:
    """The header at ``lba``, without its entries. Raises NotRecognized with the reason."""
    raw = peek(source, lba * sector_size, sector_size)
    if raw is None:
        raise NotRecognized(f"sector {lba} is outside of the disk or unreadable")
    return _parse_header(raw, lba)


def moved(copy: GptCopy, disk_size: int) -> tuple[GptCopy, GptCopy]:
    """The same table as the primary and backup copy for a disk of ``disk_size`` bytes.

    Only the places of the copies and the last usable sector differ from ``copy``.
    """
    last_lba = disk_size // copy.sector_size - 1
    entries_sectors = -(-len(copy.entries) // copy.sector_size)
    common = replace(copy.header, last_usable=last_lba - entries_sectors - 1)
    # The entries need not start right behind the header, for instance with U-Boot between them.
    gap = copy.header.entries_lba if copy.header.own_lba == PRIMARY_LBA else PRIMARY_LBA + 1
    primary = replace(common, own_lba=PRIMARY_LBA, other_lba=last_lba, entries_lba=gap)
    backup = replace(
        common, own_lba=last_lba, other_lba=PRIMARY_LBA, entries_lba=last_lba - entries_sectors
    )
    return replace(copy, header=primary), replace(copy, header=backup)


def peek(source: BlockSource, offset: int, length: int) -> bytes | None:
    """Bytes of the source, or None where it has none or cannot read them."""
    if offset < 0 or length < 0 or offset + length > source.size:
        return None
    try:
        return source.pread(offset, length)
    except OSError:
        return None


def guid_text(raw: bytes) -> str:
    """The usual text form, in lower case, of 16 bytes in the mixed order GPT keeps them in."""
    return str(uuid.UUID(bytes_le=raw))


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _try_copy(source: BlockSource, sector_size: int, lba: int) -> tuple[GptCopy | None, str]:
    try:
        return read_copy(source, sector_size, lba), ""
    except NotRecognized as fault:
        return None, fault.message


def _other_lba(source: BlockSource, sector_size: int) -> int | None:
    """Where the primary header says the backup is, though the primary entries are damaged."""
    try:
        return read_header(source, sector_size, PRIMARY_LBA).other_lba
    except NotRecognized:
        return None


def _parse_header(raw: bytes, lba: int) -> GptHeader:
    (signature, revision, size, crc, _, *fields) = _HEADER.unpack_from(raw)
    if signature != SIGNATURE:
        raise NotRecognized(f"sector {lba} has no GPT header")
    if not _HEADER.size <= size <= len(raw):
        raise NotRecognized(f"its header has an impossible size of {size} bytes")
    summed = bytearray(raw[:size])
    summed[_HEADER_CRC] = bytes(4)
    if zlib.crc32(summed) != crc:
        raise NotRecognized("the checksum of its header is wrong")
    header = GptHeader(*(revision, *fields, raw[_HEADER.size : size]))
    if header.own_lba != lba:
        raise NotRecognized(f"its header belongs to sector {header.own_lba}, not {lba}")
    if not _sound_entries(header):
        raise NotRecognized(
            f"its entries have an impossible layout ({header.entry_count} of "
            f"{header.entry_size} bytes)"
        )
    return header


def _sound_entries(header: GptHeader) -> bool:
    """Entry size is 128 · 2^n; the array has a bounded size and lies behind the header."""
    size = header.entry_size
    return (
        size >= _ENTRY.size
        and size & (size - 1) == 0
        and 0 < header.entries_bytes <= MAX_ENTRIES_BYTES
        and header.entries_lba > PRIMARY_LBA
    )
