"""Which images to keep: by count, and by hour, day, week, month and year.

A rule keeps the newest image of each of its newest periods. Each group of images (one name from
one host with the same disks) is judged by itself. Three things are kept whatever the rules say:
what is pinned, the newest whole image of a group, and the newest image of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from typing import NamedTuple

from imager.errors import ObjectMissing, UsageError
from imager.listing import Summary, summaries
from imager.proofs import latest_proofs
from imager.repository import Repository


class Snapshot(NamedTuple):
    """What the rules look at. ``created`` is in UTC; ``whole`` says that nothing was unreadable."""

    id: str
    name: str
    host: str
    disks: tuple[str, ...]
    created: datetime
    whole: bool

    @property
    def group(self) -> tuple[str, str, tuple[str, ...]]:
        return self.name, self.host, self.disks

    @classmethod
    def of(cls, image: Summary) -> Snapshot:
        # the id begins with the time (docs/format.md, "Manifest")
        created = datetime.fromisoformat(image.id[:16].upper())
        return cls(image.id, image.name, image.host, image.disk_names, created, not image.partial)


@dataclass(frozen=True)
class Rules:
    """How many of each to keep; None keeps none by that rule."""

    last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if wrong := [name for name, count in given.items() if count is not None and count < 0]:
            raise UsageError(f"--keep-{wrong[0]} {given[wrong[0]]}: a count cannot be negative")
        if not any(given.values()):
            raise UsageError(
                "no rule says what to keep, so all but the newest would go",
                hint="for example: --keep-last 3 --keep-daily 7 --keep-weekly 4",
            )


class Verdict(NamedTuple):
    """``reasons`` tell why an image is kept; one without reasons is to go."""

    snapshot: Snapshot
    reasons: tuple[str, ...]

    @property
    def kept(self) -> bool:
        return bool(self.reasons)


# The period that a moment lies in; ISO 8601 weeks begin on Monday.
_PERIODS: dict[str, Callable[[datetime], object]] = {
    "hourly": lambda at: (at.date(), at.hour),
    "daily": lambda at: at.date(),
    "weekly": lambda at: at.isocalendar()[:2],
    "monthly": lambda at: (at.year, at.month),
    "yearly": lambda at: at.year,
}


def judge(
    snapshots: Iterable[Snapshot],
    rules: Rules,
    pinned: Collection[str] = (),
    proved: Collection[str] = (),
) -> list[Verdict]:
    """A verdict on each, group by group, the newest first. ``proved``: ids of those that were seen
    booting."""
    groups = defaultdict(list)
    for snapshot in snapshots:
        groups[snapshot.group].append(snapshot)
    verdicts = []
    for key in sorted(groups):
        ordered = sorted(groups[key], key=lambda item: (item.created, item.id), reverse=True)
        reasons = _reasons(ordered, rules, pinned, proved)
        verdicts += [Verdict(item, tuple(reasons[item.id])) for item in ordered]
    return verdicts


def plan_prune(
    repository: Repository, rules: Rules, *, name: str | None = None, host: str | None = None
) -> list[Verdict]:
    """A verdict on each image of the repository, or of one name, or of one host.

    Raises IntegrityError when a manifest is damaged: which image it is of is not known then.
    """
    snapshots = [
        Snapshot.of(image)
        for image in summaries(repository)
        if name in (None, image.name) and host in (None, image.host)
    ]
    proved = {image_id for image_id, proof in latest_proofs(repository).items() if proof.proved}
    return judge(snapshots, rules, repository.pins(), proved)


def remove_images(repository: Repository, verdicts: Iterable[Verdict]) -> list[str]:
    """Remove those that are to go; their ids. Their blocks stay until a gc."""
    going = [verdict.snapshot.id for verdict in verdicts if not verdict.kept]
    for image_id in going:
        with suppress(ObjectMissing):  # another prune was quicker
            repository.remove(image_id)
    return going


def prune(repository: Repository, rules: Rules, *, name: str, host: str) -> list[str]:
    """Remove the images of one name and host that no rule keeps; their ids."""
    return remove_images(repository, plan_prune(repository, rules, name=name, host=host))


def _reasons(
    ordered: list[Snapshot], rules: Rules, pinned: Collection[str], proved: Collection[str]
) -> defaultdict[str, list[str]]:
    """Why each image of a group is kept; ``ordered`` from new to old."""
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for item in ordered:
        if item.id in pinned:
            reasons[item.id].append("pinned")
    for item in ordered[: rules.last or 0]:
        reasons[item.id].append("last")
    for rule, period_of in _PERIODS.items():
        seen: set[object] = set()
        for item in ordered:
            period = period_of(item.created)
            if len(seen) < (getattr(rules, rule) or 0) and period not in seen:
                seen.add(period)
                reasons[item.id].append(rule)
    for reason, found in {
        "newest": ordered,
        "newest whole": [item for item in ordered if item.whole],
        "newest proved": [item for item in ordered if item.id in proved],
    }.items():
        if found and not reasons[found[0].id]:
            reasons[found[0].id].append(reason)
    return reasons
