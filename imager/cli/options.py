"""Options that many commands share, and how an IMAGE is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from imager.manifest import Disk, Manifest
    from imager.repository import Repository

RepoOption = Annotated[
    str | None,
    typer.Option(
        "--repo", metavar="PATH", help="The repository; else IMAGER_REPO, else imager.toml."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ProgressOption = Annotated[
    str,
    typer.Option(
        "--progress",
        metavar="auto|json|none",
        help="Bars on a terminal, JSON lines on standard error, or nothing.",
    ),
]
ImageArgument = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE", help="An id, a unique prefix of one, or NAME@latest; IMAGE/DISK for one."
    ),
]


def open_repository(flag: str | None) -> Repository:
    from imager.config import repository_url
    from imager.repository import Repository

    return Repository.open(repository_url(flag))


def find_image(repository: Repository, text: str) -> Manifest:
    """An image; a disk behind a ``/`` is not allowed here. Raises UsageError, ObjectMissing."""
    from imager.errors import UsageError

    if "/" in text:
        raise UsageError(f"{text}: name the image without a disk here")
    return repository.find(text)


def find_disks(repository: Repository, text: str) -> tuple[Manifest, list[Disk]]:
    """``IMAGE`` is all its disks, ``IMAGE/DISK`` one of them."""
    from imager.errors import ObjectMissing

    image, slash, name = text.partition("/")
    manifest = repository.find(image)
    disks = [disk for disk in manifest.disks if not slash or disk.name == name]
    if not disks:
        known = ", ".join(disk.name for disk in manifest.disks)
        raise ObjectMissing(f"image {manifest.id} has no disk {name}", hint=f"it has: {known}")
    return manifest, disks


def find_disk(repository: Repository, text: str) -> tuple[Manifest, Disk]:
    """One disk; its name may be left out if the image has only one."""
    from imager.errors import UsageError

    manifest, disks = find_disks(repository, text)
    if len(disks) > 1:
        known = ", ".join(f"{manifest.id}/{disk.name}" for disk in disks)
        raise UsageError(f"{text} has several disks: name one", hint=known)
    return manifest, disks[0]
