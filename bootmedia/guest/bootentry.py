"""The firmware's boot entries, through efivarfs.

UEFI Specification 2.10: 3.1.3 (load options), 3.3 (Boot####, BootOrder), 10.3.5 (hard drive and
file path nodes); Linux Documentation/filesystems/efivarfs.rst.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from imager.errors import FormatError, ImagerError
from imager.partitions import Partition
from imager.process import run

EFIVARS = Path("/sys/firmware/efi/efivars")

_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_ATTRIBUTES = struct.Struct("<I")
_NON_VOLATILE_BOOT_RUNTIME = 7
_BOOT_ENTRY = re.compile(r"Boot([0-9A-F]{4})-" + _GLOBAL + r"\Z")

_ACTIVE = 1  # LOAD_OPTION_ACTIVE
_OPTION = struct.Struct("<IH")
_NODE = struct.Struct("<BBH")
_HARD_DRIVE = struct.Struct("<IQQ16sBB")
_MEDIA, _MEDIA_HARD_DRIVE, _MEDIA_FILE = 4, 1, 4
_END, _END_ALL = 0x7F, 0xFF
_MBR, _GPT = 1, 2

# What firmware takes is far less; damaged variables are no reason for more.
_MAX_VARIABLE = 64 << 10

# linux/fs.h: _IOR('f', 1, long), _IOW('f', 2, long)
_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10


@dataclass(frozen=True)
class HardDrive:
    """A partition as firmware knows it; ``start`` and ``size`` in logical sectors."""

    number: int
    start: int
    size: int
    signature: bytes
    """16 bytes: the partition's GUID, or the MBR's signature in the first four."""
    is_gpt: bool

    @classmethod
    def of(cls, partition: Partition, sector_size: int, *, is_gpt: bool) -> HardDrive:
        """``sector_size`` in bytes. Raises FormatError for a partition without a sound id."""
        try:
            if is_gpt:
                signature = uuid.UUID(partition.uuid or "").bytes_le
            else:  # PARTUUID is the disk's signature and the number
                disk_id = int((partition.uuid or "").partition("-")[0], 16)
                signature = struct.pack("<I12x", disk_id)
        except (ValueError, struct.error):
            raise FormatError(f"partition {partition.number} has no id to boot by") from None
        start, size = partition.offset // sector_size, partition.size // sector_size
        return cls(partition.number, start, size, signature, is_gpt)


@dataclass(frozen=True)
class LoadOption:
    """One Boot#### variable. ``path`` is the file's, with backslashes."""

    description: str
    drive: HardDrive | None
    path: str | None
    attributes: int = _ACTIVE
    data: bytes = b""

    def encode(self) -> bytes:
        nodes = b""
        if self.drive is not None:
            drive, kind = self.drive, _GPT if self.drive.is_gpt else _MBR
            nodes += _node(
                _MEDIA_HARD_DRIVE,
                _HARD_DRIVE.pack(
                    *(drive.number, drive.start, drive.size, drive.signature, kind, kind)
                ),
            )
        if self.path is not None:
            nodes += _node(_MEDIA_FILE, _utf16(self.path))
        nodes += _NODE.pack(_END, _END_ALL, _NODE.size)
        head = _OPTION.pack(self.attributes, len(nodes))
        return head + _utf16(self.description) + nodes + self.data

    @classmethod
    def decode(cls, content: bytes) -> LoadOption:
        """Raises FormatError. Nodes of other kinds are passed over."""
        if len(content) < _OPTION.size:
            raise FormatError("a load option is cut off")
        attributes, length = _OPTION.unpack_from(content)
        end = _OPTION.size
        while content[end : end + 2] not in (b"\0\0", b"", content[end : end + 1]):
            end += 2
        description = content[_OPTION.size : end].decode("utf-16-le", "replace")
        nodes = content[end + 2 : end + 2 + length]
        if content[end : end + 2] != b"\0\0" or len(nodes) != length:
            raise FormatError("a load option is cut off")
        drive, path = _parse_nodes(nodes)
        return cls(description, drive, path, attributes, content[end + 2 + length :])

    def boots_the_same(self, other: LoadOption) -> bool:
        """Whether both start the same file of the same partition."""
        return (
            self.drive == other.drive
            and self.path is not None
            and other.path is not None
            and self.path.lower() == other.path.lower()
        )


def mount_variables() -> None:
    """Make them files, unless they are already; without effect on a machine that booted by BIOS."""
    if EFIVARS.is_dir() and not any(EFIVARS.iterdir()):
        run(["mount", "-t", "efivarfs", "efivarfs", str(EFIVARS)], accept=range(256))


class Variables:
    """The firmware's variables of the global kind, in an efivarfs."""

    def __init__(self, folder: Path = EFIVARS) -> None:
        self.folder = folder

    def boot_entries(self) -> dict[int, LoadOption]:
        """All that can be read, by number."""
        found = {}
        for path in sorted(self.folder.iterdir()):
            if match := _BOOT_ENTRY.match(path.name):
                with suppress(FormatError, OSError):
                    found[int(match[1], 16)] = LoadOption.decode(self.read(path.name) or b"")
        return found

    def boot_order(self) -> list[int]:
        raw = self.read(f"BootOrder-{_GLOBAL}") or b""
        return [number for (number,) in struct.iter_unpack("<H", raw[: len(raw) // 2 * 2])]

    def write_boot_entry(self, number: int, option: LoadOption) -> None:
        self._write(f"Boot{number:04X}-{_GLOBAL}", option.encode())

    def write_boot_order(self, order: list[int]) -> None:
        self._write(f"BootOrder-{_GLOBAL}", struct.pack(f"<{len(order)}H", *order))

    def is_free(self, number: int) -> bool:
        return not (self.folder / f"Boot{number:04X}-{_GLOBAL}").exists()

    def read(self, name: str) -> bytes | None:
        """A variable's value; None when it doesn't exist. Raises OSError."""
        try:
            with (self.folder / name).open("rb") as file:
                return file.read(_MAX_VARIABLE)[_ATTRIBUTES.size :]
        except FileNotFoundError:
            return None

    def _write(self, name: str, value: bytes) -> None:
        """At one go, as efivarfs wants it. Raises OSError."""
        path = self.folder / name
        with suppress(OSError):
            _make_mutable(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            content = _ATTRIBUTES.pack(_NON_VOLATILE_BOOT_RUNTIME) + value
            if os.write(fd, content) != len(content):
                raise OSError(f"{name} was not written whole")
        finally:
            os.close(fd)


def put_first(option: LoadOption, variables: Variables | None = None) -> tuple[int, bool]:
    """Make the firmware try ``option`` first: (number of the entry, whether it is a new one).

    An entry that starts the same file is used again. Raises ImagerError where there are no
    firmware variables, or they can't be written.
    """
    variables = variables or Variables()
    if not variables.folder.is_dir() or not any(variables.folder.iterdir()):
        raise ImagerError(
            "there are no UEFI variables to write",
            hint="this system was not started by UEFI, or efivarfs is not mounted",
        )
    try:
        known = variables.boot_entries()
        same = [number for number, other in known.items() if other.boots_the_same(option)]
        number = same[0] if same else _free_number(variables)
        if not same or not known[number].attributes & _ACTIVE:
            variables.write_boot_entry(number, option)
        order = variables.boot_order()
        wanted = [number, *(other for other in order if other != number)]
        if order != wanted:
            variables.write_boot_order(wanted)
    except OSError as error:
        raise ImagerError(f"the UEFI boot entry could not be written: {error}") from None
    return number, not same


def _free_number(variables: Variables) -> int:
    return next(number for number in range(0x10000) if variables.is_free(number))


def _make_mutable(path: Path) -> None:
    """The kernel protects variables from `rm -rf`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(fd, _GET_FLAGS, bytes(8)))
        if flags & _IMMUTABLE:
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("l", flags & ~_IMMUTABLE))
    finally:
        os.close(fd)


def _node(subtype: int, body: bytes) -> bytes:
    return _NODE.pack(_MEDIA, subtype, _NODE.size + len(body)) + body


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-le") + b"\0\0"


def _parse_nodes(nodes: bytes) -> tuple[HardDrive | None, str | None]:
    drive: HardDrive | None = None
    path: str | None = None
    at = 0
    while at + _NODE.size <= len(nodes):
        kind, subtype, length = _NODE.unpack_from(nodes, at)
        if length < _NODE.size or at + length > len(nodes):
            raise FormatError("a device path is damaged")
        body = nodes[at + _NODE.size : at + length]
        if (kind, subtype) == (_END, _END_ALL):
            break
        if (kind, subtype) == (_MEDIA, _MEDIA_HARD_DRIVE) and len(body) == _HARD_DRIVE.size:
            number, start, size, signature, form, _ = _HARD_DRIVE.unpack(body)
            drive = HardDrive(number, start, size, signature, form == _GPT)
        elif (kind, subtype) == (_MEDIA, _MEDIA_FILE):
            path = body.decode("utf-16-le", "replace").rstrip("\0")
        at += length
    return drive, path
