"""Master boot record: the boot sector's partition records and the chain of logical partitions.

Sources: UEFI Specification 2.10, chapter 5.2 (legacy and protective MBR); Linux
block/partitions/msdos.c for how the chain of extended boot records is walked and numbered.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SECTOR_BYTES = 512  # the MBR fills the first 512 bytes, whatever the sector size
BOOT_CODE_BYTES = 440
PROTECTIVE = 0xEE
EXTENDED = frozenset({0x05, 0x0F, 0x85})

_RECORDS_AT = 446
_RECORD = struct.Struct("<B3sB3sII")  # status, CHS first, type, CHS last, first LBA, sectors
_MAGIC = b"\x55\xaa"
_STATUS = frozenset({0x00, 0x80})

_FAT_SECTOR_SIZES = frozenset({512, 1024, 2048, 4096})


@dataclass(frozen=True)
class MbrRecord:
    """A used partition record. ``first`` and ``count`` in sectors, relative in an EBR."""

    index: int
    status: int
    type: int
    first: int
    count: int

    @property
    def bootable(self) -> bool:
        return bool(self.status & 0x80)

    @property
    def extended(self) -> bool:
        return self.type in EXTENDED


@dataclass(frozen=True)
class BootSector:
    """The first 512 bytes of a disk, or of a logical partition's place in the chain."""

    magic: bool
    filesystem: bool
    disk_signature: int
    records: tuple[MbrRecord, ...]

    @property
    def protective(self) -> MbrRecord | None:
        """The record that keeps MBR tools away from a GPT disk."""
        return next((record for record in self.records if record.type == PROTECTIVE), None)

    @property
    def protective_last_lba(self) -> int | None:
        """The last sector of the disk that the protective record was written for."""
        record = self.protective
        return record.first + record.count - 1 if record else None

    @property
    def others(self) -> tuple[MbrRecord, ...]:
        """The records of real partitions."""
        return tuple(record for record in self.records if record.type != PROTECTIVE)

    @property
    def plausible(self) -> bool:
        """Whether the records are partitions and not boot code or text at that place."""
        return (
            self.magic
            and not self.filesystem
            and all(record.status in _STATUS for record in self.records)
            and bool(self.others)
        )


def parse_boot_sector(raw: bytes) -> BootSector:
    """Never fails: a sector that is none has ``magic`` False and no records."""
    if len(raw) < SECTOR_BYTES or raw[510:512] != _MAGIC:
        return BootSector(magic=False, filesystem=False, disk_signature=0, records=())
    return BootSector(
        magic=True,
        filesystem=_is_filesystem(raw),
        disk_signature=int(struct.unpack_from("<I", raw, BOOT_CODE_BYTES)[0]),
        records=tuple(_records(raw)),
    )


def set_record_length(raw: bytes, index: int, count: int) -> bytes:
    """The boot sector with the sector count of one record replaced."""
    at = _RECORDS_AT + index * _RECORD.size + 12
    return raw[:at] + struct.pack("<I", count) + raw[at + 4 :]


def _records(raw: bytes) -> Iterator[MbrRecord]:
    for index in range(4):
        at = _RECORDS_AT + index * _RECORD.size
        status, _, kind, _, first, count = _RECORD.unpack_from(raw, at)
        if kind and count:
            yield MbrRecord(index, status, kind, first, count)


def _is_filesystem(raw: bytes) -> bool:
    """Whether this is the boot sector of FAT, exFAT or NTFS, which has the same end mark.

    Sources: Microsoft FAT32 File System Specification (boot sector and BPB) and the exFAT
    specification, section 3.1; NTFS has the same jump, name and BPB layout.
    """
    if raw[0] not in (0xEB, 0xE9):
        return False
    if raw[3:11] in (b"NTFS    ", b"EXFAT   "):
        return True
    sector, cluster, reserved, fats = struct.unpack_from("<HBHB", raw, 11)
    return (
        sector in _FAT_SECTOR_SIZES
        and cluster.bit_count() == 1
        and reserved > 0
        and fats in (1, 2)
        and (raw[21] == 0xF0 or raw[21] >= 0xF8)
    )
