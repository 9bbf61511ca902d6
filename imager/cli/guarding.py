"""imager rollback: back to an image of the same disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from imager.cli.options import (
    ImageArgument,
    JsonOption,
    ProgressOption,
    RepoOption,
    find_disks,
    open_repository,
)
from imager.cli.restoring import ReadBackOption, carry_out, pair_disks

if TYPE_CHECKING:
    from imager.manifest import Disk, Manifest
    from imager.plan import RestorePlan
    from imager.repository import Repository


def rollback(
    image: ImageArgument,
    disks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DISK",
            help="The disk that the image was made of; else found by serial number or WWN.",
        ),
    ] = None,
    read_back: ReadBackOption = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask for the disk's name to be typed.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Put a disk back to an image of it, writing only what differs. Interrupted, run it again."""
    repository = open_repository(repo)
    prepared = plan_rollback(repository, image, disks or [], read_back=read_back)
    return carry_out(repository, prepared, yes=yes, json=json, progress=progress)


def plan_rollback(
    repository: Repository, image: str, paths: list[str], *, read_back: bool = False
) -> list[tuple[Manifest, Disk, RestorePlan]]:
    """The plans, for each disk of the image. Raises RefusedError for another disk than its own."""
    from imager.errors import RefusedError
    from imager.plan import RestoreOptions, plan_restore
    from imager.rollback import find_own_disk, why_not_own

    manifest, disks = find_disks(repository, image)
    if paths:
        pairs = pair_disks(disks, paths)
    else:
        pairs = [(disk, find_own_disk(manifest, disk)) for disk in disks]
    reasons = [why_not_own(manifest, disk, path) for disk, path in pairs]
    if strange := [reason for reason in reasons if reason]:
        raise RefusedError(
            strange, hint="to put the image onto another disk: imager restore IMAGE DISK --delta"
        )
    options = RestoreOptions(delta=True, read_back=read_back)
    return [
        (manifest, disk, plan_restore(repository, manifest, disk, path, options))
        for disk, path in pairs
    ]
