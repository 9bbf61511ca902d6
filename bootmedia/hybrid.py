"""What makes an ISO boot from a disk too: boot sector, GPT, and GRUB's notes of where it lies.

An ISO leaves its first 32 KiB free: there go the MBR and the primary GPT (UEFI specification,
chapter 5). The backup GPT is at the end, in padding that is not part of the ISO's volume. The one
partition is the EFI system partition, over the bytes of the El Torito image for UEFI.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib
from dataclasses import dataclass

from imager.errors import UsageError

SECTOR = 512
ISO_BLOCK = 2048
PADDING = 150 * ISO_BLOCK
"""Appended to the ISO: the backup GPT at its end, and what some drives read ahead before it."""

_SECTORS_PER_BLOCK = ISO_BLOCK // SECTOR
_GPT_HEADER = struct.Struct("<8s4sIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_GPT_ENTRIES = 128
_GPT_SECTORS = _GPT_ENTRIES * _GPT_ENTRY.size // SECTOR
_ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")

# boot_hybrid.img (GRUB's grub-core/boot/i386/pc/boot.S): the sector of what it loads next.
_HYBRID_TARGET = 0x1B0
_DISK_ID = 0x1B8
_FIRST_PARTITION = 0x1BE
_PARTITION = struct.Struct("<B3sB3sII")
# Some BIOSes boot only from a disk with an active partition, though the UEFI specification wants
# the protective one to be inactive.
_ACTIVE = 0x80
_PROTECTIVE = 0xEE

# The boot information table (El Torito images of isolinux and GRUB): where the image lies.
_BOOT_TABLE = struct.Struct("<IIII40x")
_BOOT_TABLE_OFFSET = 8
_VOLUME_DESCRIPTOR_BLOCK = 16
# GRUB's cdboot.img is one block; the sector of what follows is noted near the end of the next 512
# bytes, its disk loader (util/mkimage.c and grub2-boot-info of xorriso).
_DISK_LOADER_TARGET = ISO_BLOCK + SECTOR - 12


@dataclass(frozen=True)
class DiskIdentity:
    """The random-looking numbers of the disk and its partition, which follow from a seed."""

    mbr: bytes
    disk: uuid.UUID
    partition: uuid.UUID

    @classmethod
    def from_seed(cls, seed: str) -> DiskIdentity:
        digest = hashlib.sha512(seed.encode()).digest()
        return cls(
            digest[:4],
            uuid.UUID(bytes=digest[4:20], version=4),
            uuid.UUID(bytes=digest[20:36], version=4),
        )


def with_boot_info(image: bytes, block: int) -> bytes:
    """GRUB's El Torito image for BIOS, told that it lies at this block (of 2 KiB) of the ISO."""
    if len(image) < _DISK_LOADER_TARGET + 8:
        raise UsageError(f"the El Torito image has only {len(image)} bytes")
    told = bytearray(image)
    # Its first block is for CDs; the next sector loads the rest, which begins one further.
    struct.pack_into("<Q", told, _DISK_LOADER_TARGET, block * _SECTORS_PER_BLOCK + 5)
    start = _BOOT_TABLE_OFFSET + _BOOT_TABLE.size
    summed = bytes(told[start:]) + bytes(-len(told) % 4)
    checksum = sum(struct.unpack(f"<{len(summed) // 4}I", summed)) & 0xFFFFFFFF
    _BOOT_TABLE.pack_into(
        told, _BOOT_TABLE_OFFSET, _VOLUME_DESCRIPTOR_BLOCK, block, len(image), checksum
    )
    return bytes(told)


def system_area(
    boot_sector: bytes,
    identity: DiskIdentity,
    *,
    bios_block: int,
    efi_block: int,
    efi_size: int,
    size: int,
) -> tuple[bytes, bytes]:
    """The first bytes of the ISO (MBR, primary GPT), and its last ones (backup GPT).

    ``bios_block`` and ``efi_block``: where the El Torito images lie, in blocks of 2 KiB;
    ``efi_size`` in bytes; ``size`` of the whole ISO with the padding, in bytes.
    """
    sectors = size // SECTOR
    first = efi_block * _SECTORS_PER_BLOCK
    last = first - efi_size // -SECTOR - 1
    name = "EFI system partition".encode("utf-16-le")
    entry = _GPT_ENTRY.pack(_ESP.bytes_le, identity.partition.bytes_le, first, last, 0, name)
    entries = entry.ljust(_GPT_SECTORS * SECTOR, b"\0")
    front = _gpt_header(identity, entries, own=1, other=sectors - 1, table=2, sectors=sectors)
    back = _gpt_header(
        identity,
        entries,
        own=sectors - 1,
        other=1,
        table=sectors - 1 - _GPT_SECTORS,
        sectors=sectors,
    )
    boot = _boot_sector(boot_sector, identity, bios_block, sectors)
    return boot + front + entries, entries + back


def _boot_sector(code: bytes, identity: DiskIdentity, bios_block: int, sectors: int) -> bytes:
    sector = bytearray(code[:SECTOR].ljust(SECTOR, b"\0"))
    struct.pack_into("<Q", sector, _HYBRID_TARGET, bios_block * _SECTORS_PER_BLOCK + 4)
    sector[_DISK_ID : _DISK_ID + 6] = identity.mbr + bytes(2)
    sector[_FIRST_PARTITION:] = bytes(4 * _PARTITION.size) + b"\x55\xaa"
    length = min(sectors - 1, 0xFFFFFFFF)
    _PARTITION.pack_into(
        sector, _FIRST_PARTITION, _ACTIVE, b"\0\2\0", _PROTECTIVE, b"\xff\xff\xff", 1, length
    )
    return bytes(sector)


def _gpt_header(
    identity: DiskIdentity, entries: bytes, *, own: int, other: int, table: int, sectors: int
) -> bytes:
    usable = (2 + _GPT_SECTORS, sectors - 2 - _GPT_SECTORS)

    def packed(checksum: int) -> bytes:
        return _GPT_HEADER.pack(
            b"EFI PART",
            b"\0\0\1\0",
            _GPT_HEADER.size,
            checksum,
            0,
            own,
            other,
            *usable,
            identity.disk.bytes_le,
            table,
            _GPT_ENTRIES,
            _GPT_ENTRY.size,
            zlib.crc32(entries),
        )

    return packed(zlib.crc32(packed(0))).ljust(SECTOR, b"\0")
