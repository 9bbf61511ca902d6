"""Verify: prove that everything an image needs is there and is what its digests say.

First each pack, once, whichever images share it; then each image's map against the packs. All
faults are found and named: image, disk, offset, partition and pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from imager.errors import ImagerError, IntegrityError, ObjectMissing
from imager.extents import Extent
from imager.format import Place, RecordKind, unseal
from imager.manifest import Disk, Manifest
from imager.pack import Decoder, Pack, pack_name
from imager.pipeline import Buffer, BufferPool, PerThread, run_pipeline, span_size, worker_count
from imager.progress import Progress
from imager.references import used_packs
from imager.repository import Repository

_READ_AHEAD = 2


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. Offsets and lengths in bytes of the disk, None for whole images."""

    image: str
    reason: str
    disk: str | None = None
    offset: int | None = None
    length: int | None = None
    where: str | None = None
    pack: str | None = None

    def __str__(self) -> str:
        place = self.image if self.disk is None else f"{self.image}/{self.disk}"
        if self.offset is not None:
            place += f", {self.length} bytes at byte {self.offset} ({self.where})"
        return f"{place}: {f'{self.pack}: ' if self.pack else ''}{self.reason}"


@dataclass
class VerifyResult:
    images: int = 0
    """Those with a sound manifest."""
    packs: int = 0
    blocks: int = 0
    content_bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    pack_faults: list[str] = field(default_factory=list)
    """Damage in packs, whether or not an image needs that record."""

    @property
    def is_sound(self) -> bool:
        return not (self.faults or self.pack_faults)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "faults": [vars(fault) for fault in self.faults]}


def verify(
    repository: Repository, image_ids: list[str], progress: Progress, *, quick: bool = False
) -> VerifyResult:
    """Verify images; with none named, all of the repository, whether an image needs it or not.

    ``quick``: only that packs exist, their lengths, their tables, and the maps.
    """
    verifier = _Verifier(repository, progress, quick)
    return verifier.run(image_ids) if image_ids else verifier.run_all()


class _Group(NamedTuple):
    """Neighbouring records of one pack; ``buffer`` for what they decode to."""

    pack: Pack
    first: int
    records: int
    buffer: Buffer


class _Checked(NamedTuple):
    stored_bytes: int
    content_bytes: int
    faults: list[tuple[Place, str]]


class _Verifier:
    def __init__(self, repository: Repository, progress: Progress, quick: bool) -> None:
        self._repository = repository
        self._progress = progress
        self._quick = quick
        self._result = VerifyResult()
        self._broken: dict[Place, str] = {}
        self._broken_packs: dict[bytes, str] = {}
        self._decoders = PerThread(Decoder)
        self._workers = worker_count()
        self._needed: set[bytes] = set()
        self._depth = self._workers + _READ_AHEAD
        self._group_size = span_size(self._depth, repository.block_size)

    def run_all(self) -> VerifyResult:
        """All images, all packs, and the other sealed documents."""
        for folder in ("sessions", "trash", "moved"):
            for name in self._repository.store.names(folder):
                self._check_document(name)
        return self.run(self._repository.image_ids(), self._repository.pack_ids())

    def run(self, image_ids: list[str], pack_ids: Iterable[bytes] = ()) -> VerifyResult:
        """The images and the packs that they need, and ``pack_ids`` besides."""
        manifests = [manifest for image in image_ids if (manifest := self._manifest(image))]
        self._result.images = len(manifests)
        self._needed = self._needed_packs(manifests)
        packs = sorted(self._needed.union(pack_ids))
        if self._quick:
            for pack_id in packs:
                self._open_pack(pack_id)
        else:
            self._check_packs(packs)
        for manifest in manifests:
            for disk in manifest.disks:
                self._check_disk(manifest, disk)
        return self._result

    def _manifest(self, image_id: str) -> Manifest | None:
        try:
            return self._repository.manifest(image_id)
        except ObjectMissing:
            return None  # removed meanwhile, or a capture that a gc expired
        except ImagerError as error:
            self._result.faults.append(Fault(image_id, error.message))
            return None

    def _check_document(self, name: str) -> None:
        try:
            unseal(self._repository.store.read(name), f"{self._repository.store.url}/{name}")
        except ObjectMissing:
            pass  # a capture that ended meanwhile
        except ImagerError as error:
            self._result.pack_faults.append(error.message)

    # --- packs ---

    def _needed_packs(self, manifests: list[Manifest]) -> set[bytes]:
        """As far as the maps can be read: damaged pages are reported later."""
        return used_packs(self._repository, manifests, on_damage=lambda _: None)

    def _open_pack(self, pack_id: bytes) -> Pack | None:
        try:
            pack = Pack(self._repository.store, pack_id)
        except ImagerError as error:
            if isinstance(error, ObjectMissing) and pack_id not in self._needed:
                return None  # removed by a gc meanwhile
            self._broken_packs[pack_id] = error.message
            self._result.pack_faults.append(error.message)
            return None
        self._result.packs += 1
        return pack

    def _check_packs(self, pack_ids: list[bytes]) -> None:
        self._progress.start("verifying packs", sum(map(self._length, pack_ids)))
        with BufferPool(self._depth, self._repository.block_size) as pool:
            self._pool = pool
            run_pipeline(
                self._groups(pack_ids),
                self._check_group,
                self._account,
                workers=self._workers,
                depth=self._depth,
            )

    def _length(self, pack_id: bytes) -> int:
        try:
            return self._repository.store.size(pack_name(pack_id))
        except ObjectMissing:
            return 0

    def _groups(self, pack_ids: list[bytes]) -> Iterator[_Group]:
        """In the feeder: each pack is opened only when its turn comes."""
        for pack in filter(None, map(self._open_pack, pack_ids)):
            first = 0
            while first < len(pack.entries):
                if pack.is_gone(first):
                    first += 1
                    continue
                end = first + 1
                while (
                    end < len(pack.entries)
                    and not pack.is_gone(end)
                    and pack.offsets[end + 1] - pack.offsets[first] <= self._group_size
                ):
                    end += 1
                yield _Group(pack, first, end - first, self._pool.take())
                first = end

    def _check_group(self, group: _Group) -> _Checked:
        """In a worker: every byte of the group's records."""
        pack, faults, content_bytes = group.pack, [], 0
        end = group.first + group.records
        stored_bytes = pack.offsets[end] - pack.offsets[group.first]
        if pack.is_moved:
            stored_bytes = 0  # counted where the records are now
        elif end == len(pack.entries):  # its header, table and trailer are checked already
            stored_bytes += pack.length - (pack.offsets[-1] - pack.offsets[0])
        try:
            content = pack.read(group.first, group.records)
            for ordinal in range(group.first, group.first + group.records):
                fault = self._check_record(group, content, ordinal)
                if fault:
                    faults.append((Place(pack.id, ordinal), fault))
                content_bytes += pack.entries[ordinal].content_length
        except ImagerError as error:
            faults = [
                (Place(pack.id, ordinal), error.message)
                for ordinal in range(group.first, group.first + group.records)
            ]
        finally:
            self._pool.give(group.buffer)
        return _Checked(stored_bytes, content_bytes, faults)

    def _check_record(self, group: _Group, content: bytes, ordinal: int) -> str | None:
        pack = group.pack
        entry = pack.entries[ordinal]
        if not pack.header_is_right(content, group.first, ordinal):
            return "its header is damaged"
        if entry.content_length > self._pool.size:
            return "it is larger than the block size"
        view = group.buffer.view[: entry.content_length]
        frame = pack.frame(content, group.first, ordinal)
        try:
            self._decoders.get().decode_into(entry, frame, view, check_crc=True)
        except IntegrityError as error:
            return error.message
        return None

    def _account(self, checked: _Checked) -> None:
        for place, reason in checked.faults:
            self._broken[place] = reason
            self._result.pack_faults.append(
                f"{pack_name(place.pack)}, record {place.ordinal}: {reason}"
            )
        self._result.content_bytes += checked.content_bytes
        self._progress.advance(checked.stored_bytes)

    # --- maps ---

    def _check_disk(self, manifest: Manifest, disk: Disk) -> None:
        try:
            map_ = self._repository.block_map(disk)
            for run in map_.runs(on_damage=lambda *lost: self._add_lost(manifest, disk, *lost)):
                if run.place is None:
                    continue
                offset = run.first * disk.block_size
                length = min(disk.block_size, disk.size - offset)
                self._result.blocks += 1
                reason = self._block_fault(run.place, run.digest, length)
                if reason is not None:
                    self._add_fault(manifest, disk, run.place, Extent(offset, length), reason)
        except ImagerError as error:
            self._result.faults.append(Fault(manifest.id, error.message, disk.name))

    def _add_lost(
        self, manifest: Manifest, disk: Disk, first: int, blocks: int, error: ImagerError
    ) -> None:
        """A damaged page: all that lies below it is lost."""
        offset = first * disk.block_size
        length = min(blocks * disk.block_size, disk.size - offset)
        where = f"{disk.where(offset)} to {disk.where(offset + length - 1)}"
        self._result.faults.append(
            Fault(manifest.id, error.message, disk.name, offset, length, where)
        )

    def _block_fault(self, place: Place, digest: bytes, length: int) -> str | None:
        if place.pack in self._broken_packs:
            return self._broken_packs[place.pack]
        try:
            entries = self._repository.pack(place.pack).entries
        except (ObjectMissing, IntegrityError) as error:
            return error.message
        if place.ordinal >= len(entries):
            return f"record {place.ordinal} does not exist"
        entry = entries[place.ordinal]
        if entry.digest != digest or entry.kind != RecordKind.BLOCK:
            return f"record {place.ordinal} is another block"
        if entry.content_length != length:
            return f"record {place.ordinal} has another length"
        return self._broken.get(place)

    def _add_fault(
        self, manifest: Manifest, disk: Disk, place: Place, extent: Extent, reason: str
    ) -> None:
        """Neighbouring blocks with the same fault are one."""
        fault = Fault(
            manifest.id,
            reason,
            disk.name,
            extent.offset,
            extent.length,
            disk.where(extent.offset),
            pack_name(place.pack),
        )
        last = self._result.faults[-1] if self._result.faults else None
        if last is not None and last.offset is not None and last.length is not None:
            joined = replace(fault, offset=last.offset, length=last.length)
            if joined == last and last.offset + last.length == extent.offset:
                fault = replace(joined, length=last.length + extent.length)
                self._result.faults.pop()
        self._result.faults.append(fault)
