"""Manifests: the documents that commit images (`docs/format.md`, "Manifest").

The document itself is kept, unknown keys and all; what the tool reads is checked on loading.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from imager.errors import FormatError
from imager.extents import Extents
from imager.format import (
    VERSION,
    Place,
    is_block_size,
    is_image_id,
    map_height,
    pack_id_bytes,
)
from imager.partitions import PartitionTable


@dataclass(frozen=True)
class Disk:
    """One disk of an image. Sizes in bytes."""

    name: str
    size: int
    block_size: int
    height: int
    top: Place
    root: str
    document: dict[str, Any] = field(repr=False)

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def logical_sector(self) -> int:
        value = self.document.get("logical_sector", 512)
        return value if value in (512, 1024, 2048, 4096) else 512

    @property
    def unreadable(self) -> Extents:
        """What the capture could not read, in bytes."""
        return Extents(_pairs(self.document.get("unreadable", []), self.size))

    @property
    def table(self) -> PartitionTable:
        """The partition table at the time of the capture. Raises FormatError."""
        document = _object(self.document, "table")
        if not document:
            return PartitionTable("none", self.logical_sector)
        return PartitionTable.from_json(document)

    @property
    def partitions(self) -> list[dict[str, Any]]:
        """What was captured of each partition; one without a number for a disk without table."""
        items = self.document.get("partitions")
        return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []

    def partition(self, number: int) -> dict[str, Any] | None:
        """What was captured of one partition."""
        return next((item for item in self.partitions if item.get("number") == number), None)

    @property
    def excluded(self) -> Extents:
        """Partitions that are left out of the image on purpose, in bytes. Raises FormatError."""
        left_out = [
            [item.get("offset"), item.get("size")]
            for item in self.partitions
            if item.get("excluded")
        ]
        return Extents(_pairs(left_out, self.size))

    def where(self, offset: int) -> str:
        """Words for the part of the disk that a byte lies in."""
        for item in self.partitions:
            start, size = item.get("offset"), item.get("size")
            if isinstance(start, int) and isinstance(size, int) and start <= offset < start + size:
                kind = _object(item, "filesystem").get("kind", "unknown")
                number = item.get("number")
                return f"the {kind} filesystem" if number is None else f"partition {number}, {kind}"
        return "outside of all partitions"

    @property
    def identity(self) -> dict[str, Any]:
        return _object(self.document, "identity")


@dataclass(frozen=True)
class Manifest:
    """An image. ``document`` is the whole manifest as it is stored, without its seal."""

    id: str
    block_size: int
    disks: tuple[Disk, ...]
    document: dict[str, Any] = field(repr=False)

    @classmethod
    def from_document(cls, document: dict[str, Any], where: str) -> Manifest:
        """Raises FormatError, naming ``where``, when a needed key is missing or impossible."""
        try:
            return cls._parse(document)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{where}: not a manifest of an image: {error!r}") from None
        except FormatError as error:
            raise FormatError(f"{where}: {error.message}") from None

    @classmethod
    def _parse(cls, document: dict[str, Any]) -> Manifest:
        if document["kind"] != "image" or not is_image_id(document["id"]):
            raise FormatError("not a manifest of an image")
        block_size = document["block_size"]
        if not is_block_size(block_size):
            raise FormatError(f"impossible block size {block_size!r}")
        disks = tuple(_parse_disk(disk, block_size) for disk in document["disks"])
        if not disks or len({disk.name for disk in disks}) != len(disks):
            raise FormatError("no disks, or two of one name")
        plain = {key: value for key, value in document.items() if key != "seal"}
        return cls(document["id"], block_size, disks, plain)

    @property
    def name(self) -> str:
        return str(self.document.get("name", ""))

    @property
    def host(self) -> str:
        return str(self.document.get("host", ""))

    @property
    def note(self) -> str:
        return str(self.document.get("note") or "")

    @property
    def created(self) -> str:
        return str(self.document.get("created", ""))

    @property
    def partial(self) -> bool:
        return bool(self.document.get("partial", False))

    @property
    def statistics(self) -> dict[str, Any]:
        return _object(self.document, "statistics")


def _parse_disk(document: dict[str, Any], block_size: int) -> Disk:
    size, height, name = document["size"], document["height"], document["name"]
    root, top = document["root"], document["top"]
    if not isinstance(name, str) or not isinstance(root, str) or len(bytes.fromhex(root)) != 32:
        raise FormatError("a disk without name or root")
    if not isinstance(size, int) or not 0 < size < 1 << 63:
        raise FormatError(f"disk {name}: impossible size {size!r}")
    if height != map_height(-(-size // block_size)):
        raise FormatError(f"disk {name}: a map of height {height!r} does not fit its size")
    ordinal = top["ordinal"]
    if not isinstance(ordinal, int) or not 0 <= ordinal < 1 << 32:
        raise FormatError(f"disk {name}: impossible place of its map")
    return Disk(
        name, size, block_size, height, Place(pack_id_bytes(top["pack"]), ordinal), root, document
    )


def new_document(kind: str, **values: Any) -> dict[str, Any]:
    """The start of a sealed document of this format version."""
    return {"kind": kind, "format": VERSION, "features": [], **values}


def _object(document: dict[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _pairs(value: object, size: int) -> list[tuple[int, int]]:
    if not isinstance(value, list):
        raise FormatError("unreadable ranges are not a list")
    pairs = []
    for item in value:
        if not (isinstance(item, list) and len(item) == 2 and all(type(n) is int for n in item)):
            raise FormatError(f"not a byte range: {item!r}")
        offset, length = item
        if offset < 0 or length <= 0 or offset + length > size:
            raise FormatError(f"a byte range outside of the disk: {item!r}")
        pairs.append((offset, length))
    return pairs
