"""imager rm, pin, unpin, prune, gc: what goes, what must stay, and making room."""

from __future__ import annotations

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
    from imager.gc import GcResult
    from imager.repository import Repository
    from imager.retention import Verdict

YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show it, and remove nothing.")]


def remove(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...")],
    yes: YesOption = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Remove images. Blocks that other images share stay; gc makes room."""
    from imager.cli.asking import confirm
    from imager.errors import RefusedError
    from imager.units import count_of

    repository = open_repository(repo)
    ids = list(dict.fromkeys(_id_to_remove(repository, text) for text in images))
    if pinned := repository.pins() & set(ids):
        raise RefusedError([f"{image_id} is pinned: imager unpin" for image_id in sorted(pinned)])
    if not yes:
        confirm(f"Remove {count_of(len(ids), 'image')}: {', '.join(ids)}?")
    for image_id in ids:
        repository.remove(image_id)
    if json:
        print_json({"removed": ids})
    else:
        print(f"{count_of(len(ids), 'image')} removed; imager gc frees what nothing uses any more")


def pin(
    image: ImageArgument,
    reason: Annotated[str, typer.Option(help="Why, for those who come later.")] = "",
    repo: RepoOption = None,
) -> None:
    """Keep an image: neither prune nor rm removes it."""
    repository = open_repository(repo)
    manifest = find_image(repository, image)
    repository.pin(manifest.id, reason)
    print(f"{manifest.id} of {manifest.name} is pinned")


def unpin(image: ImageArgument, repo: RepoOption = None) -> None:
    """Let an image go again."""
    repository = open_repository(repo)
    manifest = find_image(repository, image)
    repository.unpin(manifest.id)
    print(f"{manifest.id} of {manifest.name} is not pinned")


def _keep(what: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        metavar="N", min=0, help=f"Keep the newest image of each of the last N {what}."
    )
    return option


def prune(
    keep_last: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Keep the newest N images.")
    ] = None,
    keep_hourly: Annotated[int | None, _keep("hours that have one")] = None,
    keep_daily: Annotated[int | None, _keep("days that have one")] = None,
    keep_weekly: Annotated[int | None, _keep("weeks that have one")] = None,
    keep_monthly: Annotated[int | None, _keep("months that have one")] = None,
    keep_yearly: Annotated[int | None, _keep("years that have one")] = None,
    name: Annotated[str | None, typer.Option(help="Only images of this name.")] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Remove images that no rule keeps; each name, host and set of disks is judged by itself.

    Pinned images stay, and of each group the newest, the newest without holes and the newest
    that was proved.
    """
    from imager.cli.asking import confirm
    from imager.retention import Rules, plan_prune, remove_images
    from imager.units import count_of

    rules = Rules(keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly)
    repository = open_repository(repo)
    verdicts = plan_prune(repository, rules, name=name)
    going = [verdict.snapshot.id for verdict in verdicts if not verdict.kept]
    if not json:
        _print_verdicts(verdicts)
    if going and not dry_run:
        if not yes:
            confirm(f"Remove {count_of(len(going), 'image')}?")
        remove_images(repository, verdicts)
    if json:
        kept = {item.snapshot.id: list(item.reasons) for item in verdicts if item.kept}
        print_json({"removed": going, "kept": kept, "dry_run": dry_run})
    else:
        done = "would be removed" if dry_run else "removed; imager gc frees their space"
        print(f"{count_of(len(going), 'image')} {done}")


def gc(
    dry_run: DryRunOption = False,
    expire: Annotated[
        bool,
        typer.Option(help="End captures that are open: they fail when they come to their end."),
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Write packs anew of which images use little.")
    ] = False,
    below: Annotated[
        float, typer.Option(metavar="PART", help="What --compact calls little: 0.5 is a half.")
    ] = 0.5,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Delete packs that no image uses, also while captures run.

    Captures that are under way have to end first; then a second gc deletes what this one marked.
    """
    from imager.cli.bars import open_progress
    from imager.errors import UsageError
    from imager.gc import collect

    if not 0 < below <= 1:
        raise UsageError(f"--below {below}: it must be more than 0 and not more than 1")
    repository = open_repository(repo)
    with open_progress(progress) as shown:
        result = collect(
            repository, shown, expire=expire, dry_run=dry_run, below=below if compact else 0
        )
    if json:
        print_json(result.to_json())
    else:
        _print_result(result, dry_run)


def _id_to_remove(repository: Repository, text: str) -> str:
    """A whole id is taken as it is, so that an image with a damaged manifest can be removed."""
    return text if text in repository.image_ids() else find_image(repository, text).id


def _print_verdicts(verdicts: list[Verdict]) -> None:
    rows = [
        (
            item.snapshot.id,
            item.snapshot.name,
            item.snapshot.host,
            f"{item.snapshot.created:%Y-%m-%d %H:%M}",
            "keep" if item.kept else "remove",
            ", ".join(item.reasons),
        )
        for item in verdicts
    ]
    print_table(["IMAGE", "NAME", "HOST", "CREATED (UTC)", "", "BY"], rows)


def _print_result(result: GcResult, dry_run: bool) -> None:
    from imager.units import count_of, show_bytes

    condemned = f"{count_of(len(result.condemned), 'pack')}, {show_bytes(result.condemned_bytes)}"
    compacted = f"{count_of(len(result.compacted), 'pack')}, {show_bytes(result.compacted_bytes)}"
    if dry_run:
        print(f"unused: {condemned}; {count_of(result.kept_packs, 'pack')} in use")
        if result.compacted:
            print(f"to be compacted: {compacted} would be freed")
        return
    deleted = f"{count_of(len(result.deleted), 'pack')}, {show_bytes(result.deleted_bytes)}"
    print(f"deleted: {deleted}; {count_of(result.kept_packs, 'pack')} in use")
    if result.compacted:
        print(f"compacted: {compacted} freed")
    if result.waiting_for:
        print(f"newly marked: {condemned}")
        print(f"captures that have to end first: {', '.join(result.waiting_for)}")
        print("run gc again afterwards; --expire if they are dead")
