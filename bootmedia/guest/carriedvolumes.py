"""A carried repository that is spread over several volumes, of which a drive holds one at a time.

A person has to change them, so what is asked for often is learned once: the names of a volume's
objects, and the tables of its packs, which an open repository keeps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from bootmedia.medium import IMAGES_FOLDER, RECORD_PATH, Medium
from imager.errors import FormatError, ObjectMissing
from imager.store.local import LocalStore
from imager.store.union import UnionStore


class Opener(Protocol):
    """The part of a repository that keeps tables of packs: see ``imager.repository``."""

    def pack_ids(self) -> list[bytes]: ...

    def pack(self, pack_id: bytes) -> object: ...


class CarriedVolumes:
    """``store`` reads them as one; ``ask`` has a volume put in and returns where it is mounted."""

    def __init__(self, folder: Path, count: int, ask: Callable[[int], Path]) -> None:
        """``folder``: where the first that is at hand is mounted."""
        self._count, self._ask = count, ask
        self._current = volume_number(folder)
        self._lock = threading.RLock()
        self._stores = {self._current: _Volume(folder / IMAGES_FOLDER, self._lock)}
        self._known: dict[int, frozenset[str]] = {}
        self.store = UnionStore([self._stores[self._current]], self._look_further)

    def survey(self, repository: Opener) -> None:
        """Have each volume put in that was not looked at before; its packs' tables are read."""
        for number in self._in_turn():
            if number not in self._known:
                with self._lock:
                    if not self._is_at_hand(number):
                        self._put_in(number)
                    self._known[number] = frozenset(self._stores[number].names("packs"))
                for pack_id in repository.pack_ids():
                    repository.pack(pack_id)

    def _look_further(self, name: str) -> bool:
        """See ``UnionStore.on_missing``; several workers may miss something at once."""
        with self._lock:
            if self._has(name):
                return True
            if not name.startswith("packs/"):
                return False  # it would be on every volume (imager/carry.py)
            for number in self._holders(name):
                self._put_in(number)
                if self._has(name):
                    return True
            return False

    def _holders(self, name: str) -> Iterator[int]:
        known = [number for number, names in self._known.items() if name in names]
        yield from known or (n for n in self._in_turn() if not self._is_at_hand(n))

    def _in_turn(self) -> list[int]:
        """Beginning with the one that is in, then the next, and round."""
        return [(self._current - 1 + i) % self._count + 1 for i in range(self._count)]

    def _put_in(self, number: int) -> None:
        folder = self._ask(number)
        self._stores[number] = _Volume(folder / IMAGES_FOLDER, self._lock)
        self._current = number
        self.store.stores = list(self._stores.values())

    def _is_at_hand(self, number: int) -> bool:
        store = self._stores.get(number)
        try:
            return store is not None and store.size("repository.json") > 0
        except ObjectMissing:
            return False  # unmounted

    def _has(self, name: str) -> bool:
        for store in self.store.stores:
            try:
                store.size(name)
            except ObjectMissing:
                continue
            return True
        return False


class _Volume(LocalStore):
    """Read by one worker at a time: a drive is no quicker with several, and a disc that another
    worker reads from could not be ejected."""

    def __init__(self, folder: Path, lock: threading.RLock) -> None:
        super().__init__(folder)
        self._lock = lock

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self._lock:
            return super().read(name, offset, length)

    def size(self, name: str) -> int:
        with self._lock:
            return super().size(name)

    def names(self, folder: str) -> Iterator[str]:
        with self._lock:
            return iter(list(super().names(folder)))


def volume_number(folder: Path) -> int:
    """Of the volume that is mounted there; 1 where it does not say."""
    try:
        return Medium.from_bytes((folder / RECORD_PATH).read_bytes(), RECORD_PATH).volume
    except (OSError, FormatError):
        return 1
