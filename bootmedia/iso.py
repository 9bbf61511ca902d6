"""The ISO of a rescue medium, written so that it boots from a disc and from a stick, and read back.

pycdlib decides what lies where and writes the file system's structures; the content of files is
copied and hashed here, because pycdlib takes a short read for the end of a file. Everything is
read again from the finished ISO, found by an independent look at its directories, before it gets
its name. The same plan gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from blake3 import blake3

from bootmedia.hybrid import ISO_BLOCK, PADDING, DiskIdentity, system_area, with_boot_info
from imager.errors import FormatError, ImagerError, IntegrityError, SourceError, UsageError
from imager.progress import NullProgress, Progress
from imager.store.local import sync_folder

BIOS_IMAGE = "boot/eltorito.img"
EFI_IMAGE = "boot/efi.img"
_CATALOG = ("/BOOT/BOOT.CAT;1", "boot.cat")

_CHUNK = 4 << 20
_ROCK_RIDGE = "1.09"
_FILE_MODE = 0o100444
_FOLDER_MODE = 0o040555
# Linux shortens longer Rock Ridge names.
_NAME_LIMIT = 250
# ISO 9660 has eight levels of folders with the root; deeper ones would be moved elsewhere.
_FOLDERS_LIMIT = 7
_BIOS_LOAD_SECTORS = 4
_EFI_PLATFORM = 0xEF
# pycdlib counts an El Torito image's sectors of 512 bytes in 16 bits.
_EFI_SIZE_LIMIT = 32 << 20
_SMALL_FILE = 16 << 20

_VOLUME_ID = re.compile(r"[A-Z0-9_]{1,32}")

# pycdlib asks the clock in these; nothing else in it depends on time or time zone.
_TIMED_MODULES = ("pycdlib", "headervd", "dates", "udf")
_CLOCK_LOCK = threading.Lock()


@dataclass(frozen=True)
class IsoFile:
    """A file on the ISO: its path there, without a slash in front, and what it holds."""

    path: str
    source: Path | bytes


@dataclass(frozen=True)
class BootImages:
    """GRUB's El Torito image for BIOS, the EFI system partition, and the boot sector for disks."""

    bios: bytes
    efi: bytes
    hybrid: bytes


@dataclass(frozen=True)
class IsoPlan:
    """An ISO to write. ``volume_id``: at most 32 of A-Z, 0-9, _. ``created`` in seconds since
    1970. Ids of disk and partition follow from ``medium_id`` and the volume id. Without ``boot``
    it holds data only."""

    volume_id: str
    medium_id: str
    files: tuple[IsoFile, ...]
    boot: BootImages | None
    created: int


@dataclass(frozen=True)
class WrittenFile:
    """A file as it stands on the ISO; ``size`` in bytes, ``digest`` BLAKE3 in hex digits."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class IsoInfo:
    """The finished ISO; ``size`` in bytes, ``sha256`` of all of it in hex digits."""

    size: int
    sha256: str
    files: tuple[WrittenFile, ...]


def write_iso(plan: IsoPlan, path: Path, progress: Progress | None = None) -> IsoInfo:
    """Write the ISO, read it back, and only then give it its name.

    Raises UsageError for a plan that no ISO can hold, SourceError when a source can't be read or
    changes meanwhile, IntegrityError when the ISO does not hold what was written, ImagerError when
    it can't be written.
    """
    progress = progress or NullProgress()
    _check(plan)
    items = _items(plan)
    with _appearing(path) as file:
        with _laid_out(plan, items) as (iso, blocks):
            iso.write_fp(file)
        file.flush()
        written = _copy_all(_told_where(plan, items, blocks), blocks, file.fileno(), progress)
        if plan.boot:
            _make_hybrid(plan, plan.boot, blocks, file.fileno())
        _settle(file.fileno())
        return _verify(Path(file.name), written, progress)


def read_iso_file(path: Path, name: str, *, limit: int = _SMALL_FILE) -> bytes:
    """The content of a small file on an ISO (or a stick with one).

    Raises FormatError when there is no such file or it has more than ``limit`` bytes.
    """
    with path.open("rb", buffering=0) as file:
        extents = _extents(file).get(name)
        if extents is None:
            raise FormatError(f"{path}: has no {name}")
        size = sum(length for _, length in extents)
        if size > limit:
            raise FormatError(f"{path}: {name} has {size} bytes, at most {limit} were expected")
        return b"".join(
            _exactly(file.fileno(), offset, length, f"{path}: {name}") for offset, length in extents
        )


# --- what is to be written -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    path: str
    source: Path | bytes
    size: int
    stamp: tuple[int, ...] = ()
    """Of the source file, to see that it does not change."""

    @classmethod
    def of(cls, file: IsoFile) -> _Item:
        if isinstance(file.source, bytes):
            return cls(file.path, file.source, len(file.source))
        try:
            stat = file.source.stat()
        except OSError as error:
            raise SourceError(f"{file.source}: {error.strerror}") from None
        return cls(file.path, file.source, stat.st_size, _stamp(stat))


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _items(plan: IsoPlan) -> list[_Item]:
    """The boot images first: old BIOSes reach only the beginning of a large stick."""
    boot = []
    if plan.boot:
        boot = [IsoFile(BIOS_IMAGE, plan.boot.bios), IsoFile(EFI_IMAGE, plan.boot.efi)]
    return [_Item.of(file) for file in (*boot, *plan.files)]


def _check(plan: IsoPlan) -> None:
    if not _VOLUME_ID.fullmatch(plan.volume_id):
        raise UsageError(f"not a volume id (at most 32 of A-Z, 0-9, _): {plan.volume_id!r}")
    if plan.boot and len(plan.boot.efi) >= _EFI_SIZE_LIMIT:
        raise UsageError("the EFI system partition has 32 MiB or more: El Torito can't hold it")
    for file in plan.files:
        *folders, _ = parts = file.path.split("/")
        for part in parts:
            if part in ("", ".", "..") or "\0" in part:
                raise UsageError(f"not a path on an ISO: {file.path!r}")
            if len(os.fsencode(part)) > _NAME_LIMIT:
                raise UsageError(f"a name of more than {_NAME_LIMIT} bytes: {file.path!r}")
        if len(folders) > _FOLDERS_LIMIT:
            raise UsageError(f"more than {_FOLDERS_LIMIT} folders in each other: {file.path!r}")


# --- the layout ----------------------------------------------------------------------------------


@contextmanager
def _laid_out(plan: IsoPlan, items: Sequence[_Item]) -> Iterator[tuple[Any, dict[str, int]]]:
    """A pycdlib object that knows where everything lies, and the block of each file that has
    content."""
    import pycdlib
    from pycdlib.pycdlibexception import PyCdlibException

    iso = pycdlib.PyCdlib()
    try:
        with _clock_at(plan.created):
            iso.new(
                interchange_level=3,
                rock_ridge=_ROCK_RIDGE,
                vol_ident=plan.volume_id,
                app_ident_str="IMAGER",
            )
            names = _add_all(iso, items)
            if plan.boot:
                _add_el_torito(iso, names)
            iso.force_consistency()
            blocks = {
                item.path: iso.get_record(iso_path=names[item.path]).extent_location()
                for item in items
                if item.size
            }
            # From here on it has nothing to copy.
            iso.inodes.clear()
            yield iso, blocks
    except (PyCdlibException, struct.error) as error:
        raise ImagerError(f"the ISO can't be laid out: {error}") from error


def _add_all(iso: Any, items: Sequence[_Item]) -> dict[str, str]:
    """Add folders and files; returns the plain ISO 9660 path of each."""
    names = _Names()
    for item in items:
        if item.path in names.known:
            raise UsageError(f"twice on the ISO: {item.path}")
        for folder in names.new_folders(item.path):
            iso.add_directory(
                names.known[folder], rr_name=folder.rpartition("/")[2], file_mode=_FOLDER_MODE
            )
        plain = names.add_file(item.path)
        # Only the length counts: the content does not come from here.
        iso.add_fp(
            io.BytesIO(),
            item.size,
            plain,
            rr_name=item.path.rpartition("/")[2],
            file_mode=_FILE_MODE,
        )
    return names.known


def _add_el_torito(iso: Any, names: Mapping[str, str]) -> None:
    catalog, name = _CATALOG
    iso.add_eltorito(
        names[BIOS_IMAGE],
        bootcatfile=catalog,
        rr_bootcatname=name,
        boot_load_size=_BIOS_LOAD_SECTORS,
    )
    iso.add_eltorito(names[EFI_IMAGE], platform_id=_EFI_PLATFORM, efi=True)


class _Names:
    """Plain ISO 9660 names of level 3, unique in their folder, for readers without Rock Ridge."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {"": ""}
        self._taken = {"/BOOT/BOOT.CAT;1"}

    def new_folders(self, path: str) -> Iterator[str]:
        """The folders above it that were not known yet, outer ones first."""
        *parts, _ = path.split("/")
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            if folder not in self.known:
                self.known[folder] = self._unique("/".join(parts[: depth - 1]), parts[depth - 1])
                yield folder

    def add_file(self, path: str) -> str:
        folder, _, name = path.rpartition("/")
        stem, _, extension = name.rpartition(".") if "." in name[1:] else (name, "", "")
        self.known[path] = self._unique(folder, stem, f".{_plain(extension, 3)};1")
        return self.known[path]

    def _unique(self, folder: str, name: str, ending: str = "") -> str:
        plain = f"{self.known[folder]}/{_plain(name, 20)}"
        number = 0
        while (path := f"{plain}{f'_{number}' if number else ''}{ending}") in self._taken:
            number += 1
        self._taken.add(path)
        return path


def _plain(name: str, length: int) -> str:
    return re.sub(r"[^A-Z0-9]", "_", name.upper())[:length] or "_"


@contextmanager
def _clock_at(seconds: int) -> Iterator[None]:
    """Make it that time, in UTC, for pycdlib (which has no setting for it)."""
    import importlib

    clock = SimpleNamespace(**vars(time))
    clock.time = lambda: float(seconds)
    clock.localtime = time.gmtime
    modules = [importlib.import_module(f"pycdlib.{name}") for name in _TIMED_MODULES]
    with _CLOCK_LOCK:
        for module in modules:
            module.time = clock  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module in modules:
                module.time = time  # type: ignore[attr-defined]


# --- the content ---------------------------------------------------------------------------------


def _told_where(plan: IsoPlan, items: Sequence[_Item], blocks: Mapping[str, int]) -> list[_Item]:
    """The items, with GRUB's own image told where it lies."""
    if not plan.boot:
        return list(items)
    bios = with_boot_info(plan.boot.bios, blocks[BIOS_IMAGE])
    return [_Item(BIOS_IMAGE, bios, len(bios)), *items[1:]]


def _copy_all(
    items: Sequence[_Item], blocks: Mapping[str, int], output: int, progress: Progress
) -> list[WrittenFile]:
    progress.start("write", sum(item.size for item in items))
    written = []
    for item in items:
        hasher = blake3()
        offset = blocks[item.path] * ISO_BLOCK if item.size else 0
        for piece in _pieces(item):
            hasher.update(piece)
            _put(output, piece, offset)
            offset += len(piece)
            progress.advance(len(piece))
        written.append(WrittenFile(item.path, item.size, hasher.hexdigest()))
    return written


def _pieces(item: _Item) -> Iterator[bytes | memoryview]:
    """All of a source in pieces, each of which is good until the next one is asked for."""
    if isinstance(item.source, bytes):
        yield item.source
        return
    try:
        with item.source.open("rb", buffering=0) as file:
            _expect_stamp(item, file.fileno())
            buffer = memoryview(bytearray(min(_CHUNK, item.size)))
            left = item.size
            while left:
                count = file.readinto(buffer[: min(left, _CHUNK)])
                if not count:
                    raise SourceError(f"{item.source}: ended {left} bytes too early")
                yield buffer[:count]
                left -= count
            _expect_stamp(item, file.fileno())
    except OSError as error:
        raise SourceError(f"{item.source}: {error.strerror}") from None


def _expect_stamp(item: _Item, descriptor: int) -> None:
    if _stamp(os.fstat(descriptor)) != item.stamp:
        raise SourceError(
            f"{item.source!s}: changed while the ISO was written",
            hint="build again when nothing writes to it",
        )


def _put(output: int, piece: bytes | memoryview, offset: int) -> None:
    view = memoryview(piece)
    while view:
        count = os.pwrite(output, view, offset)
        view, offset = view[count:], offset + count


def _make_hybrid(plan: IsoPlan, boot: BootImages, blocks: Mapping[str, int], output: int) -> None:
    size = os.fstat(output).st_size + PADDING
    os.truncate(output, size)
    front, back = system_area(
        boot.hybrid,
        DiskIdentity.from_seed(f"{plan.medium_id} {plan.volume_id}"),
        bios_block=blocks[BIOS_IMAGE],
        efi_block=blocks[EFI_IMAGE],
        efi_size=len(boot.efi),
        size=size,
    )
    _put(output, front, 0)
    _put(output, back, size - len(back))


# --- the finished file ---------------------------------------------------------------------------


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name when the block ends well, and is gone when it does not."""
    try:
        descriptor, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".partial"
        )
    except OSError as error:
        raise ImagerError(f"{path.parent}: {error.strerror}") from None
    os.close(descriptor)
    partial = Path(name)
    try:
        with partial.open("r+b") as file:
            os.fchmod(file.fileno(), 0o644)
            yield file
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:  # those of the sources became SourceErrors where they were read
        partial.unlink(missing_ok=True)
        raise ImagerError(f"{path}: can't be written: {error.strerror}") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _settle(output: int) -> None:
    """What is read back shall come from the disk."""
    os.fsync(output)
    os.posix_fadvise(output, 0, 0, os.POSIX_FADV_DONTNEED)


# --- reading back --------------------------------------------------------------------------------


def _verify(path: Path, written: Sequence[WrittenFile], progress: Progress) -> IsoInfo:
    """Read the ISO once from end to end: hash every file where the ISO's directories say that it
    is, and the ISO as a whole."""
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as worker:
        size = os.fstat(file.fileno()).st_size
        progress.start("verify", size)
        extents = _extents(file)
        hashers = {item.path: blake3() for item in written}
        runs = [(*run, item.path) for item in written for run in extents.get(item.path, [])]
        whole = hashlib.sha256()
        hashing = worker.submit(whole.update, b"")
        for piece, name in _pieces_of_all(file, sorted(runs), size):
            if name is not None:
                hashers[name].update(piece)
            hashing.result()
            # The slower hash works while the next piece is read.
            hashing = worker.submit(whole.update, piece)
            progress.advance(len(piece))
    for item in written:
        found = sum(length for _, length in extents.get(item.path, []))
        if (found, hashers[item.path].hexdigest()) != (item.size, item.digest):
            raise IntegrityError(
                f"{path}: {item.path} does not hold what was written",
                hint="the disk that it is written to may be broken: try another one",
            )
    return IsoInfo(size, whole.hexdigest(), tuple(written))


def _pieces_of_all(
    file: io.FileIO, runs: Sequence[tuple[int, int, str]], size: int
) -> Iterator[tuple[memoryview, str | None]]:
    """The ISO in pieces, and whose they are; each is good until the next but one is asked for.
    ``runs``: (offset, length, path of a file), sorted."""
    buffers = [memoryview(bytearray(_CHUNK)) for _ in range(2)]
    position = 0
    for offset, length, path in (*runs, (size, 0, "")):
        if not position <= offset <= size - length:
            raise IntegrityError(f"{file.name}: {path} lies over another file or behind the end")
        for end, name in ((offset, None), (offset + length, path)):
            while position < end:
                buffers.reverse()
                count = os.preadv(file.fileno(), [buffers[0][: end - position]], position)
                if not count:
                    raise IntegrityError(f"{file.name}: ends before byte {size}")
                position += count
                yield buffers[0][:count], name


def _exactly(descriptor: int, offset: int, length: int, where: str) -> bytes:
    """Raises FormatError when the file ends before."""
    pieces = []
    while length:
        piece = os.pread(descriptor, length, offset)
        if not piece:
            raise FormatError(f"{where}: ends before byte {offset + length}")
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return b"".join(pieces)


# ECMA-119 (ISO 9660), 8.4 and 9.1: the primary volume descriptor and directory records; Rock Ridge
# Interchange Protocol, 4.1.4 (NM), and System Use Sharing Protocol, 5.1 (CE).
_DESCRIPTOR_BLOCK = 16
_ROOT_RECORD_AT = 156
_RECORD = struct.Struct("<BBI4xI4x7sBBBHHB")
_IS_FOLDER, _GOES_ON = 0x02, 0x80
_MAX_FOLDER = 64 << 20
_MAX_RECORDS = 1 << 20
_MAX_CONTINUATIONS = 16


def _extents(file: io.FileIO) -> dict[str, list[tuple[int, int]]]:
    """Where each file lies, as (offset, length) in bytes, by its Rock Ridge path.

    Raises FormatError when it is no ISO, or a damaged one.
    """
    descriptor, where = file.fileno(), str(file.name)
    volume = _exactly(descriptor, _DESCRIPTOR_BLOCK * ISO_BLOCK, ISO_BLOCK, where)
    if volume[:6] != b"\x01CD001":
        raise FormatError(f"{where}: not an ISO")
    root = _Record.parse(volume[_ROOT_RECORD_AT:], where)
    found: dict[str, list[tuple[int, int]]] = {}
    todo, seen, count = [("", root)], {root.offset}, 0
    while todo:
        folder, at = todo.pop()
        for record in _records(descriptor, at, where):
            count += 1
            path = folder + _rock_ridge_name(descriptor, record, where)
            if count > _MAX_RECORDS:
                raise FormatError(f"{where}: more than {_MAX_RECORDS} files")
            if not record.is_folder:
                found.setdefault(path, []).append((record.offset, record.length))
            elif record.offset not in seen:
                seen.add(record.offset)
                todo.append((f"{path}/", record))
    return found


@dataclass(frozen=True)
class _Record:
    """A directory record; ``system_use`` is what Rock Ridge says in it."""

    offset: int
    length: int
    is_folder: bool
    name: bytes
    system_use: bytes

    @classmethod
    def parse(cls, raw: bytes, where: str) -> _Record:
        if len(raw) < _RECORD.size or not _RECORD.size <= raw[0] <= len(raw):
            raise FormatError(f"{where}: a damaged directory record")
        size, attributes, block, length, _, flags, _, _, _, _, name_length = _RECORD.unpack_from(
            raw
        )
        name = raw[_RECORD.size : _RECORD.size + name_length]
        behind = _RECORD.size + name_length + (name_length + 1) % 2
        offset = (block + attributes) * ISO_BLOCK
        return cls(offset, length, bool(flags & _IS_FOLDER), name, raw[behind:size])


def _records(descriptor: int, folder: _Record, where: str) -> Iterator[_Record]:
    """Of a folder, without those of itself and its parent."""
    if folder.length > _MAX_FOLDER:
        raise FormatError(f"{where}: a folder of {folder.length} bytes")
    content = _exactly(descriptor, folder.offset, folder.length, where)
    at = 0
    while at < len(content):
        if content[at] == 0:  # no record crosses the border of blocks
            at = (at // ISO_BLOCK + 1) * ISO_BLOCK
            continue
        record = _Record.parse(content[at : at + 255], where)
        at += content[at]
        if record.name not in (b"\0", b"\1"):
            yield record


def _rock_ridge_name(descriptor: int, record: _Record, where: str) -> str:
    name, area = b"", record.system_use
    for _ in range(_MAX_CONTINUATIONS):
        following = None
        while len(area) >= 4 and 4 <= area[2] <= len(area):
            entry, area = area[: area[2]], area[area[2] :]
            if entry[:2] == b"NM":
                name += entry[5:]
            elif entry[:2] == b"CE" and len(entry) >= 28:
                following = struct.unpack_from("<4xI4xI4xI", entry)
        if following is None:
            break
        block, offset, length = following
        area = _exactly(descriptor, block * ISO_BLOCK + offset, min(length, ISO_BLOCK), where)
    return (name or record.name.split(b";")[0]).decode(errors="replace")
