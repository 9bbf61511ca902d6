"""imager guard, rollback: a change with a way back, and the way back."""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from imager.cli import atboot
from imager.cli.options import (
    JsonOption,
    ProgressOption,
    RepoOption,
    find_disks,
    open_repository,
)
from imager.cli.output import print_json
from imager.cli.restoring import ReadBackOption, carry_out, pair_disks

if TYPE_CHECKING:
    from imager.manifest import Disk, Manifest
    from imager.plan import RestorePlan
    from imager.repository import Repository

_ON_FAILURE = ("ask", "rollback", "keep")
_STANDARD_ERROR = 2


def rollback(
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE",
            help="An id, a unique prefix of one, or NAME@latest; IMAGE/DISK for one.",
        ),
    ] = None,
    disks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DISK",
            help="The disk that the image was made of; else found by serial number or WWN.",
        ),
    ] = None,
    read_back: ReadBackOption = False,
    at_boot: Annotated[
        bool,
        typer.Option(
            "--at-boot", help="At the next start, by a rescue system that GRUB starts once."
        ),
    ] = False,
    network: Annotated[
        str,
        typer.Option(
            metavar="dhcp|none|ADDRESS/PREFIX[,GATEWAY[,DNS...]]",
            help="At boot, for a repository that is fetched.",
        ),
    ] = "dhcp",
    cancel: Annotated[bool, typer.Option("--cancel", help="Take back --at-boot.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Show what --at-boot arranged.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask for the disk's name to be typed.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Put a disk back to an image of it, writing only what differs. Interrupted, run it again."""
    from imager.deviceuse import uses_of
    from imager.errors import RefusedError, UsageError

    if cancel or status:
        if image is not None or (cancel and status) or at_boot:
            raise UsageError("--cancel and --status stand alone")
        return atboot.cancel(json=json) if cancel else atboot.show_status(json=json)
    if image is None:
        raise UsageError("which image? see: imager list")
    repository = open_repository(repo)
    if at_boot:
        pairs = own_disks(repository, image, disks or [])
        return atboot.arrange(
            repository, pairs, network=network, yes=yes, json=json, progress=progress
        )
    prepared = plan_rollback(repository, image, disks or [], read_back=read_back)
    try:
        return carry_out(repository, prepared, yes=yes, json=json, progress=progress)
    except RefusedError as error:
        if any(uses_of(item.target) for *_, item in prepared if item.target_exists):
            error.hint = "--at-boot rolls a running system back at its next start"
        raise


def own_disks(
    repository: Repository, image: str, paths: list[str]
) -> list[tuple[Manifest, Disk, str]]:
    """Each disk of the image, and the device that it goes back to. Raises RefusedError when that
    is another disk than its own."""
    from imager.errors import RefusedError
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
    return [(manifest, disk, path) for disk, path in pairs]


def plan_rollback(
    repository: Repository, image: str, paths: list[str], *, read_back: bool = False
) -> list[tuple[Manifest, Disk, RestorePlan]]:
    """The plans, for each disk of the image. Raises RefusedError for another disk than its own."""
    from imager.plan import RestoreOptions, plan_restore

    options = RestoreOptions(delta=True, read_back=read_back)
    return [
        (manifest, disk, plan_restore(repository, manifest, disk, path, options))
        for manifest, disk, path in own_disks(repository, image, paths)
    ]


def guard(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="The change, and its arguments.")
    ],
    disk: Annotated[
        list[str], typer.Option("--disk", metavar="DISK", help="To image before; several times.")
    ],
    check: Annotated[
        list[str] | None,
        typer.Option(
            "--check", metavar="COMMAND", help="Ends with 0 if all is well after it; several times."
        ),
    ] = None,
    check_within: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="Repeat a failing check for so long."),
    ] = 0,
    on_failure: Annotated[
        str, typer.Option(metavar="|".join(_ON_FAILURE), help="Roll back, or keep what is there.")
    ] = "ask",
    name: Annotated[
        str | None, typer.Option(help="Of the machine, as with capture. Default: host or file.")
    ] = None,
    consistency: Annotated[
        str, typer.Option(metavar="HOW", help="Of the image, as with capture.")
    ] = "auto",
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Image, run a command, check; if that fails, offer the way back. Exit code 1 if it failed."""
    from imager.errors import ImagerError, UsageError
    from imager.guard import Change, make

    if on_failure not in _ON_FAILURE:
        raise UsageError(f"--on-failure {on_failure}: it can be {', '.join(_ON_FAILURE)}")
    change = Change(
        command=tuple(command),
        checks=tuple(tuple(_words(text)) for text in check or ()),
        check_seconds=check_within,
        output=_STANDARD_ERROR if json else None,
    )
    what = shlex.join(command)
    repository, manifest = _take_image(
        disk, name=name, note=f"before: {what}", consistency=consistency, repo=repo, shown=progress
    )
    _say(f"image {manifest.id} of {manifest.name} is the way back from: {what}")
    repository.pin(manifest.id, f"guards: {what}")
    try:
        failure = make(change)
    except ImagerError:  # it was not even begun
        repository.unpin(manifest.id)
        raise
    done = "nothing"
    if failure is not None:
        _say(f"FAILED: {failure}")
        done = _way_back(repository, manifest, disk, on_failure, progress)
    if done in ("nothing", "rolled back"):
        repository.unpin(manifest.id)
    if json:
        print_json({"image": manifest.id, "failure": failure, "done": done})
        return 0 if failure is None else 1
    if failure is None:
        return 0
    raise ImagerError(f"{failure}\n{_OUTCOMES[done]}", hint=_hint(manifest, disk, done))


_OUTCOMES = {
    "at boot": "the next start of this machine rolls it back (imager rollback --cancel)",
    "rolled back": "the disk is what it was before",
    "kept": "the disk is as the command left it, and the image is pinned",
}


def _hint(manifest: Manifest, disks: list[str], done: str) -> str | None:
    if done == "rolled back":
        return None
    return (
        f"the way back: imager rollback {manifest.id} {shlex.join(disks)}; "
        f"not needed any more: imager unpin {manifest.id}"
    )


def _words(text: str) -> list[str]:
    from imager.errors import UsageError

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--check {text}: {error}") from None
    if not words:
        raise UsageError("--check: an empty command")
    return words


def _say(text: str) -> None:
    """Standard output belongs to the command that is guarded, or to a JSON document."""
    print(f"imager guard: {text}", file=sys.stderr, flush=True)


def _take_image(
    paths: list[str], *, name: str | None, note: str, consistency: str, repo: str | None, shown: str
) -> tuple[Repository, Manifest]:
    """Raises ImagerError when there is no image without holes: then nothing is run."""
    from imager.cli.bars import open_progress
    from imager.cli.sources import _open_or_make
    from imager.errors import ImagerError
    from imager.imaging import ImagingJob, run

    repository = _open_or_make(repo, False)
    job = ImagingJob(paths=tuple(paths), name=name, note=note, consistency=consistency)
    with open_progress(shown) as progress:
        manifest = run(job, lambda: repository, progress).manifest
    if manifest.partial:
        raise ImagerError(
            f"the image {manifest.id} has holes, so it is no way back; nothing was run",
            hint=f"imager show {manifest.id} lists what could not be read",
        )
    return repository, manifest


def _way_back(
    repository: Repository, manifest: Manifest, paths: list[str], on_failure: str, progress: str
) -> str:
    """What was done: "rolled back", "at boot" or "kept". Never silently: only what was asked for,
    now or by ``on_failure``."""
    from imager.cli.asking import can_ask, choose
    from imager.deviceuse import uses_of
    from imager.errors import ImagerError

    if on_failure == "keep" or (on_failure == "ask" and not can_ask()):
        return "kept"
    try:
        used = [
            f"{path}: {use.device} is {use.description}" for path in paths for use in uses_of(path)
        ]
        if used:
            _say("it cannot be rolled back while it runs: " + "; ".join(used))
            return _way_back_at_boot(repository, manifest, paths, on_failure, progress)
        if on_failure == "ask" and choose("Roll back, or keep it as it is?", "rk") != "r":
            return "kept"
        prepared = plan_rollback(repository, manifest.id, paths)
        with redirect_stdout(sys.stderr):
            code = carry_out(repository, prepared, yes=True, json=False, progress=progress)
    except ImagerError as error:  # the failure of the command is what is to be told in the end
        _say(f"not rolled back: {error.message}")
        return "kept"
    return "rolled back" if code == 0 else "kept"


def _way_back_at_boot(
    repository: Repository, manifest: Manifest, paths: list[str], on_failure: str, progress: str
) -> str:
    """What was done: "at boot" or "kept". Restarting is left to the person, or their script."""
    from imager.cli.asking import choose

    question = "Roll back at the next start, or keep it as it is?"
    if on_failure == "ask" and choose(question, "rk") != "r":
        return "kept"
    pairs = own_disks(repository, manifest.id, paths)
    with redirect_stdout(sys.stderr):
        atboot.arrange(repository, pairs, network="dhcp", yes=True, json=False, progress=progress)
    return "at boot"
