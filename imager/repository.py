"""A repository: packs, block maps and manifests in a store."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from imager.blockindex import BlockIndex
from imager.blockmap import BlockMap
from imager.errors import (
    FormatError,
    ImagerError,
    IntegrityError,
    ObjectExists,
    ObjectMissing,
    UnsupportedError,
    UsageError,
)
from imager.format import (
    Page,
    Place,
    RecordKind,
    digest_of,
    is_block_size,
    is_image_id,
    pack_id_bytes,
    root_digest,
    seal,
    unseal,
)
from imager.manifest import Disk, Manifest, new_document
from imager.moved import moved_ids
from imager.pack import Decoder, Pack, pack_name
from imager.store import WriteStore, open_store

# Chosen by measurement, see docs/performance.md.
DEFAULT_BLOCK_SIZE = 256 << 10

PROOFS = "proofs"
"""The folder of what proves images (``imager.proofs``), by image."""

# Open packs are kept as long as their tables have no more entries in all, of some 250 bytes each:
# 1000 packs of ordinary blocks.
_OPEN_ENTRIES = 1 << 17
_KEPT_PAGES = 16  # pages of about 100 KiB as objects: a path through the tree and a few more


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_image_id() -> str:
    """Sorts by time, to the microsecond; the random digits keep two hosts apart."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dt%H%M%Sz}-{now.microsecond:05x}{secrets.randbelow(1 << 12):03x}"


@dataclass(frozen=True)
class StoredBlocks:
    """Records that a capture may share; ``damaged`` says which packs it may not, and why."""

    index: BlockIndex
    packs: set[bytes]
    damaged: list[str]


@dataclass(frozen=True)
class TrashList:
    """Packs that a gc condemned, and the captures that were open when it did.

    ``sessions`` is None when that gc died before it looked: then all that are open now count,
    among them any that was open then.
    """

    name: str
    packs: frozenset[bytes]
    sessions: frozenset[str] | None

    @classmethod
    def from_document(cls, name: str, document: dict[str, Any]) -> TrashList:
        packs = frozenset(pack_id_bytes(text) for text in document.get("packs", []))
        sessions = document.get("sessions")
        return cls(name, packs, None if sessions is None else frozenset(sessions))


class NoImage(ObjectMissing):
    """There is something by that name, but no image; ``document`` is what it says."""

    def __init__(self, message: str, document: dict[str, Any]) -> None:
        super().__init__(message, hint="see: imager list")
        self.document = document


class Repository:
    """An open repository. Reading methods may be called from any one thread at a time."""

    def __init__(self, store: WriteStore, document: dict[str, Any]) -> None:
        self.store = store
        self.id = str(document.get("id"))
        self.block_size: int = document["block_size"]
        self._packs: OrderedDict[bytes, Pack] = OrderedDict()
        self._open_entries = 0
        self._pages: OrderedDict[Place, Page] = OrderedDict()
        self._decoder = Decoder()

    @classmethod
    def create(cls, url: str, *, block_size: int = DEFAULT_BLOCK_SIZE) -> Repository:
        """Raises ObjectExists where there is one already."""
        if not is_block_size(block_size):
            raise UsageError(
                f"block size {block_size}: it must be a power of two from 64 KiB to 4 MiB"
            )
        document = new_document(
            "repository",
            id=secrets.token_hex(16),
            block_size=block_size,
            digest="blake3-256",
            created=utc_now(),
        )
        store = open_store(url)
        try:
            store.create("repository.json", seal(document))
        except ObjectExists:
            raise ObjectExists(f"{url} is a repository already") from None
        return cls(store, document)

    @classmethod
    def open(cls, url: str) -> Repository:
        """Raises ObjectMissing where there is none; FormatError, UnsupportedError."""
        return cls.open_store(open_store(url))

    @classmethod
    def open_store(cls, store: WriteStore) -> Repository:
        """As ``open``: the repository whose files lie in a store."""
        url = store.url
        try:
            content = store.read("repository.json")
        except ObjectMissing:
            raise ObjectMissing(
                f"{url} is not a repository",
                hint=f"make one with: imager repo init --repo {url}",
            ) from None
        document = unseal(content, f"{url}/repository.json")
        if document.get("kind") != "repository" or not is_block_size(document.get("block_size")):
            raise FormatError(f"{url}/repository.json does not describe a repository")
        if document.get("digest") != "blake3-256":
            raise UnsupportedError(f"{url}: digests of kind {document.get('digest')} are unknown")
        return cls(store, document)

    # --- images ---

    def image_ids(self) -> list[str]:
        """Ids of all images, oldest first."""
        return self._ids_in("manifests")

    def manifest(self, image_id: str) -> Manifest:
        name = _manifest_name(image_id)
        where = f"{self.store.url}/{name}"
        try:
            content = self.store.read(name)
        except ObjectMissing:
            raise ObjectMissing(
                f"there is no image {image_id} in {self.store.url}", hint="see: imager list"
            ) from None
        document = unseal(content, where)
        if document.get("kind") == "aborted":
            raise NoImage(f"the capture {image_id} was expired by a gc: it is no image", document)
        if document.get("kind") == "moves":
            raise NoImage(f"{image_id} is of a gc that compacted packs: it is no image", document)
        manifest = Manifest.from_document(document, where)
        if manifest.id != image_id:
            raise FormatError(f"{where} holds the manifest of another image, {manifest.id}")
        if manifest.block_size != self.block_size:
            raise FormatError(f"{where} has other blocks than the repository")
        return manifest

    def manifests(
        self,
        on_damage: Callable[[IntegrityError], object] | None = None,
        on_other: Callable[[dict[str, Any]], object] | None = None,
    ) -> Iterator[Manifest]:
        """All images, oldest first. Damaged manifests are raised, or given to ``on_damage``;
        documents that lie among them and are no images are given to ``on_other``."""
        for image_id in self.image_ids():
            try:
                manifest = self.manifest(image_id)
            except NoImage as other:
                if on_other is not None:
                    on_other(other.document)
                continue
            except ObjectMissing:
                continue  # removed meanwhile, or a capture that a gc expired
            except IntegrityError as error:
                if on_damage is None:
                    raise
                on_damage(error)
                continue
            yield manifest

    def find(self, text: str) -> Manifest:
        """An image by its id, a unique prefix of it, or ``NAME@latest``."""
        if not text:
            raise UsageError("an image without a name was asked for")
        name, at, which = text.rpartition("@")
        if at:
            if which != "latest":
                raise UsageError(f"{text}: only NAME@latest is known behind the @")
            manifest = self.latest(name)
            if manifest is None:
                raise ObjectMissing(f"there is no image named {name}", hint="see: imager list")
            return manifest
        matches = [image_id for image_id in self.image_ids() if image_id.startswith(text)]
        if len(matches) == 1:
            return self.manifest(matches[0])
        if matches:
            raise UsageError(f"{text} could be any of: {', '.join(matches)}")
        raise ObjectMissing(f"there is no image {text}", hint="see: imager list")

    def latest(self, name: str) -> Manifest | None:
        """The newest image of a lineage."""
        for image_id in reversed(self.image_ids()):
            with suppress(IntegrityError, ObjectMissing):
                manifest = self.manifest(image_id)
                if manifest.name == name:
                    return manifest
        return None

    def commit(self, document: dict[str, Any]) -> None:
        """Create the manifest: from here on the image exists.

        Raises ImagerError when a gc expired the capture.
        """
        try:
            self.store.create(_manifest_name(document["id"]), seal(document))
        except ObjectExists:
            raise ImagerError(
                f"the capture {document['id']} was expired by a gc, or its id was taken",
                hint="run it again: it goes on from what is stored",
            ) from None

    def remove(self, image_id: str) -> None:
        """Remove an image, and its proofs. Its blocks stay until a gc."""
        self.store.delete(_manifest_name(image_id))
        self.remove_proofs(image_id)

    def remove_proofs(self, image_id: str) -> None:
        """The documents first, so that none is left without its evidence."""
        names = list(self.store.names(f"{PROOFS}/{image_id}"))
        for name in sorted(names, key=lambda name: not name.endswith(".json")):
            with suppress(ObjectMissing):
                self.store.delete(name)

    # --- pins ---

    def pins(self) -> set[str]:
        """Ids of the images that must not be removed."""
        return set(self._ids_in("pins"))

    def pin(self, image_id: str, reason: str) -> None:
        """Pinning again changes nothing, the reason included."""
        document = new_document("pin", id=image_id, reason=reason, pinned=utc_now())
        with suppress(ObjectExists):
            self.store.create(f"pins/{image_id}.json", seal(document))

    def unpin(self, image_id: str) -> None:
        with suppress(ObjectMissing):
            self.store.delete(f"pins/{image_id}.json")

    # --- sessions and trash ---

    def open_session(self, image_id: str, document: dict[str, Any]) -> None:
        self.store.create(f"sessions/{image_id}.json", seal(document))

    def close_session(self, image_id: str) -> None:
        with suppress(ObjectMissing):
            self.store.delete(f"sessions/{image_id}.json")

    def sessions(self) -> list[str]:
        """Ids of the images that captures are making."""
        return self._ids_in("sessions")

    def trash(self) -> Iterator[TrashList]:
        for name in list(self.store.names("trash")):
            with suppress(ObjectMissing):  # a gc finished it meanwhile
                document = unseal(self.store.read(name), f"{self.store.url}/{name}")
                yield TrashList.from_document(name, document)

    def condemned(self) -> set[bytes]:
        """Ids of the packs that a gc is about to delete."""
        return {pack for trash in self.trash() for pack in trash.packs}

    def _ids_in(self, folder: str) -> list[str]:
        """Ids that objects in a folder are named by, in ascending order."""
        names = (name.rpartition("/")[2] for name in self.store.names(folder))
        return sorted(
            name.removesuffix(".json")
            for name in names
            if name.endswith(".json") and is_image_id(name.removesuffix(".json"))
        )

    # --- packs and pages ---

    def pack_ids(self) -> list[bytes]:
        return [
            pack_id_bytes(stem)
            for name in self.store.names("packs")
            for stem in [name.rpartition("/")[2].removesuffix(".pack")]
            if len(stem) == 32 and name == f"packs/{stem[:2]}/{stem}.pack"
        ]

    def pack(self, pack_id: bytes) -> Pack:
        """An open pack; the most recently used stay open."""
        pack = self._packs.get(pack_id)
        if pack is None:
            pack = self._packs[pack_id] = Pack(self.store, pack_id)
            self._open_entries += len(pack.entries)
            while self._open_entries > _OPEN_ENTRIES and len(self._packs) > 1:
                _, oldest = self._packs.popitem(last=False)
                self._open_entries -= len(oldest.entries)
        else:
            self._packs.move_to_end(pack_id)
        return pack

    def page(self, place: Place) -> Page:
        """A map page. Raises IntegrityError or ObjectMissing, naming the pack."""
        page = self._pages.get(place)
        if page is None:
            page = self._pages[place] = self._read_page(place)
            if len(self._pages) > _KEPT_PAGES:
                self._pages.popitem(last=False)
        else:
            self._pages.move_to_end(place)
        return page

    def read_block(self, place: Place, digest: bytes, length: int) -> bytes:
        """One block of ``length`` bytes, proved by its digest. Errors as in ``page``."""
        content = self._read_record(place, RecordKind.BLOCK)
        if len(content) != length or digest_of(content) != digest:
            raise IntegrityError(
                f"{self.store.url}/{pack_name(place.pack)}, record {place.ordinal}: another block"
            )
        return content

    def page_content(self, place: Place) -> bytes:
        """A map page as it is stored. Errors as in ``page``."""
        return self._read_record(place, RecordKind.PAGE)

    def moved_ids(self) -> set[bytes]:
        """Ids of the packs that were compacted."""
        return set(moved_ids(self.store.names("moved")))

    def _read_page(self, place: Place) -> Page:
        content = self._read_record(place, RecordKind.PAGE)
        try:
            return Page.decode(content)
        except IntegrityError as error:
            raise _located(error, self.store.url, place) from None

    def _read_record(self, place: Place, kind: RecordKind) -> bytes:
        pack = self.pack(place.pack)
        try:
            if place.ordinal >= len(pack.entries):
                raise IntegrityError("there is no such record")
            entry = pack.entries[place.ordinal]
            if entry.kind != kind:
                raise IntegrityError(f"not a {kind.name.lower()}")
            content = pack.read(place.ordinal, 1)
            return self._decoder.decode(entry, pack.frame(content, place.ordinal, place.ordinal))
        except IntegrityError as error:
            raise _located(error, self.store.url, place) from None

    def block_map(self, disk: Disk) -> BlockMap:
        """The disk's map, proved against the root digest in its manifest."""
        top = self.page(disk.top).content_digest()
        if root_digest(disk.size, disk.block_size, disk.height, top).hex() != disk.root:
            raise IntegrityError(
                f"disk {disk.name}: its block map does not match the root digest of the manifest"
            )
        return BlockMap(self, blocks=disk.blocks, height=disk.height, top=disk.top, top_digest=top)

    def stored_blocks(self) -> StoredBlocks:
        """What is stored already. Packs that are condemned or damaged are left out, so their
        blocks are stored again."""
        stored = StoredBlocks(BlockIndex(), set(), [])
        condemned = self.condemned()
        for pack_id in self.pack_ids():
            if pack_id in condemned:
                continue
            try:
                pack = Pack(self.store, pack_id)
            except ObjectMissing:
                continue  # deleted by a gc meanwhile
            except ImagerError as error:
                stored.damaged.append(error.message)
                continue
            if pack.is_moved:
                continue  # meanwhile: its records are in other packs of the list
            stored.packs.add(pack_id)
            stored.index.reserve(len(pack.entries))
            for ordinal, entry in enumerate(pack.entries):
                stored.index.add(entry.digest, Place(pack_id, ordinal))
        return stored


def _located(error: IntegrityError, url: str, place: Place) -> IntegrityError:
    return IntegrityError(f"{url}/{pack_name(place.pack)}, record {place.ordinal}: {error.message}")


def _manifest_name(image_id: str) -> str:
    return f"manifests/{image_id}.json"
