"""What a kernel module says about itself: section ``.modinfo`` of its ELF file.

The section holds ``KEY=VALUE`` texts with zero bytes between (Linux include/linux/moduleparam.h,
MODULE_INFO). ELF: System V Application Binary Interface, chapter 4; both classes and byte orders.
Modules may be foreign files: every offset and length is checked against the file.
"""

from __future__ import annotations

import gzip
import lzma
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import zstandard

from bootmedia.moduleindex import module_name, normal_name
from imager.errors import FormatError

_MAX_MODULE_SIZE = 256 << 20
_CHUNK_SIZE = 1 << 20
_MAX_SECTIONS = 4096
_MAX_MODINFO_SIZE = 8 << 20
_MAX_NAMES_SIZE = 1 << 20

_ELF64, _ELF32 = 2, 1
_LITTLE, _BIG = 1, 2
_IDENTIFICATION = 16  # bytes before the fields whose size depends on the class

# e_type … e_shstrndx, and one section header
_HEADERS = {_ELF64: "HHIQQQIHHHHHH", _ELF32: "HHIIIIIHHHHHH"}
_SECTIONS = {_ELF64: "IIQQQQIIQQ", _ELF32: "IIIIIIIIII"}


@dataclass(frozen=True)
class ModuleInfo:
    """``depends`` are direct dependencies; ``softdeps`` lines like ``pre: crc32c``."""

    name: str
    depends: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    softdeps: tuple[str, ...] = ()
    firmware: tuple[str, ...] = ()


def read_modinfo(path: Path) -> ModuleInfo:
    """Of an uncompressed module. Raises FormatError when it is none."""
    values: dict[str, list[str]] = {}
    for text in _modinfo_section(path).decode(errors="replace").split("\0"):
        key, equals, value = text.partition("=")
        if equals:
            values.setdefault(key, []).append(value)
    depends = (name for line in values.get("depends", []) for name in line.split(",") if name)
    return ModuleInfo(
        name=module_name(path),
        depends=tuple(map(normal_name, depends)),
        aliases=tuple(values.get("alias", [])),
        softdeps=tuple(values.get("softdep", [])),
        firmware=tuple(values.get("firmware", [])),
    )


def uncompressed(path: Path, scratch: Path) -> Path:
    """The file itself, or its uncompressed content as a file in ``scratch``.

    By the suffix: ``.gz``, ``.xz`` or ``.zst``. Raises FormatError when the content is damaged or
    larger than any module or firmware is.
    """
    if path.suffix not in (".gz", ".xz", ".zst"):
        return path
    plain = scratch / path.stem
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with _open_compressed(path) as source, plain.open("wb") as sink:
            _copy(source, sink, path)
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise FormatError(f"{path} can't be unpacked: {error}") from None
    return plain


def _open_compressed(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    return cast(IO[bytes], zstandard.open(path, "rb"))


def _copy(source: IO[bytes], sink: IO[bytes], path: Path) -> None:
    """Gives up on endless content."""
    length = 0
    while chunk := source.read(_CHUNK_SIZE):
        length += len(chunk)
        if length > _MAX_MODULE_SIZE:
            raise FormatError(f"{path} unpacks to more than {_MAX_MODULE_SIZE >> 20} MiB")
        sink.write(chunk)


def _modinfo_section(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            return _find_section(file, size, b".modinfo")
    except (struct.error, _NotElf):
        raise FormatError(f"{path} is not a kernel module") from None
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None


class _NotElf(Exception):
    pass


def _find_section(file: BinaryIO, size: int, name: bytes) -> bytes:
    identification = _read(file, size, 0, _IDENTIFICATION)
    elf_class, byte_order = identification[4:6]
    if identification[:4] != b"\x7fELF" or elf_class not in _HEADERS:
        raise _NotElf
    if byte_order not in (_LITTLE, _BIG):
        raise _NotElf
    order = "<" if byte_order == _LITTLE else ">"
    header = struct.Struct(order + _HEADERS[elf_class])
    fields = header.unpack(_read(file, size, _IDENTIFICATION, header.size))
    table_offset, entry_size, count, names_number = fields[5], *fields[10:13]
    section = struct.Struct(order + _SECTIONS[elf_class])
    if entry_size != section.size or not 0 < count <= _MAX_SECTIONS or names_number >= count:
        raise _NotElf
    table = _read(file, size, table_offset, count * entry_size)
    sections = [section.unpack_from(table, number * entry_size) for number in range(count)]
    names = _read(file, size, *_place(sections[names_number], _MAX_NAMES_SIZE))
    for entry in sections:
        if names[entry[0] : entry[0] + len(name) + 1] == name + b"\0":
            return _read(file, size, *_place(entry, _MAX_MODINFO_SIZE))
    raise _NotElf


def _place(section: tuple[int, ...], limit: int) -> tuple[int, int]:
    """Offset and length of a section in bytes."""
    offset, length = section[4:6]
    if length > limit:
        raise _NotElf
    return offset, length


def _read(file: BinaryIO, size: int, offset: int, length: int) -> bytes:
    if offset + length > size:
        raise _NotElf
    file.seek(offset)
    content = file.read(length)
    if len(content) != length:
        raise _NotElf
    return content
