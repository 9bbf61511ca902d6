"""Folders of Clonezilla: the disks that its saved partitions and tables make up.

Source: Clonezilla's own scripts (``ocs-functions``, ``ocs-sr``) and its page "The files in the
image repository". A folder has ``disk`` or ``parts``, and for each disk the table as sfdisk's dump
(``sda-pt.sf``) and parted's print (``sda-pt.parted``), raw sectors (``sda-mbr``, ``sda-gpt-1st``,
``sda-gpt-2nd``, ``sda-hidden-data-after-mbr``), and a file, or several (.aa, .ab), per partition.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from imager.blocksource import FileSource
from imager.errors import FormatError, UnsupportedError
from imager.foreign import make_raw
from imager.process import run
from imager.progress import Progress

_SECTOR = 512
_COPY_BYTES = 1 << 20

# A boot loader's code in the first sector ends where the disk's signature and the table begin.
_BOOT_CODE_BYTES = 440

_LARGEST_TEXT = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_]+")
_DISK_LINE = re.compile(r"^Disk /dev/\S+: (\d+)s$", re.MULTILINE)
_SECTOR_LINE = re.compile(r"^Sector size \(logical/physical\): (\d+)B", re.MULTILINE)
_PART_LINE = re.compile(r"^/dev/(\w+) : start= *(\d+), size= *(\d+)(?:, type= *(\w[\w-]*))?")

# What is behind a partition's name in a file's name.
_SAVED = re.compile(r"\.(?P<kind>\S+?)-(?P<how>ptcl-img|dd-img|ntfs-img|img)\b(?P<rest>.*)")
_EXTENDED = {"5", "f", "85", "05", "0f"}


@dataclass(frozen=True)
class AssembledDisk:
    """A raw, sparse file; ``kind`` says how its partitions were stored."""

    name: str
    path: Path
    kind: str


@dataclass(frozen=True)
class _Part:
    """Sizes and offsets in bytes."""

    name: str
    offset: int
    size: int
    type: str


def is_clonezilla(folder: Path) -> bool:
    return (folder / "disk").is_file() or (folder / "parts").is_file()


def assemble(folder: Path, scratch: Path, progress: Progress) -> list[AssembledDisk]:
    """Each disk as a file in ``scratch``. Raises UnsupportedError naming what it can't do with,
    FormatError for what is missing or wrong, ToolError."""
    return [_Assembly(folder, name, scratch, progress).run() for name in _disk_names(folder)]


def _disk_names(folder: Path) -> list[str]:
    if (folder / "ecryptfs.info").exists():
        raise UnsupportedError(f"{folder} is encrypted by eCryptfs: not supported")
    if (folder / "disk").is_file():
        names = _text(folder / "disk").split()
    else:
        names = sorted(path.name.removesuffix("-pt.sf") for path in folder.glob("*-pt.sf"))
    if not names or not all(_NAME.fullmatch(name) for name in names):
        raise FormatError(f"{folder} names no disk")
    return names


class _Assembly:
    """One disk."""

    def __init__(self, folder: Path, name: str, scratch: Path, progress: Progress) -> None:
        self._folder, self._name = folder, name
        self._scratch, self._progress = scratch, progress
        self._path = scratch / name
        self._dump = _text(folder / f"{name}-pt.sf")
        self._parts = _read_parts(self._dump)
        self._saved = set(_text(folder / "parts").split())
        self._kinds: set[str] = set()

    def run(self) -> AssembledDisk:
        self._check()
        size = self._size()
        with self._path.open("wb") as file:
            file.truncate(size)
        for part in self._parts:
            if part.name in self._saved and part.type not in _EXTENDED:
                self._fill(part)
        self._write_table(size)
        return AssembledDisk(self._name, self._path, ", ".join(sorted(self._kinds)) or "empty")

    def _check(self) -> None:
        """All that can't be done, before anything is."""
        if (self._folder / "lvm_vg_dev.list").exists():
            raise UnsupportedError(
                f"{self._folder} holds logical volumes: not supported",
                hint="restore it with Clonezilla and capture the disk",
            )
        for part in self._parts:
            if part.name not in self._saved or part.type in _EXTENDED:
                continue
            if not self._is_swap(part):
                self._find(part)

    def _size(self) -> int:
        text = _text(self._folder / f"{self._name}-pt.parted")
        sectors, unit = _DISK_LINE.search(text), _SECTOR_LINE.search(text)
        if sectors is None:
            raise FormatError(
                f"{self._folder}/{self._name}-pt.parted does not tell the disk's size"
            )
        if unit is not None and int(unit[1]) != _SECTOR:
            raise UnsupportedError(f"{self._name} has sectors of {unit[1]} bytes: not supported")
        size = int(sectors[1]) * _SECTOR
        for part in self._parts:
            if part.offset + part.size > size:
                raise FormatError(f"{part.name} ends behind the disk's end")
        return size

    # --- partitions ---

    def _fill(self, part: _Part) -> None:
        self._progress.note(f"unpacking {part.name}")
        raw = self._scratch / f"{part.name}.part"
        if self._is_swap(part):
            self._make_swap(part, raw)
        else:
            kind, files = self._find(part)
            stored = make_raw(files, raw, self._scratch)
            if ("partclone" in stored) != (kind == "ptcl-img"):
                raise FormatError(f"{files[0]} is not what its name says, but {stored}")
            self._kinds.add(stored)
        if raw.stat().st_size > part.size and self._content_end(raw) > part.size:
            raise FormatError(f"{part.name}: what is stored is larger than the partition")
        self._copy(raw, part)
        raw.unlink()

    def _find(self, part: _Part) -> tuple[str, list[Path]]:
        """How it was saved, and the files in order."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self._folder.glob(f"{part.name}.*")):
            match = _SAVED.fullmatch(path.name.removeprefix(part.name))
            if match:
                found.setdefault(match["how"], []).append(path)
        if not found:
            raise FormatError(f"{self._folder} has no file of {part.name}")
        ((how, files),) = list(found.items())[:1]
        if how in ("ntfs-img", "img"):
            program = "ntfsclone" if how == "ntfs-img" else "partimage"
            raise UnsupportedError(f"{files[0]} is an image of {program}: not supported")
        rest = files[0].name
        if ".lrz" in rest or ".lzo" in rest:
            raise UnsupportedError(f"{files[0]}: its compression is not supported")
        return how, files

    def _is_swap(self, part: _Part) -> bool:
        return (self._folder / f"swappt-{part.name}.info").is_file()

    def _make_swap(self, part: _Part, raw: Path) -> None:
        """Clonezilla keeps only the identity of swap, and makes it anew too."""
        known = dict(
            re.findall(
                r'^(UUID|LABEL)="([^"]*)"',
                _text(self._folder / f"swappt-{part.name}.info"),
                re.MULTILINE,
            )
        )
        with raw.open("wb") as file:
            file.truncate(part.size)
        options = [f"--uuid={known['UUID']}"] if known.get("UUID") else []
        options += [f"--label={known['LABEL']}"] if known.get("LABEL") else []
        run(["mkswap", "--quiet", *options, "--", str(raw)])
        self._kinds.add("swap")

    def _content_end(self, raw: Path) -> int:
        with FileSource(raw) as source:
            return source.data_extents().end

    def _copy(self, raw: Path, part: _Part) -> None:
        with FileSource(raw) as source, self._path.open("r+b") as disk:
            for extent in source.data_extents().clip(0, part.size):
                for at in range(extent.offset, extent.end, _COPY_BYTES):
                    disk.seek(part.offset + at)
                    disk.write(source.pread(at, min(_COPY_BYTES, extent.end - at)))

    # --- the table ---

    def _write_table(self, size: int) -> None:
        """GPT has both its copies saved. Of MBR only the first sector is: sfdisk makes those that
        describe logical partitions, and the rest goes over that."""
        first = self._bytes("gpt-1st")
        if first is not None:
            self._put(0, first)
            last = self._bytes("gpt-2nd")
            if last is not None:
                if last[-_SECTOR : -_SECTOR + 8] != b"EFI PART":
                    raise FormatError(f"{self._folder}/{self._name}-gpt-2nd is no end of a disk")
                self._put(size - len(last), last)
        else:
            run(
                [
                    "sfdisk",
                    "--no-reread",
                    "--no-tell-kernel",
                    "--quiet",
                    "--wipe=never",
                    "--wipe-partitions=never",
                    str(self._path),
                ],
                input_bytes=self._dump.encode(),
            )
        boot = self._bytes("mbr")
        if boot is not None:
            self._put(0, boot[:_BOOT_CODE_BYTES] if first is not None else boot[:_SECTOR])
        hidden = self._bytes("hidden-data-after-mbr")
        if hidden is not None and first is None:
            room = min((part.offset for part in self._parts), default=size) - _SECTOR
            self._put(_SECTOR, hidden[: max(room, 0)])

    def _bytes(self, what: str) -> bytes | None:
        path = self._folder / f"{self._name}-{what}"
        try:
            with path.open("rb") as file:
                return file.read(64 << 20)
        except FileNotFoundError:
            return None

    def _put(self, offset: int, content: bytes) -> None:
        with self._path.open("r+b") as disk:
            disk.seek(offset)
            disk.write(content)


def _read_parts(dump: str) -> list[_Part]:
    """Of a dump of sfdisk, whose numbers are sectors."""
    found: list[_Part] = []
    for line in dump.splitlines():
        match = _PART_LINE.match(line.strip())
        if match and int(match[3]):
            offset, size = int(match[2]) * _SECTOR, int(match[3]) * _SECTOR
            found.append(_Part(match[1], offset, size, (match[4] or "").lower()))
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return os.fsdecode(file.read(_LARGEST_TEXT))
    except FileNotFoundError:
        raise FormatError(f"there is no {path}") from None
