"""imager data list, run, restore: the data backups that belong to an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imager.cli.options import (
    ImageArgument,
    JsonOption,
    ProgressOption,
    RepoOption,
    find_image,
    open_repository,
)
from imager.cli.output import print_json, print_table

if TYPE_CHECKING:
    from imager.data.bringing import BringPlan
    from imager.data.model import DataBackup, DataEntry
    from imager.manifest import Manifest

NameOption = Annotated[str | None, typer.Option(metavar="N", help="Only the one of this name.")]

app = typer.Typer(
    help="Data backups beside images: list them, run them, bring the data back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_backups(image: ImageArgument, repo: RepoOption = None, json: JsonOption = False) -> int:
    """List the data backups that were taken with an image, and how to bring each back by hand.

    Exit code 5 when one of them failed or is not whole.
    """
    from imager.data.model import backups_of

    manifest = find_image(open_repository(repo), image)
    backups = backups_of(manifest)
    if json:
        print_json(
            {
                "image": manifest.id,
                "created": manifest.created,
                "data": [backup.to_json() for backup in backups],
            }
        )
    else:
        _print_backups(manifest, backups)
    return 0 if all(backup.whole for backup in backups) else 5


@app.command("run")
def run(
    name: NameOption = None,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Run the data backups of imager.toml now, without an image. Exit code 5 when one fails."""
    from imager.cli.bars import open_progress
    from imager.data.backing import back_up, drop_old
    from imager.errors import ImagerError

    entries = _entries(name)
    with open_progress(progress) as shown:
        backups = [item for when in ("before", "after") for item in back_up(entries, when, shown)]
        failures = []
        if any(entry.retention for entry in entries):
            try:  # what images name stays
                failures = drop_old(entries, open_repository(repo), shown)
            except ImagerError as error:
                failures = [f"nothing old was removed, since images may name it: {error.message}"]
                shown.note(failures[0])
    if json:
        print_json({"data": [backup.to_json() for backup in backups], "failures": failures})
    else:
        _print_table(backups)
    return 0 if all(backup.whole for backup in backups) and not failures else 5


@app.command("restore")
def restore(
    image: ImageArgument,
    name: NameOption = None,
    at: Annotated[
        Path,
        typer.Option(metavar="PATH", help="Where the system is mounted; / is the running one."),
    ] = Path("/"),
    latest: Annotated[
        bool, typer.Option("--latest", help="The newest snapshot instead of the image's own.")
    ] = False,
    paired: Annotated[
        bool, typer.Option("--paired", help="The snapshot that was taken with the image (default).")
    ] = False,
    folder: Annotated[
        bool, typer.Option("--folder", help="PATH may be a folder where nothing is mounted.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Bring back the data that was backed up with an image, on the server or below a folder.

    Stop the services that use the data first. Files that the backup does not have stay. A
    system that is mounted at PATH is known by its own imager.toml, if it has one.
    """
    from imager.cli.asking import confirm
    from imager.cli.bars import open_progress
    from imager.data.bringing import Choice, bring_back, plan_bringing
    from imager.data.settings import has_configuration, load_entries
    from imager.errors import RefusedError, UsageError

    if latest and paired:
        raise UsageError("--latest and --paired: which one?")
    manifest = find_image(open_repository(repo), image)
    target = at.resolve()
    root = target if has_configuration(target) else Path("/")
    choice = Choice(name, latest=latest)
    entries = load_entries(root)
    plans = plan_bringing(manifest, entries, target, choice, folder=folder, root=root)
    if not json:
        for plan in plans:
            _print_plan(plan)
    if reasons := [reason for plan in plans for reason in plan.refusals]:
        raise RefusedError(reasons)
    if not yes:
        confirm(f"Bring {', '.join(plan.entry.name for plan in plans)} back to {target}?")
    with open_progress(progress) as shown:
        for plan in plans:
            bring_back(plan, shown)
            if not json:
                print(f"{plan.entry.name}: brought back to {target}")
    if json:
        print_json([plan.to_json() for plan in plans])


def _entries(name: str | None) -> list[DataEntry]:
    """Of imager.toml; raises UsageError when there is none, or none of that name."""
    from imager.data.settings import load_entries
    from imager.errors import UsageError

    entries = load_entries()
    found = [entry for entry in entries if name is None or entry.name == name]
    if not found:
        what = f"no data backup {name}" if name else "no data backups"
        known = ", ".join(entry.name for entry in entries)
        raise UsageError(
            f"imager.toml has {what}",
            hint=f"it has: {known}" if known else "write one: [[data]], see docs/data-backup.md",
        )
    return found


# --- what is printed ---


def _print_backups(manifest: Manifest, backups: list[DataBackup]) -> None:
    import shlex

    print(f"image {manifest.id} of {manifest.name}: {_age(manifest.created)} old")
    if not backups:
        print("no data backup was taken with it")
        return
    _print_table(backups)
    for backup in backups:
        if backup.snapshot and backup.restore:
            print(f"{backup.name} by hand: {shlex.join(backup.restore)}")
    if any(backup.snapshot for backup in backups):
        print(f"bring it back: imager data restore {manifest.id}")


def _print_table(backups: list[DataBackup]) -> None:
    from imager.units import show_bytes

    rows = [
        (
            backup.name,
            backup.engine,
            backup.shown_snapshot,
            "" if backup.size is None else show_bytes(backup.size),
            _age(backup.finished),
            "FAILED" if backup.error else "whole" if backup.whole else "NOT WHOLE",
        )
        for backup in backups
    ]
    header = ["NAME", "ENGINE", "SNAPSHOT", "SIZE", "AGE", "STATE"]
    print_table(header, rows, right="SIZE AGE")
    for backup in backups:
        for text in filter(None, (backup.error, *backup.warnings)):
            print(f"  {backup.name}: {text}")


def _age(text: str) -> str:
    """Of a UTC time."""
    from datetime import UTC, datetime

    from imager.units import show_age

    try:
        then = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return "?"
    return show_age(max(int((datetime.now(UTC) - then).total_seconds()), 0))


def _print_plan(plan: BringPlan) -> None:
    from imager.data.model import shown_snapshot

    entry = plan.entry
    snapshot = shown_snapshot(entry.engine, plan.snapshot)
    print(f"bring back {entry.name} ({entry.engine} {snapshot}) to {plan.target}")
    for path in entry.paths:
        print(f"  - {path}")
    for text in plan.overwrites:
        print(f"  overwrites in {text}")
    for text in plan.warnings:
        print(f"  warning: {text}")
    for text in plan.refusals:
        print(f"  REFUSED: {text}")
