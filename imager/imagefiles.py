"""``IMAGE:PARTITION/PATH``: from what people write to an entry in an image's filesystem."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from imager.errors import UnsupportedError
from imager.files.model import Reader
from imager.files.mounted import MountedReader
from imager.files.registry import open_reader
from imager.files.tree import Found, look_up
from imager.imagemount import mounted
from imager.imagevolumes import ImageVolume, find_volume, image_volumes, open_disks
from imager.manifest import Disk
from imager.repository import Repository


@dataclass(frozen=True)
class Opened:
    """A filesystem of an image, and the entry that was named in it."""

    volume: ImageVolume
    reader: Reader
    found: Found

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know of the filesystem's state."""
        return self.reader.notes or self.volume.filesystem.notes


@contextmanager
def opened(
    open_repository: Callable[[], Repository],
    disks: list[Disk],
    rest: str,
    *,
    follow: bool = False,
) -> Iterator[Opened]:
    """``rest``: what stands behind the colon. ``follow``: also a symbolic link at the end.

    Raises ObjectMissing, UsageError; UnsupportedError when the filesystem has no reader.
    """
    with open_disks(open_repository, disks) as sources:
        volume, path = find_volume(image_volumes(sources), rest)
        with _reader(volume) as reader:
            yield Opened(volume, reader, look_up(reader, path, follow=follow))


@contextmanager
def _reader(volume: ImageVolume) -> Iterator[Reader]:
    """Our own, or for root the kernel's behind a private mount, where ours would be wrong."""
    try:
        reader = open_reader(volume)
    except UnsupportedError:
        if volume.reason is not None or os.geteuid() != 0:
            raise
    else:
        yield reader
        return
    with mounted(volume) as folder:
        kind = volume.filesystem.kind
        yield MountedReader(folder, f"it is read through this machine's kernel driver of {kind}")
