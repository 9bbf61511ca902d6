"""Which reader a filesystem has."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from imager.blocksource import BlockSource
from imager.errors import ImagerError, UnsupportedError
from imager.files.model import Reader
from imager.imagevolumes import ImageVolume

# Kind, and module and class of its reader.
_READERS = {
    "ext2": ("ext", "ExtReader"),
    "ext3": ("ext", "ExtReader"),
    "ext4": ("ext", "ExtReader"),
    "btrfs": ("btrfs.reader", "BtrfsReader"),
    "exfat": ("foreign", "ExfatReader"),
    "ntfs": ("foreign", "NtfsReader"),
    "vfat": ("foreign", "FatReader"),
    "xfs": ("xfs.reader", "XfsReader"),
}

_OTHERWISE = "root reads it through the kernel"


def open_reader(volume: ImageVolume) -> Reader:
    """Raises UnsupportedError when there is none or it could not read this one rightly,
    NotRecognized, OSError, IntegrityError."""
    kind = volume.filesystem.kind
    if volume.reason is not None:
        raise UnsupportedError(f"{volume.name} has no files to read: {volume.reason}")
    if kind not in _READERS:
        raise UnsupportedError(f"{volume.name}: there is no reader for {kind}", hint=_OTHERWISE)
    module, name = _READERS[kind]
    reader: Callable[[BlockSource], Reader] = getattr(import_module(f"imager.files.{module}"), name)
    try:
        return reader(volume.source)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{volume.name} ({kind}): {error.message}", hint=_OTHERWISE
        ) from None
    except ImagerError as error:
        error.message = f"{volume.name} ({kind}): {error.message}"
        raise
