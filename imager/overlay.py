"""Overlays: qcow2 files with what a virtual machine wrote over a disk of an image.

The header names the image where qcow2 names a backing file (QEMU's docs/interop/qcow2.txt), as
``imager:REPOSITORY-ID/IMAGE/DISK``: QEMU is told otherwise where to read below the overlay.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_right
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

from imager.blocksource import BlockSource, FileSource
from imager.errors import FormatError, ImagerError, SourceError, UsageError
from imager.extents import Extents
from imager.format import is_image_id
from imager.manifest import Disk, Manifest
from imager.process import run
from imager.repository import Repository

_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQ")  # magic, version, backing name's offset and size, …, size
_PREFIX = "imager:"
_MAX_NAME = 1023


class OverlayBase(NamedTuple):
    """What an overlay lies over."""

    repository: str
    """Its id."""
    image: str
    disk: str


@dataclass(frozen=True)
class Overlay:
    path: Path
    base: OverlayBase
    size: int
    """Of the disk, in bytes."""


class Piece(NamedTuple):
    """A range of the disk that the overlay holds, in bytes; ``place`` in the file, None: zeros."""

    offset: int
    length: int
    place: int | None


def make_overlay(path: Path, repository: Repository, manifest: Manifest, disk: Disk) -> None:
    """A new, empty overlay over a disk of an image. Raises UsageError when the file exists."""
    if path.exists():
        raise UsageError(f"{path} is there already")
    base = f"{_PREFIX}{repository.id}/{manifest.id}/{disk.name}"
    run(
        # Not looked at (-u): only a running server knows the image.
        [
            *("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", base),
            *("--", str(path), str(disk.size)),
        ]
    )


def read_overlay(path: Path) -> Overlay:
    """Raises UsageError when it is no overlay over an image, ImagerError when unreadable."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            magic, _, at, length, _, size = _HEADER.unpack(header)
            if magic != _MAGIC:
                raise _no_overlay(path)
            file.seek(at)
            name = file.read(min(length, _MAX_NAME)).decode()
    except OSError as error:
        raise ImagerError(f"cannot read {path}: {error.strerror}") from None
    except (struct.error, ValueError):
        raise _no_overlay(path) from None
    words = name.removeprefix(_PREFIX).split("/", 2)
    if not name.startswith(_PREFIX) or len(words) != 3:
        raise _no_overlay(path)
    base = OverlayBase(*words)
    if not is_image_id(base.image) or not 0 < size < 1 << 63:
        raise _no_overlay(path)
    return Overlay(path, base, size)


def _no_overlay(path: Path) -> UsageError:
    return UsageError(f"{path} is no overlay over an image", hint="see: imager boot --overlay")


def overlay_pieces(overlay: Overlay) -> list[Piece]:
    """What the overlay holds, in the order of the disk. Raises ToolError, also while a machine
    runs on it; FormatError for what cannot be read in place."""
    alone = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(overlay.path)},
        "backing": None,
    }
    found = run(["qemu-img", "map", "--output=json", f"json:{json.dumps(alone)}"])
    pieces = []
    for item in json.loads(found.stdout):
        if not item.get("present", True):
            continue
        offset, length = int(item["start"]), int(item["length"])
        if item.get("data") and "offset" not in item:
            raise FormatError(f"{overlay.path}: what lies at byte {offset} is compressed")
        if offset + length > overlay.size:
            raise FormatError(f"{overlay.path}: something lies behind the end of the disk")
        pieces.append(Piece(offset, length, int(item["offset"]) if item.get("data") else None))
    return pieces


class OverlaySource:
    """A disk as the machine left it, as a ``BlockSource``: the overlay over its base. A context
    manager; does not own the base."""

    is_device = False

    def __init__(self, overlay: Overlay, base: BlockSource) -> None:
        """Raises FormatError when the overlay is no overlay over that base, ToolError while a
        machine runs on it."""
        if overlay.size != base.size:
            raise FormatError(f"{overlay.path}: {overlay.size} bytes over a disk of {base.size}")
        self.path = str(overlay.path)
        self.size = overlay.size
        self.logical_sector, self.physical_sector = base.logical_sector, base.physical_sector
        self._base = base
        self.pieces = overlay_pieces(overlay)
        self._starts = [piece.offset for piece in self.pieces]
        self._file = FileSource(overlay.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    @property
    def changed(self) -> Extents:
        """What the overlay holds."""
        return Extents.from_sorted((piece.offset, piece.length) for piece in self.pieces)

    def pread(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; errors as of the base."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer; errors as of the base."""
        if offset < 0 or offset + len(buffer) > self.size:
            raise SourceError(f"read outside of {self.path}: {len(buffer)} bytes at byte {offset}")
        at, end = offset, offset + len(buffer)
        number = max(bisect_right(self._starts, offset) - 1, 0)
        for piece in islice(self.pieces, number, None):
            start, stop = max(piece.offset, at), min(piece.offset + piece.length, end)
            if piece.offset >= end:
                break
            if stop <= start:
                continue
            if start > at:
                self._base.read_into(at, buffer[at - offset : start - offset])
            self._read_piece(piece, start, buffer[start - offset : stop - offset])
            at = stop
        if at < end:
            self._base.read_into(at, buffer[at - offset :])

    def _read_piece(self, piece: Piece, start: int, buffer: memoryview) -> None:
        if piece.place is None:
            buffer[:] = bytes(len(buffer))
            return
        place = piece.place + start - piece.offset
        # QEMU may leave the file's last cluster shorter than a cluster: the rest is zeros.
        there = max(min(self._file.size - place, len(buffer)), 0)
        self._file.read_into(place, buffer[:there])
        buffer[there:] = bytes(len(buffer) - there)

    def data_extents(self) -> Extents:
        """All of it, as of a device: what is zero by now is seen by reading it."""
        return Extents.whole(self.size)


def overlay_file(path: Path, disk: Disk, manifest: Manifest) -> Path:
    """Where the overlay of a disk is: with several disks, each has a file of its own."""
    return path if len(manifest.disks) == 1 else path.with_name(f"{path.name}.{disk.name}")
