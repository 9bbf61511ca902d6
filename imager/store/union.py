"""Several stores as one, to read from: a repository whose packs are spread over volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import merge
from itertools import groupby
from typing import TypeVar

from imager.errors import ObjectMissing
from imager.store.base import ReadOnly, ReadStore, check_name

_T = TypeVar("_T")

OnMissing = Callable[[str], bool]
"""Told an object's name when no volume has it; True: it may be there now, look again."""


class VolumeMissing(ObjectMissing):
    """An object is on none of the volumes that are at hand. ``name``: which one."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(
            f"{name} is on none of the volumes at hand ({url})",
            hint="insert the medium's next volume, then try again",
        )
        self.name = name


class UnionStore(ReadOnly):
    """The first store that has an object counts.

    ``stores`` may be changed by ``on_missing``: a folder is found again when another medium is
    mounted there.
    """

    def __init__(self, stores: Sequence[ReadStore], on_missing: OnMissing | None = None) -> None:
        self.stores = list(stores)
        self.url = " + ".join(store.url for store in self.stores)
        self._on_missing = on_missing

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._first(name, lambda store: store.read(name, offset, length))

    def size(self, name: str) -> int:
        return self._first(name, lambda store: store.size(name))

    def names(self, folder: str) -> Iterator[str]:
        """Of the volumes at hand only."""
        check_name(folder)
        merged = merge(*(store.names(folder) for store in self.stores))
        return (name for name, _ in groupby(merged))

    def _first(self, name: str, read: Callable[[ReadStore], _T]) -> _T:
        check_name(name)
        while True:
            for store in self.stores:
                try:
                    return read(store)
                except ObjectMissing:
                    continue
            if self._on_missing is None or not self._on_missing(name):
                raise VolumeMissing(self.url, name)
