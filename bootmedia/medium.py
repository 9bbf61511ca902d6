"""What a medium says about itself: the record at ``.imager/medium.json`` on the medium.

Beside it lies an empty file named by the medium's id, by which GRUB and the rescue system find the
medium among all disks. The id comes from the content: the same content has the same id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from bootmedia.job import PinnedImage
from imager.jsonrecord import JsonRecord

FOLDER = ".imager"
IMAGES_FOLDER = "images"
"""Of the carried repository."""
RECORD_PATH = f"{FOLDER}/medium.json"

_ID_DIGITS = 16


@dataclass(frozen=True)
class MediumFile(JsonRecord):
    """A file of the medium; ``size`` in bytes, ``sha256`` in hex digits."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Medium(JsonRecord):
    """One medium, the ``volume``-th of ``volumes``.

    ``created`` in seconds since 1970, ``least_memory`` in bytes; ``modules`` is "all" or "host";
    ``files`` are those that the medium boots from, the carried images prove themselves.
    """

    id: str
    created: int
    tool_version: str
    kernel: str
    modules: str
    least_memory: int
    secure_boot: bool
    volume: int = 1
    volumes: int = 1
    images: tuple[PinnedImage, ...] = ()
    files: tuple[MediumFile, ...] = ()


def medium_id(contents: Iterable[bytes]) -> str:
    """16 hex digits that stand for these contents, in their order."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:_ID_DIGITS]


def marker_path(identity: str) -> str:
    """The empty file that a medium is found by."""
    return f"{FOLDER}/{identity}"
