"""The images on a medium: which file of their repository goes onto which volume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bootmedia.iso import IsoFile
from bootmedia.job import PinnedImage
from bootmedia.medium import IMAGES_FOLDER
from imager.errors import UsageError

_SECTOR = 2048  # of ISO 9660: a file takes whole ones
_MAX_FILE_SIZE = (4 << 30) - _SECTOR  # one extent of an ISO, a file on FAT


class StoredObject(Protocol):
    """See ``imager.carry``."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def everywhere(self) -> bool: ...


@dataclass(frozen=True)
class CarriedImages:
    """Images with the objects that they need, in the order of reading.

    ``source`` gives the file with an object's content.
    """

    images: tuple[PinnedImage, ...]
    objects: tuple[StoredObject, ...]
    source: Callable[[StoredObject], Path]

    def volumes(self, capacity: int | None) -> list[tuple[IsoFile, ...]]:
        """The repository's files on each volume, each with at most ``capacity`` bytes (None: all
        on one). Raises UsageError when one file alone is larger."""
        files = {item.name: self._file(item) for item in self.objects}
        return [
            tuple(files[item.name] for item in volume)
            for volume in split_volumes(self.objects, capacity)
        ]

    def _file(self, item: StoredObject) -> IsoFile:
        return IsoFile(f"{IMAGES_FOLDER}/{item.name}", self.source(item))


def split_volumes(
    objects: Sequence[StoredObject], capacity: int | None
) -> list[list[StoredObject]]:
    """Objects by volume. Their order is kept, so that a restore asks for each volume once;
    those that are needed everywhere are on every volume."""
    for item in objects:
        if item.size > _MAX_FILE_SIZE:
            raise UsageError(f"{item.name} has {item.size} bytes: a medium's files are below 4 GiB")
    everywhere = [item for item in objects if item.everywhere]
    others = [item for item in objects if not item.everywhere]
    if capacity is None:
        return [everywhere + others]
    room = capacity - sum(map(_size_on_volume, everywhere))
    volumes: list[list[StoredObject]] = [[]]
    used = 0
    for item in others:
        size = _size_on_volume(item)
        if size > room:
            raise UsageError(
                f"a volume of this size has no room for {item.name} ({item.size} bytes)",
                hint="give a larger --volume-size",
            )
        if used + size > room:
            volumes.append([])
            used = 0
        volumes[-1].append(item)
        used += size
    return [everywhere + volume for volume in volumes]


def _size_on_volume(item: StoredObject) -> int:
    """With its directory records: two, of at most 254 bytes and Rock Ridge's rest."""
    return -(-item.size // _SECTOR) * _SECTOR + _SECTOR
