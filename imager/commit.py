"""Commit: what a virtual machine made of an image becomes a new image of the same lineage."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from imager.capture import DEFAULT_LEVEL, CaptureJob, SourceDisk, capture
from imager.diskidentity import DiskIdentity
from imager.errors import ImagerError, ObjectMissing
from imager.exclusion import leave_out_as
from imager.imagevolumes import open_disks
from imager.layout import read_layouts
from imager.manifest import Manifest
from imager.overlay import Overlay, OverlaySource, overlay_file, read_overlay
from imager.progress import Progress
from imager.repository import Repository
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
        layouts = read_layouts(sources)
        disks = [
            SourceDisk(disk.name, source, layout, DiskIdentity.from_json(disk.identity))
            for disk, source, layout in zip(manifest.disks, sources, layouts, strict=True)
        ]
        job = CaptureJob(
            tuple(leave_out_as(manifest, disks)),
            name=name or manifest.name,
            note=note or f"image {manifest.id}, changed as a virtual machine",
            level=level,
            all_blocks=bool(manifest.document.get("all_blocks")),
            hardware=imaged_machine(manifest),
        )
        return capture(job, repository, progress)


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
