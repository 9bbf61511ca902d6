"""What a report tells: servers, their images, and a closer look at some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from imager.data.model import DataBackup
from imager.diskmap import DiskMap
from imager.manifest import Disk


@dataclass(frozen=True)
class ImageFacts:
    """One image. Sizes in bytes; ``proved`` is None when nobody tried to boot it."""

    id: str
    created: datetime
    note: str
    consistency: str
    size: int
    used: int
    added: int
    milliseconds: int
    partial: bool
    pinned: bool
    proved: bool | None = None
    proof_words: str = ""


@dataclass(frozen=True)
class Server:
    """The images of one name, oldest first, at least one. ``max_age``: what the schedule allows."""

    name: str
    hosts: tuple[str, ...]
    images: tuple[ImageFacts, ...]
    max_age: timedelta | None = None

    @property
    def newest(self) -> ImageFacts:
        return self.images[-1]

    @property
    def proved(self) -> ImageFacts | None:
        """The newest image that was seen booting."""
        return next((image for image in reversed(self.images) if image.proved), None)

    @property
    def added(self) -> int:
        """Bytes that its images brought into the repository."""
        return sum(image.added for image in self.images)

    @property
    def used(self) -> int:
        """Bytes that its images would take if they shared nothing and did not compress."""
        return sum(image.used for image in self.images)

    def is_overdue(self, now: datetime) -> bool:
        return self.max_age is not None and now - self.newest.created > self.max_age


@dataclass(frozen=True)
class Changed:
    """Bytes of blocks that differ between two images, in one part of the disk."""

    where: str
    length: int


@dataclass(frozen=True)
class DiskDetail:
    """A disk of a server's newest image; ``since`` is the id of the image it is compared with."""

    disk: Disk
    map: DiskMap
    since: str | None
    changed: tuple[Changed, ...]


@dataclass(frozen=True)
class Report:
    """All of it. ``damaged``: manifests that can't be read; ``left_out``: servers without a closer
    look, since there are too many."""

    repository: str
    made: datetime
    servers: Sequence[Server]
    details: dict[str, tuple[DiskDetail, ...]]
    damaged: Sequence[str]
    left_out: int
    data: Mapping[str, Sequence[DataBackup]] = field(default_factory=dict)
    """Of the newest image of each server that is looked at closer: its data backups."""
