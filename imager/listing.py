"""All images of a repository at a glance: what a list and the keep rules need of each manifest.

Manifests never change, so what was read of one is kept in a cache outside of the repository, by its
name, size and time of change; what is new or looks changed is read and proved again. Only local
folders have times, and only a repository of many images has a cache.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from imager.errors import IntegrityError, ObjectMissing
from imager.format import is_image_id
from imager.manifest import Manifest
from imager.repository import Repository
from imager.store.local import LocalStore

# Below this, reading all manifests is quick.
_LEAST_NEW = 256

# Raise it when the columns change.
_VERSION = 2

OnDamage = Callable[[IntegrityError], object]


class Summary(NamedTuple):
    """An image in short. Sizes in bytes; ``disks`` are their names; ``more`` is JSON of the rest
    that ``imager list --json`` shows."""

    id: str
    name: str
    host: str
    created: str
    note: str
    partial: bool
    consistency: str
    data_whole: bool
    disks: str
    disk_bytes: int
    used_bytes: int
    stored_bytes: int
    more: str

    @property
    def disk_names(self) -> tuple[str, ...]:
        return tuple(self.disks.split("/"))

    def to_json(self) -> dict[str, Any]:
        keys = ("id", "name", "host", "created", "note", "partial", "consistency")
        more: dict[str, Any] = json.loads(self.more)
        return {**{key: getattr(self, key) for key in keys}, **more}

    @classmethod
    def of(cls, manifest: Manifest) -> Summary:
        from imager.data.model import data_is_whole  # which knows the keep rules, and they this

        document, counts = manifest.document, manifest.statistics
        disks = [{"name": x.name, "size": x.size, "root": x.root} for x in manifest.disks]
        more = {"previous": document.get("previous"), "disks": disks, "statistics": counts}
        return cls(
            manifest.id,
            manifest.name,
            manifest.host,
            manifest.created,
            manifest.note,
            manifest.partial,
            str(document.get("consistency") or ""),
            data_is_whole(manifest),
            "/".join(disk.name for disk in manifest.disks),
            sum(disk.size for disk in manifest.disks),
            _number(counts.get("used_bytes")),
            _number(counts.get("stored_bytes")),
            json.dumps(more, ensure_ascii=False),
        )


def summaries(
    repository: Repository, on_damage: OnDamage | None = None, *, full: bool = False
) -> list[Summary]:
    """All images, oldest first. Damaged manifests are raised, or given to ``on_damage``.

    ``more`` may be empty, but not when ``full``.
    """
    store = repository.store
    if not isinstance(store, LocalStore):
        return [Summary.of(manifest) for manifest in repository.manifests(on_damage)]
    # Python's search for cycles would look at the same million objects again and again, and take
    # longer than all the rest.
    gc.disable()
    try:
        return _list_folder(repository, store, on_damage, full)
    finally:
        gc.freeze()
        gc.enable()


def _list_folder(
    repository: Repository, store: LocalStore, on_damage: OnDamage | None, full: bool
) -> list[Summary]:
    cache = _Cache(repository, store, full)
    rows: list[_Row] = []
    fresh = 0
    known = cache.rows
    for image_id, status in _files(store):
        row = known.get(image_id)
        if row is None or row[0] != status.st_size or row[1] != status.st_mtime_ns:
            try:
                summary = Summary.of(repository.manifest(image_id))
            except ObjectMissing:
                continue  # removed meanwhile, or no image
            except IntegrityError as error:
                if on_damage is None:
                    raise
                on_damage(error)
                continue
            fresh += 1
            row = status.st_size, status.st_mtime_ns, summary
        rows.append(row)
    if fresh >= _LEAST_NEW:
        cache.save(rows)
    return [row[2] for row in rows]


def _files(store: LocalStore) -> Iterator[tuple[str, os.stat_result]]:
    """In the order of ids, which is that of time."""
    try:
        fd = os.open(store.folder / "manifests", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:  # an open folder saves looking up its path for each file
        with os.scandir(fd) as entries:
            files = {entry.name: entry for entry in entries}
        for name in sorted(files):
            image_id = name[:-5]
            if not name.endswith(".json") or not is_image_id(image_id):
                continue
            try:
                status = files[name].stat()
            except FileNotFoundError:
                continue
            yield image_id, status
    finally:
        os.close(fd)


_Row = tuple[int, int, Summary]
"""Size of a manifest's file in bytes, its time of change in nanoseconds, and what it says."""


class _Cache:
    """Rows of an earlier run, in columns, which are quickly read; what only a full listing needs is
    on a line of its own."""

    def __init__(self, repository: Repository, store: LocalStore, full: bool) -> None:
        place = hashlib.sha256(os.fsencode(store.folder)).hexdigest()[:16]
        self._file = cache_folder() / f"listing-{_VERSION}-{repository.id[:16]}-{place}.json"
        self.rows = self._read(full)

    def save(self, rows: list[_Row]) -> None:
        """For the next run; without a word where that cannot be."""
        before = self._read(full=True)
        whole = [
            row if row[2].more or row[2].id not in before else (*row[:2], before[row[2].id][2])
            for row in rows
        ]
        sizes, times, images = (list(column) for column in zip(*whole, strict=True))
        *columns, more = (list(column) for column in zip(*images, strict=True))
        lines = [json.dumps(part, ensure_ascii=False) for part in ([sizes, times, *columns], more)]
        new = self._file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as sink:
                sink.write("".join(f"{line}\n" for line in lines))
            new.replace(self._file)

    def _read(self, full: bool) -> dict[str, _Row]:
        """A file that is not as it was written counts for nothing."""
        with suppress(OSError, ValueError, TypeError, LookupError):
            status = self._file.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return {}
            with self._file.open("rb") as source:
                sizes, times, *columns = json.loads(source.readline())
                more = json.loads(source.readline()) if full else [""] * len(sizes)
            if len(columns) + 1 != len(Summary._fields):
                return {}
            images = map(tuple.__new__, repeat(Summary), zip(*columns, more, strict=True))
            return dict(zip(columns[0], zip(sizes, times, images, strict=True), strict=True))
        return {}


def cache_folder() -> Path:
    """``IMAGER_CACHE_DIR``, else the system's for root, else the user's."""
    if named := os.environ.get("IMAGER_CACHE_DIR"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/cache/imager")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imager"


def _number(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0
