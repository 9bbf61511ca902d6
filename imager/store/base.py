"""What every store does: read a range, tell sizes and names, create if absent, delete.

Names are relative paths of `a-z 0-9 . - _` with `/` between; they are checked going in and
coming out. Missing raises ObjectMissing, creating what exists raises ObjectExists; other failures
raise ImagerError with the place and the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NoReturn, Protocol

from imager.errors import ImagerError, UsageError

_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]*(?:/[a-z0-9_-][a-z0-9._-]*)*\Z")


def is_name(text: str) -> bool:
    return len(text) <= 250 and _NAME.match(text) is not None


def check_name(text: str) -> str:
    if not is_name(text):
        raise ImagerError(f"not a name of a repository object: {text!r}")
    return text


class ReadStore(Protocol):
    @property
    def url(self) -> str: ...

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes at ``offset``, fewer at the object's end; all of it without length."""

    def size(self, name: str) -> int:
        """Length of an object in bytes."""

    def names(self, folder: str) -> Iterator[str]:
        """Full names of all objects below a folder, in ascending order."""


class ObjectWriter(Protocol):
    """An object that is being written. It appears, whole and durable, at ``commit``."""

    def write(self, content: bytes | bytearray | memoryview) -> None: ...

    def commit(self) -> None:
        """Raises ObjectExists when the name is taken."""

    def discard(self) -> None:
        """Drop what was written; harmless after a commit."""


class WriteStore(ReadStore, Protocol):
    def writer(self, name: str) -> AbstractContextManager[ObjectWriter]:
        """For large objects; leaving the block without a commit discards."""

    def create(self, name: str, content: bytes) -> None:
        """Create a small object if it is absent, durable when this returns."""

    def delete(self, name: str) -> None: ...

    def clear_leftovers(self) -> None:
        """Remove what interrupted writers left beside the objects."""


class ReadOnly:
    """The writing half of a store that can only be read. Every method raises UsageError."""

    url: str

    def writer(self, name: str) -> AbstractContextManager[ObjectWriter]:
        check_name(name)
        self._refuse()

    def create(self, name: str, content: bytes) -> None:
        check_name(name)
        self._refuse()

    def delete(self, name: str) -> None:
        check_name(name)
        self._refuse()

    def clear_leftovers(self) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(
            f"{self.url} can only be read", hint="name a local folder to write to with --repo"
        )
