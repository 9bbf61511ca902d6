"""Capture: read disks, store what the repository does not have yet, commit an image."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

from imager import __version__
from imager.blocksource import BlockSource
from imager.blockstoring import BlockStorer, FinishedMap, MapStorer, Statistics
from imager.diskidentity import DiskIdentity
from imager.errors import ImagerError, UsageError
from imager.extents import Extents
from imager.fingerprint import Fingerprint
from imager.format import PackKind
from imager.layout import DiskLayout
from imager.lineage import Lineage
from imager.livecapture import Base, LiveCapture, LiveDisk, LiveDisks, captured
from imager.manifest import Manifest, new_document
from imager.pack import Packer
from imager.pipeline import worker_count
from imager.progress import Progress
from imager.repository import Repository, StoredBlocks, new_image_id, utc_now

# Chosen by measurement, see docs/performance.md.
DEFAULT_LEVEL = 1

# A gc may condemn shared packs while a capture runs; so often the capture stores them again.
_MAX_PASSES = 3


@dataclass(frozen=True)
class SourceDisk:
    """A disk to capture and what is known of it."""

    name: str
    source: BlockSource
    layout: DiskLayout
    identity: DiskIdentity


@dataclass(frozen=True)
class CaptureJob:
    """Everything that one capture is told."""

    disks: tuple[SourceDisk, ...]
    name: str
    note: str = ""
    level: int = DEFAULT_LEVEL
    all_blocks: bool = False
    consistency: str = "offline"
    hardware: Fingerprint | None = None
    warnings: tuple[str, ...] = ()
    additions: Callable[[], Mapping[str, Any]] = dict
    """Called once when the disks are stored, before the commit: further keys of the manifest."""
    lasts: bool = True
    """Whether the disks are still the same after ``additions``; a frozen one goes on by then."""
    live: LiveDisks | None = None
    """How the disks are captured while they are written; None: nothing writes to them."""
    bases: Mapping[str, Base] = field(default_factory=dict)
    """For live disks, by name: the earlier image that a record of writes begins with."""
    committed: Callable[[Manifest, Sequence[Extents]], object] = lambda manifest, used: None
    """Is told the image, and what of each disk it has, when it exists."""
    workers: int = field(default_factory=worker_count)


def capture(job: CaptureJob, repository: Repository, progress: Progress) -> Manifest:
    """Capture the disks as one image and return its manifest.

    Interrupted or failed, it leaves complete packs behind, and the next capture finds them.
    Raises ImagerError; unreadable sectors are no error: see ``Manifest.partial``.
    """
    if not 1 <= job.level <= 19:
        raise UsageError(f"compression level {job.level}: it must be from 1 to 19")
    image_id, started = new_image_id(), monotonic()
    previous = repository.latest(job.name)
    document = _new_manifest(image_id, job, repository, previous)
    added: Mapping[str, Any] | None = None
    with _session(repository, image_id):
        for _ in range(_MAX_PASSES):
            stored = repository.stored_blocks()
            for text in stored.damaged:
                progress.note(f"not shared, its blocks are stored again: {text}")
            statistics = Statistics()
            done = _store_disks(job, repository, previous, stored, statistics, progress)
            added = job.additions() if added is None else added
            if not done.shared & repository.condemned():
                break
            if not job.lasts:
                raise ImagerError("a gc took packs that this capture shares: run it again")
            progress.note("a gc took packs that this capture shares: storing those blocks again")
        else:
            raise ImagerError("a gc keeps removing what this capture shares: run it again later")
        statistics.milliseconds = int((monotonic() - started) * 1000)
        document |= {
            **(added or {}),
            **done.document,
            "partial": any(disk["unreadable"] for disk in done.document["disks"]),
            "finished": utc_now(),
            "statistics": vars(statistics),
        }
        repository.commit(document)
    manifest = Manifest.from_document(document, image_id)
    job.committed(manifest, done.used)
    return manifest


def _new_manifest(
    image_id: str, job: CaptureJob, repository: Repository, previous: Manifest | None
) -> dict[str, Any]:
    return new_document(
        "image",
        id=image_id,
        name=job.name,
        host=socket.gethostname(),
        note=job.note,
        tool=f"imager {__version__}",
        created=utc_now(),
        previous=previous.id if previous else None,
        repository=repository.id,
        block_size=repository.block_size,
        consistency=job.consistency,
        all_blocks=job.all_blocks,
        hardware=job.hardware.to_json() if job.hardware else {},
        warnings=list(job.warnings),
    )


@contextmanager
def _session(repository: Repository, image_id: str) -> Iterator[None]:
    """Announce the capture to a gc of another host (`docs/format.md`, "Order of writing")."""
    repository.open_session(
        image_id,
        new_document(
            "session", id=image_id, host=socket.gethostname(), pid=os.getpid(), started=utc_now()
        ),
    )
    try:
        yield
    finally:
        repository.close_session(image_id)


class _Stored(NamedTuple):
    """What a run through all disks gave."""

    document: dict[str, Any]
    """Keys of the manifest."""
    used: list[Extents]
    """What of each disk was captured."""
    shared: set[bytes]
    """Packs of others that are referred to."""


def _store_disks(
    job: CaptureJob,
    repository: Repository,
    previous: Manifest | None,
    stored: StoredBlocks,
    statistics: Statistics,
    progress: Progress,
) -> _Stored:
    with ExitStack() as stack:
        # leaving in reverse order: data packs are complete before the pages that refer to them
        pages = stack.enter_context(Packer(repository.store, PackKind.MAP))
        blocks = stack.enter_context(Packer(repository.store, PackKind.DATA))
        storers = [
            BlockStorer(
                disk.source,
                repository.block_size,
                stored.index,
                Lineage(repository, previous, disk.name, stored),
                blocks,
                statistics,
                level=job.level,
                workers=job.workers,
            )
            for disk in job.disks
        ]
        maps = [
            MapStorer(disk.source.size, repository.block_size, stored.index, pages, statistics)
            for disk in job.disks
        ]
        if job.live is None:
            document, used = _store_quiet(job, storers, maps, progress)
        else:
            disks = [
                LiveDisk(disk.layout, storer, map_storer, stored, job.bases.get(disk.name))
                for disk, storer, map_storer in zip(job.disks, storers, maps, strict=True)
            ]
            live = LiveCapture(
                job.live, disks, repository, blocks, pages, progress, all_blocks=job.all_blocks
            )
            document, used = _store_live(job, live)
            statistics.known_blocks = max(statistics.data_blocks - statistics.new_blocks, 0)
    statistics.disk_bytes = sum(disk.source.size for disk in job.disks)
    statistics.used_bytes = sum(extents.total for extents in used)
    statistics.stored_bytes = blocks.bytes_written + pages.bytes_written
    own = blocks.pack_ids | pages.pack_ids
    return _Stored(document, used, {id for each in maps for id in each.packs} - own)


def _store_quiet(
    job: CaptureJob,
    storers: Sequence[BlockStorer],
    maps: Sequence[MapStorer],
    progress: Progress,
) -> tuple[dict[str, Any], list[Extents]]:
    """In one pass: nothing writes to the disks meanwhile."""
    documents, captures = [], []
    for disk, storer, map_storer in zip(job.disks, storers, maps, strict=True):
        used = captured(disk.layout, all_blocks=job.all_blocks)
        plan = storer.plan(used)
        progress.start(f"capturing {disk.name}", plan.bytes_to_read)
        storer.store(plan, map_storer.add_run, map_storer.add_next, progress)
        done = map_storer.finish()
        documents.append(_disk_document(disk, disk.layout, storer.unreadable, done))
        captures.append(used)
    return {"disks": documents}, captures


def _store_live(job: CaptureJob, live: LiveCapture) -> tuple[dict[str, Any], list[Extents]]:
    """In passes, while the disks are written."""
    live.run()
    documents = []
    for disk, layout, each in zip(job.disks, live.layouts, live.disks, strict=True):
        done = each.finish()
        documents.append(_disk_document(disk, layout, each.storer.unreadable, done))
    return {"disks": documents, "tracked": live.result.to_json()}, [d.used for d in live.disks]


def _disk_document(
    disk: SourceDisk, layout: DiskLayout, unreadable: Extents, done: FinishedMap
) -> dict[str, Any]:
    """The disk's part of the manifest."""
    source = disk.source
    return {
        "name": disk.name,
        "path": source.path,
        "size": source.size,
        "logical_sector": source.logical_sector,
        "physical_sector": source.physical_sector,
        "identity": disk.identity.to_json(),
        "table": layout.table.to_json(),
        "partitions": [volume.to_json() for volume in layout.volumes],
        "unreadable": [list(extent) for extent in unreadable],
        "height": done.height,
        "top": {"pack": done.top.pack.hex(), "ordinal": done.top.ordinal},
        "root": done.root.hex(),
    }
