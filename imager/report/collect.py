"""Collect what a report tells, from manifests, and from the maps of a few images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta

from imager.data.model import DataBackup, backups_of
from imager.diff import diff
from imager.diskmap import make_disk_map
from imager.errors import ImagerError, UsageError
from imager.manifest import Disk, Manifest
from imager.report.model import Changed, DiskDetail, ImageFacts, Report, Server
from imager.repository import Repository

MAP_COLUMNS, MAP_ROWS = 96, 8

Proofs = Mapping[str, tuple[bool, str]]
"""Of image ids: whether the newest try to boot it succeeded, and words for it."""


def collect(
    repository: Repository,
    *,
    now: datetime,
    name: str | None = None,
    compare: tuple[Manifest, Manifest] | None = None,
    proofs: Proofs | None = None,
    max_age: Callable[[str], timedelta | None] = lambda name: None,
    closer: int = 20,
) -> Report:
    """Servers that need somebody come first. The ``closer`` first of them get their disks drawn and
    the newest image compared with the one before; with ``compare`` those two images instead.

    Raises ImagerError when the repository can't be listed; damaged manifests and maps are told in
    the report.
    """
    damaged: list[str] = []
    pins = repository.pins()
    facts: dict[str, list[ImageFacts]] = {}
    hosts: dict[str, set[str]] = {}
    last_two: dict[str, tuple[Manifest, Manifest]] = {}
    for manifest in repository.manifests(lambda error: damaged.append(error.message)):
        its_name = manifest.name
        if name is None or its_name == name:
            proof = (proofs or {}).get(manifest.id)
            facts.setdefault(its_name, []).append(_facts(manifest, manifest.id in pins, proof))
            hosts.setdefault(its_name, set()).add(manifest.host)
            before = last_two[its_name][1] if its_name in last_two else manifest
            last_two[its_name] = before, manifest
    if name is not None and not facts:
        raise UsageError(f"there is no image named {name}", hint="see: imager list")
    servers = [
        Server(its_name, tuple(sorted(hosts[its_name] - {""})), tuple(images), max_age(its_name))
        for its_name, images in facts.items()
    ]
    servers.sort(key=lambda server: (*_urgency(server, now), server.name))
    pairs = {server.name: last_two[server.name] for server in servers[:closer]}
    if compare is not None:
        pairs = {compare[1].name: compare}
    details = {
        its_name: tuple(_details(repository, before, newest, damaged))
        for its_name, (before, newest) in pairs.items()
    }
    data = {its_name: _data_backups(newest, damaged) for its_name, (_, newest) in pairs.items()}
    left_out = sum(server.name not in details for server in servers)
    return Report(repository.store.url, now, servers, details, damaged, left_out, data)


def _facts(manifest: Manifest, pinned: bool, proof: tuple[bool, str] | None) -> ImageFacts:
    counts = manifest.statistics
    return ImageFacts(
        id=manifest.id,
        created=_time(manifest.created),
        note=manifest.note,
        consistency=str(manifest.document.get("consistency") or "unknown"),
        size=sum(disk.size for disk in manifest.disks),
        used=_count(counts.get("used_bytes")),
        added=_count(counts.get("stored_bytes")),
        milliseconds=_count(counts.get("milliseconds")),
        partial=manifest.partial,
        pinned=pinned,
        proved=proof[0] if proof else None,
        proof_words=proof[1] if proof else "",
    )


def _urgency(server: Server, now: datetime) -> tuple[bool, bool, bool]:
    return not server.is_overdue(now), not server.newest.partial, server.proved is not None


def _details(
    repository: Repository, before: Manifest, newest: Manifest, damaged: list[str]
) -> Iterable[DiskDetail]:
    earlier = {disk.name: disk for disk in before.disks} if before.id != newest.id else {}
    for disk in newest.disks:
        try:
            drawn = make_disk_map(repository.block_map(disk), disk, MAP_COLUMNS * MAP_ROWS)
            other = earlier.get(disk.name)
            changed = _changed(repository, other, disk) if other else ()
        except ImagerError as error:
            damaged.append(f"{newest.id}/{disk.name}: {error.message}")
            continue
        yield DiskDetail(disk, drawn, before.id if other else None, changed)


def _data_backups(manifest: Manifest, damaged: list[str]) -> list[DataBackup]:
    try:
        return backups_of(manifest)
    except ImagerError as error:
        damaged.append(error.message)
        return []


def _changed(repository: Repository, before: Disk, disk: Disk) -> tuple[Changed, ...]:
    """Most first."""
    lengths: Counter[str] = Counter()
    for change in diff(repository, before, disk).changes:
        lengths[change.where] += change.length
    return tuple(Changed(where, length) for where, length in lengths.most_common())


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.fromtimestamp(0, UTC)


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
