"""The disks of an image as drives of a virtual machine: read from the repository as they are asked
for, below overlays that take what the machine writes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from imager.imagevolumes import open_disks
from imager.manifest import Disk, Manifest
from imager.overlay import make_overlay
from imager.qemu import Drive
from imager.repository import Repository
from imager.serve import ImageServer

OnReadError = Callable[[str, Exception], None]
"""Is told the disk's name and why a read failed."""

# Of all disks; a boot reads some hundred MiB, much of it twice.
_CACHE_BYTES = 128 << 20


@contextmanager
def image_drives(
    repository: Repository,
    manifest: Manifest,
    overlays: Mapping[str, Path] | None = None,
    on_error: OnReadError | None = None,
) -> Iterator[tuple[Drive, ...]]:
    """Drives in the order of the manifest. ``overlays`` by the disks' names are files that are
    there already and stay; without one, an overlay is thrown away at the end of the block.
    ``on_error`` is told, from any thread, of what of the image could not be read."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imager-drives-")))
        opened = stack.enter_context(
            open_disks(
                lambda: Repository.open(repository.store.url),
                manifest.disks,
                cache_bytes=_CACHE_BYTES,
            )
        )
        sources = {disk.name: source for disk, source in opened}
        address = scratch / "nbd"
        stack.enter_context(ImageServer(sources, address, on_error=on_error))
        yield tuple(
            _drive(repository, manifest, disk, number, address, scratch, overlays or {})
            for number, disk in enumerate(manifest.disks)
        )


def _drive(
    repository: Repository,
    manifest: Manifest,
    disk: Disk,
    number: int,
    address: Path,
    scratch: Path,
    overlays: Mapping[str, Path],
) -> Drive:
    kept = overlays.get(disk.name)
    overlay = kept or scratch / f"overlay-{number}"
    if kept is None:
        make_overlay(overlay, repository, manifest, disk)
    base = {
        "driver": "nbd",
        "server": {"type": "unix", "path": str(address)},
        "export": disk.name,
    }
    serial = str(disk.identity.get("serial") or "")
    return Drive(overlay, base, serial, disk.logical_sector, keep=kept is not None)
