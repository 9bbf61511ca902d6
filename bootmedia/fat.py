"""A small FAT filesystem as bytes: the EFI system partition of a rescue medium.

Written from Microsoft's "FAT: General Overview of On-Disk Format" (fatgen103). Names are 8.3 and
upper case, as those of UEFI loaders are; the same input gives the same bytes.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from imager.errors import UsageError

_SECTOR = 512
_SECTORS_PER_CLUSTER = 4
_CLUSTER = _SECTORS_PER_CLUSTER * _SECTOR
_RESERVED_SECTORS = 1
_FATS = 2
_ROOT_ENTRIES = 512
_MEDIA = 0xF8  # a fixed disk
_GEOMETRY = (63, 255)  # sectors per track, heads: nobody uses them, mtools wants them
_DRIVE = 0x80
_EXTENDED = 0x29  # serial number, label and kind follow

# The number of clusters alone decides which kind of FAT it is. Some readers are off by a few: the
# specification advises to stay away from the limit.
_FAT12_LIMIT = 4085
_FAT16_LIMIT = 65525
_DISTANCE = 16

_LABEL = 0x08
_DIRECTORY = 0x10
_ARCHIVE = 0x20

_BOOT_SECTOR = struct.Struct("<3s8sHBHBHHBHHHIIBxBI11s8s")
# Times of creation and access, which are optional, stay zero.
_ENTRY = struct.Struct("<11sB8x2xHHHI")
_NAME = re.compile(r"[A-Z0-9_~-]{1,8}(\.[A-Z0-9_~-]{1,3})?")
_CHAIN_END = 0xFFFF


@dataclass
class _Folder:
    files: dict[str, bytes] = field(default_factory=dict)
    folders: dict[str, _Folder] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stamp:
    """Time and date as FAT has them: steps of two seconds, years 1980 to 2107, here in UTC."""

    clock: int
    date: int

    @classmethod
    def at(cls, seconds: int) -> _Stamp:
        when = time.gmtime(min(max(seconds, _FIRST_SECOND), _LAST_SECOND))
        return cls(
            when.tm_hour << 11 | when.tm_min << 5 | when.tm_sec // 2,
            (when.tm_year - 1980) << 9 | when.tm_mon << 5 | when.tm_mday,
        )


_FIRST_SECOND = 315532800  # 1980-01-01
_LAST_SECOND = 4354819199  # 2107-12-31


def fat_image(files: Mapping[str, bytes], *, serial: int, label: str, created: int) -> bytes:
    """A FAT12 or FAT16 filesystem that holds the files, named by path ("EFI/BOOT/BOOTX64.EFI").

    ``serial`` is the volume's number (32 bits), ``created`` the time of every entry, in seconds
    since 1970. The result is a multiple of 2 KiB. Raises UsageError for a name that is not 8.3,
    for a path twice, and for more than fits FAT16 with clusters of 2 KiB (128 MiB).
    """
    stamp = _Stamp.at(created)
    clusters = _Clusters()
    volume_label = label.upper().encode("ascii", "replace")[:11].ljust(11)
    root = [_entry(volume_label, _LABEL, stamp), *_entries(_tree(files), 0, clusters, stamp)]
    if len(root) > _ROOT_ENTRIES:
        raise UsageError(f"FAT: {len(root)} entries in the root, {_ROOT_ENTRIES} is the most")
    clusters.keep_away_from_the_limit()
    table = _table(clusters.chains)
    head = _boot_sector(len(clusters.data), len(table), serial, volume_label)
    root_area = b"".join(root).ljust(_ROOT_ENTRIES * _ENTRY.size, b"\0")
    return _padded(b"".join([head, table * _FATS, root_area, *clusters.data]), _CLUSTER)


class _Clusters:
    """The data area; the filesystem counts its clusters from 2."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.chains: list[int] = []

    def reserve(self, size: int) -> int:
        """The first of enough clusters in a row; 0 when none are needed."""
        count = -(-size // _CLUSTER)
        if not count:
            return 0
        first = len(self.data) + 2
        self.data += [bytes(_CLUSTER)] * count
        self.chains += [*range(first + 1, first + count), _CHAIN_END]
        return first

    def fill(self, first: int, content: bytes) -> None:
        for number, start in enumerate(range(0, len(content), _CLUSTER), first - 2):
            self.data[number] = _padded(content[start : start + _CLUSTER], _CLUSTER)

    def keep_away_from_the_limit(self) -> None:
        if abs(len(self.data) - _FAT12_LIMIT) <= _DISTANCE:
            free = _FAT12_LIMIT + _DISTANCE + 1 - len(self.data)
            self.data += [bytes(_CLUSTER)] * free
            self.chains += [0] * free
        if len(self.data) > _FAT16_LIMIT - _DISTANCE:
            raise UsageError(f"FAT: {len(self.data) * _CLUSTER} bytes are more than FAT16 holds")


def _tree(files: Mapping[str, bytes]) -> _Folder:
    root = _Folder()
    for path, content in files.items():
        *parents, name = path.upper().strip("/").split("/")
        folder = root
        for part in parents:
            folder = folder.folders.setdefault(_checked(part, path), _Folder())
        if _checked(name, path) in folder.files:
            raise UsageError(f"FAT: {path} is there twice")
        folder.files[name] = content
    return root


def _checked(name: str, path: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(f"FAT: {path}: {name!r} is no 8.3 name")
    return name


def _entries(folder: _Folder, own: int, clusters: _Clusters, stamp: _Stamp) -> Iterator[bytes]:
    """The directory entries of a folder that begins at cluster ``own``; what they name is put
    into clusters."""
    if both := folder.files.keys() & folder.folders.keys():
        raise UsageError(f"FAT: {min(both)} is a file and a folder")
    for name, child in sorted(folder.folders.items()):
        first = clusters.reserve((2 + len(child.folders) + len(child.files)) * _ENTRY.size)
        dots = [
            _entry(b".", _DIRECTORY, stamp, first),
            _entry(b"..", _DIRECTORY, stamp, own),
        ]
        clusters.fill(first, b"".join([*dots, *_entries(child, first, clusters, stamp)]))
        yield _entry(_short(name), _DIRECTORY, stamp, first)
    for name, content in sorted(folder.files.items()):
        first = clusters.reserve(len(content))
        clusters.fill(first, content)
        yield _entry(_short(name), _ARCHIVE, stamp, first, len(content))


def _entry(name: bytes, kind: int, stamp: _Stamp, first: int = 0, size: int = 0) -> bytes:
    return _ENTRY.pack(name.ljust(11), kind, stamp.clock, stamp.date, first, size)


def _short(name: str) -> bytes:
    stem, _, extension = name.partition(".")
    return stem.encode().ljust(8) + extension.encode()


def _table(chains: list[int]) -> bytes:
    """One FAT. Its first two entries are no clusters: the media byte, and "was unmounted"."""
    entries = [0xFF00 | _MEDIA, _CHAIN_END, *chains]
    if len(chains) < _FAT12_LIMIT:
        return _padded(_twelve_bits(entries), _SECTOR)
    return _padded(struct.pack(f"<{len(entries)}H", *entries), _SECTOR)


def _twelve_bits(entries: Iterable[int]) -> bytes:
    """Two entries in three bytes, low bits first."""
    number = 0
    count = 0
    table = bytearray()
    for count, entry in enumerate(entries, 1):
        number |= (entry & 0xFFF) << (0 if count % 2 else 12)
        if count % 2 == 0:
            table += number.to_bytes(3, "little")
            number = 0
    return bytes(table + number.to_bytes(2, "little") if count % 2 else table)


def _boot_sector(clusters: int, table_size: int, serial: int, label: bytes) -> bytes:
    """With the BIOS parameter block. There is no boot code: only UEFI boots from it."""
    table_sectors = table_size // _SECTOR
    root_sectors = _ROOT_ENTRIES * _ENTRY.size // _SECTOR
    used = _RESERVED_SECTORS + _FATS * table_sectors + root_sectors
    total = used + clusters * _SECTORS_PER_CLUSTER
    total += -total % _SECTORS_PER_CLUSTER
    head = _BOOT_SECTOR.pack(
        b"\xeb\x3c\x90",  # the jump over the parameters that every FAT begins with
        b"MSWIN4.1",  # what the specification recommends for the sake of old readers
        _SECTOR,
        _SECTORS_PER_CLUSTER,
        _RESERVED_SECTORS,
        _FATS,
        _ROOT_ENTRIES,
        total if total < 1 << 16 else 0,
        _MEDIA,
        table_sectors,
        *_GEOMETRY,
        0,  # sectors before the volume
        0 if total < 1 << 16 else total,
        _DRIVE,
        _EXTENDED,
        serial & 0xFFFFFFFF,
        label,
        b"FAT12   " if clusters < _FAT12_LIMIT else b"FAT16   ",
    )
    return head.ljust(_SECTOR - 2, b"\0") + b"\x55\xaa"


def _padded(content: bytes, unit: int) -> bytes:
    return content + bytes(-len(content) % unit)
