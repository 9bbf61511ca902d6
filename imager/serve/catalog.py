"""What is served of images: their disks, partitions, and logical volumes, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from imager.blocksource import PartSource
from imager.imagesource import BlockCache, ImageSource
from imager.imagevolumes import ImageVolume, OpenDisk, image_volumes, partition_name
from imager.manifest import Disk, Manifest
from imager.repository import Repository
from imager.serve.export import Export
from imager.units import show_bytes

# One for all exports and clients.
CACHE_BYTES = 192 << 20

# Looking into volumes reads from each image; for a whole repository that takes too long.
_MOST_LOOKED_INTO = 16


@contextmanager
def image_exports(
    open_repository: Callable[[], Repository],
    images: Sequence[tuple[Manifest, Sequence[Disk]]],
    *,
    cache_bytes: int = CACHE_BYTES,
) -> Iterator[list[Export]]:
    """Exports of all disks, each before its partitions. Of one image they are called ``sda``,
    ``sda2`` and ``vg-root``, of several ``IMAGE/sda``."""
    cache = BlockCache(cache_bytes)
    with ExitStack() as stack:
        found: list[Export] = []
        for manifest, disks in images:
            opened = [
                OpenDisk(
                    disk,
                    stack.enter_context(ImageSource(open_repository(), disk, cache=cache)),
                )
                for disk in disks
            ]
            prefix = f"{manifest.id}/" if len(images) > 1 else ""
            label = f"{manifest.name}, {manifest.id}"
            inside = image_volumes(opened) if len(images) <= _MOST_LOOKED_INTO else []
            found += _exports(opened, inside, prefix, label)
        yield found


def _exports(
    disks: Sequence[OpenDisk], inside: Sequence[ImageVolume], prefix: str, label: str
) -> Iterator[Export]:
    """Disks, partitions, and what lies inside of containers and has no partition of its own."""
    names = set()
    for disk, source in disks:
        names.add(disk.name)
        size = show_bytes(source.size)
        yield Export(prefix + disk.name, source, f"disk {disk.name}, {size} ({label})")
        for part in disk.table.partitions:
            if part.kind == "extended" or part.end > source.size:
                continue
            name = partition_name(disk.name, part.number)
            names.add(name)
            text = f"partition {part.number} of {disk.name}, {show_bytes(part.size)} ({label})"
            window = PartSource(source, part.offset, part.size)
            yield Export(prefix + name, window, text)
    for volume in inside:
        if volume.file_name not in names:
            names.add(volume.file_name)
            text = f"volume {volume.name}, {show_bytes(volume.source.size)} ({label})"
            yield Export(prefix + volume.file_name, volume.source, text)
