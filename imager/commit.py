"""Commit: what a virtual machine made of an image becomes a new image of the same lineage.

The overlays tell what was written since the image, so only that is read: to a capture they are a
record of writes, of disks that are quiet by now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from imager.blocksource import BlockSource
from imager.capture import DEFAULT_LEVEL, CaptureJob, SourceDisk, capture
from imager.diskidentity import DiskIdentity
from imager.errors import ImagerError, ObjectMissing
from imager.exclusion import leave_out_as
from imager.extents import Extents
from imager.format import State
from imager.imagevolumes import open_disks
from imager.layout import DiskLayout, read_layouts
from imager.livecapture import Base, Frozen, captured
from imager.manifest import Disk, Manifest
from imager.overlay import Overlay, OverlaySource, overlay_file, read_overlay
from imager.progress import Progress
from imager.repository import Repository
from imager.tracking import Written
from imager.virtualhardware import imaged_machine


def commit(
    path: Path,
    repository: Repository,
    progress: Progress,
    *,
    name: str | None = None,
    note: str = "",
    level: int = DEFAULT_LEVEL,
) -> Manifest:
    """Capture the disks of a machine that ran on the overlays at ``path``, and is off.

    Raises ImagerError when the overlays are of another repository or their image is gone,
    ToolError while the machine runs.
    """
    manifest, overlays = find_base(path, repository)
    with ExitStack() as stack:
        bases = stack.enter_context(
            open_disks(lambda: Repository.open(repository.store.url), manifest.disks)
        )
        sources = [
            stack.enter_context(OverlaySource(overlay, base.source))
            for overlay, base in zip(overlays, bases, strict=True)
        ]
        all_blocks = bool(manifest.document.get("all_blocks"))
        before = _disks(manifest, [base.source for base in bases])
        disks = _disks(manifest, sources)
        job = CaptureJob(
            disks,
            name=name or manifest.name,
            note=note or f"image {manifest.id}, changed as a virtual machine",
            level=level,
            all_blocks=all_blocks,
            hardware=imaged_machine(manifest),
            live=_QuietDisks([disk.layout for disk in disks]),
            bases={
                disk.name: Base(
                    manifest.id,
                    disk,
                    _held(repository, disk, captured(was.layout, all_blocks=all_blocks)),
                    source.changed,
                )
                for disk, was, source in zip(manifest.disks, before, sources, strict=True)
            },
        )
        return capture(job, repository, progress)


def _disks(manifest: Manifest, sources: Sequence[BlockSource]) -> tuple[SourceDisk, ...]:
    """As they are to be captured: what the image leaves out stays left out."""
    disks = [
        SourceDisk(disk.name, source, layout, DiskIdentity.from_json(disk.identity))
        for disk, source, layout in zip(manifest.disks, sources, read_layouts(sources), strict=True)
    ]
    return tuple(leave_out_as(manifest, disks))


def _held(repository: Repository, disk: Disk, used: Extents) -> Extents:
    """What an image holds of what is called used in it: an older imager may have left out more."""
    unused = repository.block_map(disk).extents(State.UNUSED, disk.block_size)
    return used.subtract(unused.clip(0, disk.size))


class _Still:
    """Filesystems that nobody writes to."""

    milliseconds = 0

    def end(self) -> None:
        pass


class _QuietDisks:
    """Disks of a machine that is off, as ``LiveDisks``: nothing happens to them any more."""

    def __init__(self, layouts: Sequence[DiskLayout]) -> None:
        self._layouts = layouts

    def take(self) -> list[Written]:
        return [Written(Extents()) for _ in self._layouts]

    def restart(self) -> None:
        pass

    def sync(self) -> None:
        pass

    @contextmanager
    def frozen(self) -> Iterator[Frozen]:
        yield _Still()

    def layouts(self) -> Sequence[DiskLayout]:
        return self._layouts


def find_base(path: Path, repository: Repository) -> tuple[Manifest, list[Overlay]]:
    """The image below an overlay, and the overlays of its disks. Errors as of ``commit``."""
    first = read_overlay(_any_overlay(path))
    if first.base.repository != repository.id:
        raise ImagerError(
            f"{first.path} lies over an image of another repository, {first.base.repository}",
            hint="name that one with --repo",
        )
    manifest = repository.manifest(first.base.image)
    overlays = [read_overlay(overlay_file(path, disk, manifest)) for disk in manifest.disks]
    for overlay, disk in zip(overlays, manifest.disks, strict=True):
        if overlay.base != (repository.id, manifest.id, disk.name):
            raise ImagerError(f"{overlay.path} does not lie over {manifest.id}/{disk.name}")
    return manifest, overlays


def _any_overlay(path: Path) -> Path:
    """The file itself, or that of one of several disks."""
    if path.exists():
        return path
    others = sorted(path.parent.glob(f"{path.name}.*"))
    if not others:
        raise ObjectMissing(f"there is no overlay {path}")
    return others[0]
