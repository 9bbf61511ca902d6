"""Members of software RAID with the superblocks that md writes, made without md."""

from __future__ import annotations

import struct

MIB = 1 << 20
SIZE = 4 * MIB
DATA = 2 * MIB
"""Size of the array."""
NEVER = (1 << 64) - 1
UUID = bytes.fromhex("3e1f9f433fbb4d4f9f5139b0cd54bd33")
VERSIONS = {"1.0": (SIZE // 512 - 16) & ~7, "1.1": 0, "1.2": 8}
OFFSETS = {"1.0": 0, "1.1": MIB, "1.2": MIB}
# (format, offset in the superblock) of the fields that tests change
FIELDS = {
    "features": ("<I", 8),
    "level": ("<i", 72),
    "size": ("<Q", 80),
    "disks": ("<I", 92),
    "bitmap": ("<i", 96),
    "data_offset": ("<Q", 128),
    "number": ("<I", 160),
    "flags": ("<B", 184),
    "log_size": ("<H", 186),
    "log_offset": ("<i", 188),
    "events": ("<Q", 200),
    "resync": ("<Q", 208),
    "role": ("<H", 256),
    "most": ("<I", 220),
}


def swap(size: int) -> bytes:
    """Swap space: only its first page is used."""
    page = bytearray(4096)
    struct.pack_into("<III", page, 1024, 1, size // 4096 - 1, 0)
    page[-10:] = b"SWAPSPACE2"
    return bytes(page)


def member(version: str, *, number: int = 0, content: bytes | None = None, **fields: int) -> bytes:
    """A device full of a pattern, with the superblock that md writes (md_p.h)."""
    image = bytearray(b"\xa5" * SIZE)
    content = swap(DATA) if content is None else content
    if version == "0.90":
        image[: len(content)] = content
        at = SIZE - 65536
        image[at : at + 4096] = superblock_090(number, fields)
        return bytes(image)
    sector = VERSIONS[version]
    raw = bytearray(4096)
    struct.pack_into("<II", raw, 0, 0xA92B4EFC, 1)
    raw[16:32], raw[32:64] = UUID, b"host:array".ljust(32, b"\0")
    struct.pack_into("<iIQII", raw, 72, 1, 0, DATA // 512, 0, 2)
    struct.pack_into("<QQQ", raw, 128, OFFSETS[version] // 512, DATA // 512, sector)
    struct.pack_into("<I", raw, 160, number)
    raw[168:184] = bytes([number % 256]) * 16
    struct.pack_into("<QQQ", raw, 192, 0, 17, NEVER)
    struct.pack_into("<I", raw, 220, 128)
    raw[256:512] = struct.pack("<128H", 0, 1, *[0xFFFF] * 126)
    for name, value in fields.items():
        layout, offset = FIELDS[name]
        struct.pack_into(layout, raw, offset, value)
    struct.pack_into("<I", raw, 216, 0)
    total = sum(struct.unpack("<128I", raw[:512]))
    struct.pack_into("<I", raw, 216, (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
    image[sector * 512 : sector * 512 + 4096] = raw
    image[OFFSETS[version] : OFFSETS[version] + len(content)] = content
    return bytes(image)


def superblock_090(number: int, fields: dict[str, int]) -> bytes:
    words = [0] * 1024
    words[:6] = [0xA92B4EFC, 0, fields.get("minor", 90), 0, 0, int.from_bytes(UUID[:4], "big")]
    words[13:16] = struct.unpack(">3I", UUID[4:])
    words[7:11] = [fields.get("level", 1) & 0xFFFFFFFF, DATA // 1024, 2, 2]
    words[33] = fields.get("state", 1)
    words[39] = fields.get("events", 17)
    for disk in range(2):
        state = fields.get("disk_state", 6) if disk == number else 6
        words[128 + 32 * disk : 133 + 32 * disk] = [disk, 0, 0, disk, state]
    words[992] = number
    total = sum(words)
    words[38] = (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF
    return struct.pack("<1024I", *words)
