"""imager plan, restore, rollback."""

from __future__ import annotations

from pathlib import Path
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
from imager.cli.output import print_json

if TYPE_CHECKING:
    from imager.manifest import Disk, Manifest
    from imager.plan import RestoreOptions, RestorePlan
    from imager.repository import Repository
    from imager.restore import RestoreResult

TargetsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="TARGET...",
        help="A disk, a partition or a file; for several disks one each, or DISK=TARGET.",
    ),
]
PartitionOption = Annotated[
    int | None, typer.Option(metavar="N", help="Restore only this partition.")
]
ToPartitionOption = Annotated[
    int | None, typer.Option(metavar="M", help="Into this partition of the target.")
]
DeltaOption = Annotated[
    bool, typer.Option("--delta", help="Compare first and write only the blocks that differ.")
]
GrowOption = Annotated[
    bool, typer.Option("--grow", help="Grow the last partition and its filesystem to the end.")
]
NewIdsOption = Annotated[
    bool, typer.Option("--new-ids", help="New disk and partition ids, for use beside the original.")
]
ReadBackOption = Annotated[
    bool, typer.Option("--read-back", help="Read all of it again afterwards and compare digests.")
]


def plan(
    image: ImageArgument,
    targets: TargetsArgument,
    partition: PartitionOption = None,
    to_partition: ToPartitionOption = None,
    delta: DeltaOption = False,
    grow: GrowOption = False,
    new_ids: NewIdsOption = False,
    read_back: ReadBackOption = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> int:
    """Show what a restore would do, and every reason not to. Writes nothing."""
    from imager.errors import RefusedError
    from imager.plan import RestoreOptions

    options = RestoreOptions(partition, to_partition, delta, grow, new_ids, read_back)
    repository = open_repository(repo)
    plans = [item[-1] for item in _make_plans(repository, image, targets, options)]
    if json:
        print_json([item.to_json() for item in plans])
    else:
        for item in plans:
            _print_plan(item)
    return RefusedError.exit_code if any(item.refusals for item in plans) else 0


def restore(
    image: ImageArgument,
    targets: TargetsArgument,
    partition: PartitionOption = None,
    to_partition: ToPartitionOption = None,
    delta: DeltaOption = False,
    grow: GrowOption = False,
    new_ids: NewIdsOption = False,
    read_back: ReadBackOption = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask for the target's name to be typed.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Put an image onto disks. Interrupted, run it again: it writes only what is missing."""
    from imager.plan import RestoreOptions

    options = RestoreOptions(partition, to_partition, delta, grow, new_ids, read_back)
    repository = open_repository(repo)
    prepared = _make_plans(repository, image, targets, options)
    return carry_out(repository, prepared, yes=yes, json=json, progress=progress)


def carry_out(
    repository: Repository,
    prepared: list[tuple[Manifest, Disk, RestorePlan]],
    *,
    yes: bool,
    json: bool,
    progress: str,
) -> int:
    """Show the plans, ask, restore; the exit code. Raises RefusedError with all reasons."""
    from imager.cli.asking import confirm_by_name
    from imager.cli.bars import open_progress
    from imager.errors import RefusedError
    from imager.restore import restore as run

    reasons = [reason for *_, item in prepared for reason in item.refusals]
    if reasons:
        raise RefusedError(reasons)
    if not json:
        for *_, item in prepared:
            _print_plan(item)
    if not yes:
        for *_, item in prepared:
            confirm_by_name(item.target)
    results = []
    with open_progress(progress) as shown:
        for manifest, disk, item in prepared:
            results.append((item, run(repository, manifest, disk, item, shown)))
    if json:
        print_json([{"target": item.target, **result.to_json()} for item, result in results])
    else:
        for item, result in results:
            _print_result(item, result)
    return 5 if any(result.missing for _, result in results) else 0


def _make_plans(
    repository: Repository, image: str, targets: list[str], options: RestoreOptions
) -> list[tuple[Manifest, Disk, RestorePlan]]:
    from imager.plan import plan_restore

    manifest, disks = find_disks(repository, image)
    return [
        (manifest, disk, plan_restore(repository, manifest, disk, target, options))
        for disk, target in pair_disks(disks, targets)
    ]


def pair_disks(disks: list[Disk], targets: list[str]) -> list[tuple[Disk, str]]:
    """Which disk goes where. Raises UsageError unless each target has exactly one disk."""
    from imager.errors import UsageError

    named = {disk.name: disk for disk in disks}
    pairs = []
    for n, text in enumerate(targets):
        name, equals, path = text.partition("=")
        if equals and name in named:
            pairs.append((named[name], path))
        elif n < len(disks):
            pairs.append((disks[n], text))
    if len(pairs) != len(disks) or len(targets) != len(disks):
        raise UsageError(
            f"{len(disks)} disks to restore ({', '.join(named)}) and {len(targets)} targets",
            hint="give one target for each, or name one disk: IMAGE/DISK",
        )
    names = {disk.name for disk, _ in pairs}
    paths = {Path(path).resolve() for _, path in pairs}
    if len(names) != len(pairs) or len(paths) != len(pairs):
        raise UsageError("a disk or a target is named twice")
    return pairs


def _print_plan(plan: RestorePlan) -> None:
    from imager.units import count_of, show_bytes

    identity = plan.identity
    words = [text for text in (identity.model, identity.serial, identity.wwn) if text]
    state = "" if plan.target_exists else ", a new file"
    print(f"restore {plan.image}/{plan.disk} to {plan.target}")
    print(f"  target: {show_bytes(plan.target_size)}{state} {' '.join(words)}".rstrip())
    for text in plan.overwrites:
        print(f"  overwrites {text}")
    for text in plan.steps:
        print(f"  - {text}")
    print(f"  {show_bytes(plan.data_bytes)} of data from {count_of(plan.packs, 'pack')}")
    for text in (*plan.warnings, *plan.missing):
        print(f"  warning: {text}")
    for text in plan.refusals:
        print(f"  REFUSED: {text}")


def _print_result(plan: RestorePlan, result: RestoreResult) -> None:
    from imager.units import show_bytes

    print(f"{plan.target}: {show_bytes(result.written_bytes)} written", end="")
    print(f", {show_bytes(result.kept_bytes)} were right already" if result.kept_bytes else "")
    for old, new in result.new_ids.items():
        print(f"  id {old} is now {new}")
    if result.grown_to:
        print(f"  the filesystem was grown to {show_bytes(result.grown_to)}")
    for text in result.missing:
        print(f"  MISSING: {text}")
