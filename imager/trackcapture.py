"""Capture by tracking: what ``livecapture`` needs, from the kernel and the disks' filesystems."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace

from imager.blocktrace import disk_of, tracefs
from imager.capture import CaptureJob, SourceDisk, capture
from imager.deviceuse import live_filesystems
from imager.errors import ImagerError
from imager.extents import Extents
from imager.layout import DiskLayout, Volume, read_layouts
from imager.livecapture import Base, Frozen
from imager.manifest import Manifest
from imager.process import run
from imager.progress import Progress
from imager.rememberedsource import RememberedSource
from imager.repository import Repository
from imager.tracking import WriteTracker, Written
from imager.trackrecord import BaseRecord, TrackClient

# Of the kernel's buffer for each CPU, after events were lost; doubled each time.
_LARGER_KIB = 16 << 10

# nice(2) of the thread that reads within the freeze.
_HURRY = -15

Still = Callable[[], AbstractContextManager[Frozen]]


class DiskTracker:
    """The method "track" of ``consistency``."""

    def __init__(self, *, buffer_kib: int | None = None) -> None:
        """``buffer_kib``: of the kernel's buffer for each CPU, to begin with."""
        self._buffer_kib = buffer_kib

    def why_not(self, paths: Sequence[str]) -> list[str]:
        """Why these disks can't be tracked; empty when they can."""
        reasons = []
        try:
            tracefs()
            for path in paths:
                disk_of(path)
        except ImagerError as error:
            reasons.append(error.message)
        return reasons

    def capture(
        self, job: CaptureJob, still: Still, repository: Repository, progress: Progress
    ) -> Manifest:
        """Capture while the disks are written; ``still`` freezes them for the last pass.

        Raises ImagerError as ``capture``, and when they are written too fast.
        """
        with TrackedDisks(job.disks, still, buffer_kib=self._buffer_kib) as live:
            live.begin(job, repository, progress)
            told = replace(job, live=live, bases=live.bases, committed=live.commit)
            manifest = capture(told, repository, progress)
        _tell(manifest, progress)
        return manifest


def _base(client: TrackClient, disk: SourceDisk, name: str, repository: Repository) -> Base | str:
    """The image that a service's record begins with, or why it is of no use here."""
    record, written, reason = client.begin()
    if record is None:
        return reason
    if record.repository != repository.id or record.disk != disk.name:
        return f"the image {record.image} is of another repository, or has another name for it"
    try:
        manifest = repository.manifest(record.image)
        repository.block_map(found := next(d for d in manifest.disks if d.name == record.disk))
    except (ImagerError, StopIteration):
        return f"the image {record.image} has gone"
    if manifest.name != name or found.size != disk.source.size:
        return f"the image {record.image} is of another machine"
    return Base(record.image, found, record.used, written.extents)


def _tell(manifest: Manifest, progress: Progress) -> None:
    """What tracking can't see."""
    tracked = manifest.document["tracked"]
    if tracked["commands"]:
        progress.note(
            f"{tracked['commands']} commands went to the disk past the block layer (SG_IO, NVMe "
            "passthrough): if one of them wrote, the image may lack it"
        )
    if tracked["lie"]:
        progress.note(f"{tracked['lie']}; its tracking is off: imager track stop, then start it")
    if tracked["unfrozen_bytes"]:
        progress.note(
            f"{tracked['unfrozen_bytes']} bytes were written during the freeze by something that "
            "is no filesystem: there the image may be of a later moment"
        )


class TrackedDisks:
    """``LiveDisks`` by the kernel's word. A context manager."""

    def __init__(
        self, disks: Sequence[SourceDisk], still: Still, *, buffer_kib: int | None = None
    ) -> None:
        self._disks = disks
        self._still = still
        self._buffer_kib = buffer_kib
        self._stack = ExitStack()
        self._trackers: list[WriteTracker | TrackClient] = []
        # For the layouts: within the freeze only what changed since they were last read is read.
        self._remembered = [RememberedSource(disk.source) for disk in disks]
        self._repository = ""
        self.bases: dict[str, Base] = {}

    def __enter__(self) -> TrackedDisks:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        try:
            self._trackers = [self._tracker(disk) for disk in self._disks]
        except BaseException:
            self._stack.close()
            raise

    def _tracker(self, disk: SourceDisk) -> WriteTracker | TrackClient:
        """The service of the disk, if there is one."""
        path = disk.source.path
        with suppress(ImagerError):
            return self._stack.enter_context(TrackClient(path))
        tracker = WriteTracker(path, disk.source.size, buffer_kib=self._buffer_kib)
        return self._stack.enter_context(tracker)

    def _clients(self) -> Iterator[tuple[int, TrackClient]]:
        for n, tracker in enumerate(self._trackers):
            if isinstance(tracker, TrackClient):
                yield n, tracker

    def begin(self, job: CaptureJob, repository: Repository, progress: Progress) -> None:
        """Ask the services for the images that their records begin with."""
        self._repository = repository.id
        for n, client in self._clients():
            disk = self._disks[n]
            base = _base(client, disk, job.name, repository)
            if isinstance(base, Base):
                self.bases[disk.name] = base
            else:
                progress.note(f"{client.path}: its record of writes is of no use here: {base}")

    def commit(self, manifest: Manifest, used: Sequence[Extents]) -> None:
        """The records begin with this image from now on; not if it lacks something."""
        tracked = manifest.document["tracked"]
        for n, client in self._clients():
            with suppress(ImagerError):  # the image is whole without
                if tracked["lie"]:
                    client.ask("distrust", reason=tracked["lie"])
                elif not tracked["unfrozen_bytes"]:
                    name = self._disks[n].name
                    client.commit(BaseRecord(self._repository, manifest.id, name, used[n]))

    def take(self) -> list[Written]:
        taken = [tracker.take() for tracker in self._trackers]
        for source, written in zip(self._remembered, taken, strict=True):
            source.forget(Extents.whole(source.size) if written.lost else written.extents)
        return taken

    def restart(self) -> None:
        self._stack.close()
        self._buffer_kib = max(2 * (self._buffer_kib or 0), _LARGER_KIB)
        self._start()

    def sync(self) -> None:
        for filesystem in live_filesystems([disk.source.path for disk in self._disks]):
            run(["sync", "--file-system", filesystem.points[0]])

    @contextmanager
    def frozen(self) -> Iterator[Frozen]:
        self.layouts()  # remembered
        with self._still() as freeze, _hurried():
            yield freeze

    def layouts(self) -> list[DiskLayout]:
        found = read_layouts(self._remembered)
        return [_as_before(disk.layout, now) for disk, now in zip(self._disks, found, strict=True)]


@contextmanager
def _hurried() -> Iterator[None]:
    """A job of low priority must not let everybody wait for as long as it does itself."""
    own = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _HURRY)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, own)


def _as_before(before: DiskLayout, now: DiskLayout) -> DiskLayout:
    """What was decided of a volume holds on: that it is left out, or not trusted."""
    known = {(volume.offset, volume.size): volume for volume in before.volumes}
    volumes = tuple(
        _decided(known.get((volume.offset, volume.size), volume), volume) for volume in now.volumes
    )
    return replace(now, volumes=volumes)


def _decided(before: Volume, now: Volume) -> Volume:
    is_doubtful = before.proof is not None and not before.proof.holds
    allocation = before.allocation if is_doubtful else now.allocation
    return replace(now, allocation=allocation, excluded=before.excluded, proof=before.proof)
