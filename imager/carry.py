"""What images need of a repository: to carry them, and only them, to another place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from imager.blockmap import BlockMap
from imager.errors import IntegrityError
from imager.format import Page, Place
from imager.manifest import Disk, Manifest
from imager.repository import Repository
from imager.store import ReadStore
from imager.store.local import LocalStore

_CHUNK_SIZE = 8 << 20


class StoredObject(NamedTuple):
    """``size`` in bytes. ``everywhere``: small, and needed before anything else."""

    name: str
    size: int
    everywhere: bool


class Sized(Protocol):
    """An object's name and its size in bytes."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...


def objects_of(repository: Repository, manifests: Iterable[Manifest]) -> list[StoredObject]:
    """All objects that these images need, in the order in which a restore reads them.

    ``repository.json`` and the manifests, the packs of map pages, then the packs of blocks in the
    order of the disks. Raises IntegrityError or ObjectMissing when an image is not whole.
    """
    wanted = list(manifests)
    small = ["repository.json", *(f"manifests/{manifest.id}.json" for manifest in wanted)]
    pages: dict[bytes, None] = {}
    blocks: dict[bytes, None] = {}
    for manifest in wanted:
        for disk in manifest.disks:
            recorder = _PageRecorder(repository, pages)
            blocks |= dict.fromkeys(_block_packs(recorder, disk, repository))
    page_names, block_names = (_object_names(repository, packs) for packs in (pages, blocks))
    large = page_names | block_names
    # where the records of a compacted pack are
    small += [name for name in large if name.startswith("moved/")]
    large = {name: None for name in large if name not in small}
    size = repository.store.size
    return [
        *(StoredObject(name, size(name), True) for name in dict.fromkeys(small)),
        # A plan reads the pages, a restore reads them again: they should not need another medium.
        *(StoredObject(name, size(name), name in page_names) for name in large),
    ]


def _object_names(repository: Repository, packs: Iterable[bytes]) -> dict[str, None]:
    return {name: None for pack in packs for name in repository.pack(pack).objects}


def source_file(store: ReadStore, item: Sized, scratch: Path) -> Path:
    """The file with an object's content: the store's own, or else a copy below ``scratch``."""
    if isinstance(store, LocalStore):
        return store.folder / item.name
    return fetch(store, item, scratch)


def fetch(store: ReadStore, item: Sized, folder: Path) -> Path:
    """A copy of an object below a folder, read back and compared.

    Raises IntegrityError when the store or the folder did not give what it holds.
    """
    name, size = item.name, item.size
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    expected = hashlib.sha256()
    with file.open("wb") as sink:
        for offset in range(0, size, _CHUNK_SIZE):
            content = store.read(name, offset, min(_CHUNK_SIZE, size - offset))
            expected.update(content)
            sink.write(content)
    with file.open("rb") as source:
        found = hashlib.file_digest(source, "sha256").digest()
    if file.stat().st_size != size or found != expected.digest():
        raise IntegrityError(f"{store.url}/{name} could not be copied whole to {file}")
    return file


class _PageRecorder:
    """A source of map pages that notes which packs they lie in."""

    def __init__(self, repository: Repository, packs: dict[bytes, None]) -> None:
        self._repository = repository
        self._packs = packs

    def page(self, place: Place) -> Page:
        self._packs[place.pack] = None
        return self._repository.page(place)


def _block_packs(recorder: _PageRecorder, disk: Disk, repository: Repository) -> Iterator[bytes]:
    repository.block_map(disk)  # proves the top page
    map_ = BlockMap(recorder, blocks=disk.blocks, height=disk.height, top=disk.top, top_digest=None)
    for run in map_.runs():
        if run.place is not None:
            yield run.place.pack
