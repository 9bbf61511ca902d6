"""Which shared libraries a program needs, and where the dynamic linker finds them.

Only the parts of the format that the linker itself looks at: program headers and the dynamic
section (ELF specification 1.2, elf(5); search order and $ORIGIN: ld.so(8)).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from imager.errors import FormatError, NotRecognized, ToolError

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 15, 29

_MAX_DYNAMIC = 1 << 20
_MAX_STRING = 4096
_MAX_HEADERS = 1 << 16

# struct ld.so.cache of glibc (elf/dl-cache.h, "new" format): header and entry.
_CACHE_MAGIC = b"glibc-ld.so.cache1.1"
_CACHE_HEADER = struct.Struct("=20sII20x")
_CACHE_ENTRY = struct.Struct("=iIIIQ")
_MAX_CACHE = 64 << 20

_STANDARD_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")


@dataclass(frozen=True)
class Elf:
    """``bits`` 32 or 64, ``machine`` is e_machine; ``loaded_size``: the bytes up to the end of
    what is ever loaded (behind it are symbols and section headers, for debuggers only)."""

    path: Path
    bits: int
    machine: int
    loaded_size: int
    interpreter: str | None = None
    needed: tuple[str, ...] = ()
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()

    def search_folders(self) -> tuple[str, ...]:
        """Its own, with $ORIGIN replaced. RUNPATH makes the linker ignore RPATH."""
        origin = str(self.path.parent)
        folders = self.runpath or self.rpath
        return tuple(
            os.path.normpath(text)
            for text in (f.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) for f in folders)
            if text.startswith("/") and "$" not in text
        )


def is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def read_elf(path: Path) -> Elf:
    """Raises NotRecognized for other files and FormatError for a damaged one."""
    with path.open("rb") as file:
        return _Reader(path, file).elf()


class _Reader:
    """One file; every offset is checked against its size."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        ident = file.read(16)
        if len(ident) < 16 or ident[:4] != b"\x7fELF":
            raise NotRecognized(f"{path} is no ELF file")
        if ident[4] not in (1, 2) or ident[5] not in (1, 2):
            raise FormatError(f"{path}: unknown kind of ELF file (class {ident[4]})")
        self._wide = ident[4] == 2
        self._order = "<" if ident[5] == 1 else ">"

    def elf(self) -> Elf:
        layout = "HHIQQQIHHHHHH" if self._wide else "HHIIIIIHHHHHH"
        header = self._unpack(layout, 16)
        machine, offset, entry_size, count = header[1], header[4], header[8], header[9]
        segments = list(self._segments(offset, entry_size, count))
        loads = [s for s in segments if s.kind == _PT_LOAD]
        ends = [s.offset + s.size for s in segments] + [offset + entry_size * count]
        found = _Dynamic()
        interpreter = None
        for segment in segments:
            if segment.kind == _PT_DYNAMIC:
                found = self._dynamic(segment, loads)
            elif segment.kind == _PT_INTERP:
                interpreter = self._string(segment.offset)
        return Elf(
            path=self._path,
            bits=64 if self._wide else 32,
            machine=machine,
            loaded_size=min(max(ends), self._size),
            interpreter=interpreter,
            needed=tuple(found.needed),
            rpath=_folders(found.rpath),
            runpath=_folders(found.runpath),
        )

    def _segments(self, offset: int, entry_size: int, count: int) -> Iterator[_Segment]:
        layout = "IIQQQQQQ" if self._wide else "IIIIIIII"
        least = struct.calcsize(self._order + layout)
        if count and (entry_size < least or count >= _MAX_HEADERS):
            raise FormatError(f"{self._path}: damaged ELF header ({count} segments)")
        for index in range(count):
            values = self._unpack(layout, offset + index * entry_size)
            if self._wide:
                kind, _, start, address, _, size = values[:6]
            else:
                kind, start, address, _, size = values[:5]
            yield _Segment(kind, start, address, size)

    def _dynamic(self, segment: _Segment, loads: list[_Segment]) -> _Dynamic:
        layout = "qQ" if self._wide else "iI"
        step = struct.calcsize(self._order + layout)
        if segment.size > _MAX_DYNAMIC:
            raise FormatError(f"{self._path}: a dynamic section of {segment.size} bytes")
        pairs = []
        for at in range(segment.offset, segment.offset + segment.size - step + 1, step):
            tag, value = self._unpack(layout, at)
            if tag == _DT_NULL:
                break
            pairs.append((tag, value))
        tables = [value for tag, value in pairs if tag == _DT_STRTAB]
        found = _Dynamic()
        if not tables:
            return found
        strings = self._file_offset(tables[0], loads)
        for tag, value in pairs:
            if tag == _DT_NEEDED:
                found.needed.append(self._string(strings + value))
            elif tag == _DT_RPATH:
                found.rpath = self._string(strings + value)
            elif tag == _DT_RUNPATH:
                found.runpath = self._string(strings + value)
        return found

    def _file_offset(self, address: int, loads: list[_Segment]) -> int:
        for load in loads:
            if load.address <= address < load.address + load.size:
                return load.offset + address - load.address
        raise FormatError(f"{self._path}: no segment holds the address {address:#x}")

    def _string(self, offset: int) -> str:
        raw, end, _ = self._bytes(offset, _MAX_STRING, short=True).partition(b"\0")
        if not end:
            raise FormatError(f"{self._path}: no end of the string at {offset}")
        return os.fsdecode(raw)

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        fields = struct.Struct(self._order + layout)
        return fields.unpack(self._bytes(offset, fields.size))

    def _bytes(self, offset: int, size: int, *, short: bool = False) -> bytes:
        if offset >= self._size or (offset + size > self._size and not short):
            raise FormatError(f"{self._path}: a structure at {offset} lies behind the file's end")
        self._file.seek(offset)
        return self._file.read(size)


@dataclass(frozen=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int


@dataclass
class _Dynamic:
    needed: list[str] = field(default_factory=list)
    rpath: str = ""
    runpath: str = ""


def _folders(text: str) -> tuple[str, ...]:
    return tuple(folder for folder in text.split(":") if folder)


# --- finding libraries --------------------------------------------------------------------------


class LibraryFinder:
    """Finds libraries as the dynamic linker of this machine does, without running anything.

    Builds for newer processors (glibc-hwcaps) are passed over: the result has to run anywhere.
    """

    def __init__(self, cache: Path = Path("/etc/ld.so.cache")) -> None:
        self._cache_path = cache

    @cached_property
    def _cache(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for name, path in read_cache(self._cache_path):
            found.setdefault(name, []).append(path)
        return found

    def find(self, name: str, elf: Elf, inherited: tuple[str, ...] = ()) -> Path:
        """The library ``name`` that ``elf`` needs; ``inherited``: folders of who loads it.

        Raises ToolError when there is none for its architecture.
        """
        for path in self._candidates(name, elf, inherited):
            if _fits(path, elf):
                return path
        raise ToolError(
            f"{elf.path} needs {name}, which is not installed",
            hint=f"install the package that has {name}",
        )

    def _candidates(self, name: str, elf: Elf, inherited: tuple[str, ...]) -> Iterator[Path]:
        if "/" in name:
            yield Path(name)
            return
        for folder in (*elf.search_folders(), *inherited):
            yield Path(folder, name)
        yield from self._cache.get(name, ())
        for folder in _STANDARD_FOLDERS:
            yield Path(folder, name)


def _fits(path: Path, elf: Elf) -> bool:
    try:
        found = read_elf(path)
    except (OSError, NotRecognized, FormatError):
        return False
    return (found.bits, found.machine) == (elf.bits, elf.machine)


def read_cache(path: Path) -> Iterator[tuple[str, Path]]:
    """Name and place of each library in glibc's cache, without those for newer processors.

    Nothing when there is no cache (musl has none) or it is in no known format.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_CACHE)
    except OSError:
        return
    start = raw.find(_CACHE_MAGIC)  # an older format may precede it
    if start < 0 or len(raw) < start + _CACHE_HEADER.size:
        return
    raw = raw[start:]
    _, count, _ = _CACHE_HEADER.unpack_from(raw)
    if _CACHE_HEADER.size + count * _CACHE_ENTRY.size > len(raw):
        return
    for index in range(count):
        at = _CACHE_HEADER.size + index * _CACHE_ENTRY.size
        _, key, value, _, hwcap = _CACHE_ENTRY.unpack_from(raw, at)
        name, place = _cache_string(raw, key), _cache_string(raw, value)
        if hwcap == 0 and name and place.startswith("/"):
            yield name, Path(place)


def _cache_string(raw: bytes, offset: int) -> str:
    end = raw.find(b"\0", offset, offset + _MAX_STRING)
    return os.fsdecode(raw[offset:end]) if end > offset else ""
