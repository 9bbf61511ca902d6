"""Capture by tracking: what ``livecapture`` needs, from the kernel and the disks' filesystems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

from imager.blocktrace import disk_of, tracefs
from imager.capture import CaptureJob, SourceDisk, capture
from imager.deviceuse import live_filesystems
from imager.errors import ImagerError
from imager.layout import DiskLayout, Volume, read_layouts
from imager.livecapture import Frozen
from imager.manifest import Manifest
from imager.process import run
from imager.progress import Progress
from imager.repository import Repository
from imager.tracking import WriteTracker, Written

# Of the kernel's buffer for each CPU, after events were lost; doubled each time.
_LARGER_KIB = 16 << 10

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
            manifest = capture(replace(job, live=live), repository, progress)
        _tell(manifest, progress)
        return manifest


def _tell(manifest: Manifest, progress: Progress) -> None:
    """What tracking can't see."""
    tracked = manifest.document["tracked"]
    if tracked["commands"]:
        progress.note(
            f"{tracked['commands']} commands went to the disk past the block layer (SG_IO, NVMe "
            "passthrough): if one of them wrote, the image may lack it"
        )
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
        self._trackers: list[WriteTracker] = []

    def __enter__(self) -> TrackedDisks:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        try:
            self._trackers = [
                self._stack.enter_context(
                    WriteTracker(disk.source.path, disk.source.size, buffer_kib=self._buffer_kib)
                )
                for disk in self._disks
            ]
        except BaseException:
            self._stack.close()
            raise

    def take(self) -> list[Written]:
        return [tracker.take() for tracker in self._trackers]

    def restart(self) -> None:
        self._stack.close()
        self._buffer_kib = max(2 * (self._buffer_kib or 0), _LARGER_KIB)
        self._start()

    def sync(self) -> None:
        for filesystem in live_filesystems([disk.source.path for disk in self._disks]):
            run(["sync", "--file-system", filesystem.points[0]])

    @contextmanager
    def frozen(self) -> Iterator[Frozen]:
        with self._still() as freeze:
            yield freeze

    def layouts(self) -> list[DiskLayout]:
        found = read_layouts([disk.source for disk in self._disks])
        return [_as_before(disk.layout, now) for disk, now in zip(self._disks, found, strict=True)]


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
