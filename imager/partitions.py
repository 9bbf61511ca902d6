"""Partition tables: read from a source, described, never guessed and never written.

GPT is read by its checksums from whichever copy is sound (UEFI Specification 2.10, chapter 5),
MBR as the Linux kernel walks it (block/partitions/msdos.c). What is not soundly a table has the
scheme "none", and then the whole disk is unpartitioned: all of it is captured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from imager.blocksource import BlockSource
from imager.extents import Extents
from imager.gpt import (
    GptCopy,
    GptEntry,
    GptSearch,
    find_gpt,
    guid_text,
    moved,
    peek,
    round_up,
)
from imager.jsonrecord import JsonRecord
from imager.mbr import SECTOR_BYTES, BootSector, MbrRecord, parse_boot_sector
from imager.partitiontypes import GPT_TYPES, MBR_TYPES

GPT_SCHEMES = frozenset({"gpt", "hybrid"})

# Sectors of image files are unknown, and USB bridges change them: these two exist.
_SECTOR_SIZES = (512, 4096)

# Linux stops at 256 partitions of a disk; longer chains are damage.
_MAX_LOGICALS = 256


@dataclass(frozen=True)
class Partition(JsonRecord):
    """One partition; ``offset`` and ``size`` in bytes.

    ``type`` is an upper-case GUID (GPT) or like "0x83" (MBR). ``uuid`` is what Linux calls
    PARTUUID, in lower case: a GUID, or disk signature and number of an MBR partition.
    ``attributes`` are GPT's 64 bits, ``bootable`` is MBR's active flag.
    """

    number: int
    offset: int
    size: int
    type: str
    type_name: str | None = None
    uuid: str | None = None
    name: str | None = None
    attributes: int = 0
    bootable: bool = False
    kind: str = "primary"  # or "logical" or "extended"

    @property
    def end(self) -> int:
        """First byte behind the partition."""
        return self.offset + self.size


@dataclass(frozen=True)
class PartitionTable(JsonRecord):
    """A disk's partitions; all offsets in bytes.

    ``scheme`` is "gpt", "mbr", "hybrid" (GPT with further MBR records) or "none"; ``disk_id``
    the GPT's GUID in lower case, or the MBR's signature like "0x12345678". ``first_usable`` and
    ``last_usable`` (the first byte behind the last usable sector) are what a GPT says.
    ``backup_size`` is what a GPT needs at the disk's end for its backup copy.

    ``partitions`` lie within the disk; ``beyond`` are those that don't (a disk copied to a
    smaller one): their bytes count as unpartitioned. ``table_extents`` is every byte range that
    belongs to the table itself, within partitions too. ``notes`` tell what is not in order.
    """

    scheme: str
    sector_size: int
    disk_id: str | None = None
    first_usable: int | None = None
    last_usable: int | None = None
    backup_size: int = 0
    partitions: tuple[Partition, ...] = ()
    beyond: tuple[Partition, ...] = ()
    notes: tuple[str, ...] = ()
    table_extents: Extents = field(default_factory=Extents)

    def partition(self, number: int) -> Partition | None:
        return next((part for part in self.partitions if part.number == number), None)


def read_partition_table(source: BlockSource) -> PartitionTable:
    """The disk's table, from the copy that is sound. Never raises for damaged tables."""
    raw = peek(source, 0, min(SECTOR_BYTES, source.size))
    boot = parse_boot_sector(raw or b"")
    search = _search_gpt(source, boot)
    if search and (copy := search.copy) and _gpt_rules(search, boot):
        table = _gpt_table(source, search, copy, boot)
    elif boot.plausible and not boot.protective:
        table = _mbr_table(source, boot, search)
    else:
        table = _no_table(source, boot, search)
    if raw is None:
        table = _noted(table, "the first sector is unreadable")
    return table


def smallest_disk(table: PartitionTable, disk_size: int) -> int:
    """Least size in bytes of a disk that takes all partitions and the backup GPT.

    ``disk_size`` is that of the table's disk: the answer for a disk without a table.
    """
    if table.scheme == "none":
        return disk_size
    ends = [part.end for part in (*table.partitions, *table.beyond)]
    return max([*ends, table.first_usable or SECTOR_BYTES]) + table.backup_size


def _search_gpt(source: BlockSource, boot: BootSector) -> GptSearch | None:
    """The sector size at which a sound GPT shows, the source's own first."""
    other = [size for size in _SECTOR_SIZES if size != source.logical_sector]
    for sector_size in (source.logical_sector, *other):
        search = find_gpt(source, sector_size, boot.protective_last_lba)
        if search.copy:
            return search
    return None


def _gpt_rules(search: GptSearch, boot: BootSector) -> bool:
    """Whether the GPT is the disk's table and not what an earlier use has left.

    With a protective record it is. Without, the UEFI specification says it is not; yet where
    nothing else claims the disk, a sound primary copy is taken (only the first sector is lost).
    """
    if boot.protective:
        return True
    return search.primary is not None and not boot.plausible and not boot.filesystem


def _gpt_table(
    source: BlockSource, search: GptSearch, copy: GptCopy, boot: BootSector
) -> PartitionTable:
    unit, header = search.sector_size, copy.header
    entries = list(copy.used_entries())
    table = PartitionTable(
        scheme="hybrid" if boot.protective and boot.others else "gpt",
        sector_size=unit,
        disk_id=guid_text(header.disk_guid),
        first_usable=header.first_usable * unit,
        last_usable=(header.last_usable + 1) * unit,
        backup_size=unit + round_up(len(copy.entries), unit),
        table_extents=_gpt_extents(source, search, copy),
        notes=(
            *_gpt_notes(source, search, boot),
            *(
                f"partition {entry.number} ends before it starts: left out"
                for entry in entries
                if entry.first_lba > entry.last_lba
            ),
        ),
    )
    sound = [_gpt_partition(e, unit) for e in entries if e.first_lba <= e.last_lba]
    return _with_partitions(table, source.size, sound)


def _gpt_partition(entry: GptEntry, unit: int) -> Partition:
    return Partition(
        number=entry.number,
        offset=entry.first_lba * unit,
        size=(entry.last_lba - entry.first_lba + 1) * unit,
        type=entry.type_guid,
        type_name=GPT_TYPES.get(entry.type_guid),
        uuid=entry.guid,
        name=entry.name or None,
        attributes=entry.attributes,
    )


def _gpt_extents(source: BlockSource, search: GptSearch, copy: GptCopy) -> Extents:
    """Both sound copies where they lie, and where a damaged copy belongs."""
    unit = search.sector_size
    places = Extents([(0, unit)])
    for sound in (search.primary, search.backup, *moved(copy, source.size)):
        if sound:
            places = places.union(sound.extents)
    return places.clip(0, source.size)


def _gpt_notes(source: BlockSource, search: GptSearch, boot: BootSector) -> Iterator[str]:
    if search.sector_size != source.logical_sector:
        yield (
            f"the GPT is laid out for sectors of {search.sector_size} bytes, "
            f"not {source.logical_sector}"
        )
    if not boot.protective:
        yield "the protective MBR is missing"
    if not search.primary:
        yield f"the primary GPT is damaged ({search.primary_fault}): read from the backup"
    elif not search.backup:
        yield f"the backup GPT is missing ({search.backup_fault})"
    elif not search.primary.same_table(search.backup):
        yield "the primary and the backup GPT differ: the primary one is used"
    if search.backup and search.backup.header.own_lba != source.size // search.sector_size - 1:
        yield "the backup GPT isn't at the end of the disk"


def _mbr_table(
    source: BlockSource, boot: BootSector, stale_gpt: GptSearch | None
) -> PartitionTable:
    unit = source.logical_sector
    logicals = _Logicals(source)
    parts = [
        _mbr_partition(record, record.index + 1, record.first, boot, unit)
        for record in boot.records
    ]
    for record in boot.records:
        if record.extended:
            logicals.walk(record)
    parts += [
        replace(_mbr_partition(record, number, lba, boot, unit), kind="logical")
        for number, (lba, record) in enumerate(logicals.found, start=5)
    ]
    table = PartitionTable(
        scheme="mbr",
        sector_size=unit,
        disk_id=f"0x{boot.disk_signature:08x}",
        table_extents=Extents([(0, unit), *((lba * unit, unit) for lba in logicals.sectors)]),
        notes=(*logicals.notes, *_stale_notes(stale_gpt)),
    )
    return _with_partitions(table, source.size, parts)


def _mbr_partition(
    record: MbrRecord, number: int, first_lba: int, boot: BootSector, unit: int
) -> Partition:
    return Partition(
        number=number,
        offset=first_lba * unit,
        size=record.count * unit,
        type=f"0x{record.type:02x}",
        type_name=MBR_TYPES.get(record.type),
        uuid=f"{boot.disk_signature:08x}-{number:02x}",
        bootable=record.bootable,
        kind="extended" if record.extended else "primary",
    )


class _Logicals:
    """The chain of extended boot records, each with one logical partition and a link."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self.sectors: dict[int, None] = {}  # LBAs of the EBRs, in their order
        self.found: list[tuple[int, MbrRecord]] = []  # first LBA and record
        self.notes: list[str] = []

    def walk(self, extended: MbrRecord) -> None:
        """Links count from the start of the extended partition, partitions from their EBR."""
        lba: int | None = extended.first
        while lba is not None:
            if lba in self.sectors or len(self.sectors) >= _MAX_LOGICALS:
                self.notes.append(f"the chain of logical partitions does not end (sector {lba})")
                return
            boot = self._read(lba)
            if not boot.magic:
                self.notes.append(f"the chain of logical partitions breaks at sector {lba}")
                return
            self.sectors[lba] = None
            self.found += [(lba + r.first, r) for r in boot.records if not r.extended]
            links = [extended.first + r.first for r in boot.records if r.extended]
            lba = links[0] if links else None

    def _read(self, lba: int) -> BootSector:
        offset = lba * self._source.logical_sector
        return parse_boot_sector(peek(self._source, offset, SECTOR_BYTES) or b"")


def _no_table(source: BlockSource, boot: BootSector, stale_gpt: GptSearch | None) -> PartitionTable:
    notes = list(_stale_notes(stale_gpt))
    if boot.protective and not boot.filesystem:
        notes.append("the MBR says that this is a GPT disk, but both copies of the GPT are damaged")
    return PartitionTable(scheme="none", sector_size=source.logical_sector, notes=tuple(notes))


def _stale_notes(search: GptSearch | None) -> Iterator[str]:
    if search:
        which = "a GPT" if search.primary else "a backup GPT"
        yield f"{which} of an earlier use is on the disk: ignored, the first sector has none"


def _with_partitions(
    table: PartitionTable, disk_size: int, parts: Iterable[Partition]
) -> PartitionTable:
    """The table with its partitions sorted, those past the disk's end apart, and notes."""
    ordered = sorted(parts, key=lambda part: part.number)
    beyond = tuple(part for part in ordered if part.end > disk_size)
    table = replace(
        table,
        partitions=tuple(part for part in ordered if part.end <= disk_size),
        beyond=beyond,
        table_extents=table.table_extents.clip(0, disk_size),
    )
    return _noted(
        table,
        *(f"partition {part.number} reaches beyond the end of the disk" for part in beyond),
        *_overlaps(table.partitions),
        *_outside_usable(table),
    )


def _overlaps(parts: Iterable[Partition]) -> Iterator[str]:
    reached: Partition | None = None
    for part in sorted(parts, key=lambda part: part.offset):
        if part.kind == "extended":
            continue
        if reached and part.offset < reached.end:
            yield f"partitions {reached.number} and {part.number} overlap"
        if reached is None or part.end > reached.end:
            reached = part


def _outside_usable(table: PartitionTable) -> Iterator[str]:
    if table.first_usable is None or table.last_usable is None:
        return
    for part in table.partitions:
        if part.offset < table.first_usable or part.end > table.last_usable:
            yield f"partition {part.number} lies outside of the space the GPT calls usable"


def _noted(table: PartitionTable, *notes: str) -> PartitionTable:
    return replace(table, notes=(*table.notes, *notes))
