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
from imager.repository import NoImage, Repository
from imager.store.local import LocalStore

# Below this, reading all manifests is quick.
_LEAST_NEW = 256

# Raise it when the columns change.
_VERSION = 1

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


def summaries(repository: Repository, on_damage: OnDamage | None = None) -> list[Summary]:
    """All images, oldest first. Damaged manifests are raised, or given to ``on_damage``."""
    store = repository.store
    if not isinstance(store, LocalStore):
        return [Summary.of(manifest) for manifest in repository.manifests(on_damage)]
    cache = _Cache(repository, store)
    found, fresh = [], 0
    for image_id, stamp in _stamps(store):
        summary = cache.get(image_id, stamp)
        if summary is None:
            try:
                summary = Summary.of(repository.manifest(image_id))
            except NoImage:
                continue
            except ObjectMissing:
                continue  # removed meanwhile
            except IntegrityError as error:
                if on_damage is None:
                    raise
                on_damage(error)
                continue
            fresh += 1
            cache.add(stamp, summary)
        found.append(summary)
    if fresh >= _LEAST_NEW:
        cache.save(found)
    return found


Stamp = tuple[int, int]
"""A file's size in bytes and its time of change in nanoseconds."""


def _stamps(store: LocalStore) -> Iterator[tuple[str, Stamp]]:
    """In the order of ids, which is that of time."""
    try:
        fd = os.open(store.folder / "manifests", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:  # an open folder saves looking up its path for each file
        with os.scandir(fd) as entries:
            files = {entry.name: entry for entry in entries}
        for name in sorted(files):
            image_id = name.removesuffix(".json")
            if is_image_id(image_id) and image_id != name:
                with suppress(FileNotFoundError):
                    status = files[name].stat()
                    yield image_id, (status.st_size, status.st_mtime_ns)
    finally:
        os.close(fd)


class _Cache:
    """Rows of an earlier run, in columns: a hundred thousand are read in a third of a second."""

    def __init__(self, repository: Repository, store: LocalStore) -> None:
        place = hashlib.sha256(os.fsencode(store.folder)).hexdigest()[:16]
        self._file = cache_folder() / f"listing-{_VERSION}-{repository.id[:16]}-{place}.json"
        self._rows: dict[str, tuple[Stamp, Summary]] = {}
        self._load()

    def get(self, image_id: str, stamp: Stamp) -> Summary | None:
        row = self._rows.get(image_id)
        return row[1] if row is not None and row[0] == stamp else None

    def add(self, stamp: Stamp, summary: Summary) -> None:
        self._rows[summary.id] = stamp, summary

    def save(self, kept: list[Summary]) -> None:
        """For the next run; without a word where that cannot be."""
        rows = [self._rows[summary.id] for summary in kept]
        sizes, times = ([stamp[n] for stamp, _ in rows] for n in range(2))
        columns = [sizes, times, *(list(column) for column in zip(*kept, strict=True))]
        new = self._file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as sink:
                sink.write(json.dumps(columns, ensure_ascii=False))
            new.replace(self._file)

    def _load(self) -> None:
        """A file that is not as it was written counts for nothing.

        Python's search for cycles would look at the same million objects again and again, and
        take longer than all the rest.
        """
        gc.disable()
        try:
            self._read()
        finally:
            gc.freeze()
            gc.enable()

    def _read(self) -> None:
        with suppress(OSError, ValueError, TypeError, LookupError):
            status = self._file.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return
            sizes, times, *columns = json.loads(self._file.read_text(encoding="utf-8"))
            stamps = zip(sizes, times, strict=True)
            rows = map(tuple.__new__, repeat(Summary), zip(*columns, strict=True))
            found = dict(zip(columns[0], zip(stamps, rows, strict=True), strict=True))
            if len(columns) == len(Summary._fields):
                self._rows = found


def cache_folder() -> Path:
    """``IMAGER_CACHE_DIR``, else the system's for root, else the user's."""
    if named := os.environ.get("IMAGER_CACHE_DIR"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/cache/imager")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imager"


def _number(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0
