"""What a data backup is told, what an engine does, and what the image keeps of it.

``DataEntry`` is one ``[[data]]`` of imager.toml, ``DataBackup`` its part of a manifest
(`docs/format.md`, key ``data``). Passwords are in neither.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from imager.errors import FormatError, UsageError
from imager.jsonrecord import JsonRecord
from imager.manifest import Manifest
from imager.process import find_tool
from imager.progress import Progress
from imager.units import show_bytes

if TYPE_CHECKING:
    from imager.retention import Rules  # which looks at the data backups of images

_PROGRAM_FOLDERS = ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin")
_SECRET_IN_URL = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]*@")


@dataclass(frozen=True)
class Password:
    """Where an engine gets its password: from one of these, or it needs none."""

    file: str | None = None
    command: tuple[str, ...] = ()
    variable: str | None = None
    """Name of an environment variable."""

    def __bool__(self) -> bool:
        return bool(self.file or self.command or self.variable)

    def from_environment(self, entry: str) -> str | None:
        """The password itself, if a variable has it. Raises UsageError when that is not set."""
        if self.variable is None:
            return None
        if self.variable not in os.environ:
            raise UsageError(
                f"data backup {entry}: the environment has no {self.variable}",
                hint="it is named by password-environment in imager.toml",
            )
        return os.environ[self.variable]


@dataclass(frozen=True)
class DataEntry:
    """One data backup. ``timeout`` in seconds, for each program that is run.

    ``root`` is where the system is mounted that the paths, the password file and the programs
    belong to; it is another one than ``/`` in the rescue system. ``host`` is the one whose data it
    is: several may share a repository.
    """

    name: str
    engine: str
    repository: str = ""
    paths: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    password: Password = Password()
    retention: Rules | None = None
    when: str = "before"
    timeout: float | None = None
    required: bool = False
    exclude_partitions: tuple[str, ...] = ()
    commands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keys, for plug-ins."""
    root: Path = Path("/")
    host: str = field(default_factory=socket.gethostname)

    def place(self, program: str) -> Place:
        """Where a program is to run: the system's own, if it has it."""
        return Place(self.root, has_program(self.root, program))


@dataclass(frozen=True)
class Place:
    """``inside``: the program runs with the system's root as its own."""

    root: Path
    inside: bool

    @property
    def changes_root(self) -> bool:
        return self.inside and self.root != Path("/")

    def command(self, words: Sequence[str]) -> list[str]:
        return ["chroot", str(self.root), *words] if self.changes_root else list(words)

    def path(self, text: str) -> str:
        """A path of the system, as the program has to be told it."""
        if self.inside or self.root == Path("/"):
            return text
        return str(self.root / text.lstrip("/"))

    def folder(self, path: Path) -> str:
        """A path of this system (below the root, if the root is changed), as the program sees it.

        Raises UsageError when the program could not see it.
        """
        if not self.changes_root:
            return str(path)
        if not path.is_relative_to(self.root):
            raise UsageError(f"{path} is not below {self.root}, where the program runs")
        return str(Path("/") / path.relative_to(self.root))


def has_program(root: Path, name: str) -> bool:
    """Whether the system below ``root`` has a program, by its name or path."""
    if root == Path("/"):
        return find_tool(name) is not None
    names = [name.lstrip("/")] if "/" in name else [f"{at}/{name}" for at in _PROGRAM_FOLDERS]
    return any((root / each).is_file() or (root / each).is_symlink() for each in names)


class Taken(NamedTuple):
    """``size`` in bytes of what was backed up, None if the engine doesn't tell."""

    snapshot: str
    size: int | None = None
    warnings: tuple[str, ...] = ()


class DataSnapshot(NamedTuple):
    """``time`` is aware of its zone."""

    id: str
    time: datetime


class Engine(Protocol):
    """A tool that backs data up. All methods raise ImagerError.

    A plug-in is a callable that takes a ``DataEntry`` and returns one; it is found by the
    entry-point group ``imager.data``, under the name that imager.toml gives as ``engine``.
    """

    def back_up(self, progress: Progress) -> Taken: ...

    def snapshots(self) -> list[DataSnapshot]:
        """Those of this entry, oldest first."""

    def restore(self, snapshot: str, target: Path, progress: Progress) -> None:
        """Write the paths below ``target``, the folder that takes the place of ``/``."""

    def forget(self, snapshots: Sequence[str]) -> None: ...

    def by_hand(self, snapshot: str, target: Path) -> list[str]:
        """The command that a person would type to bring a snapshot back."""


@dataclass(frozen=True)
class DataBackup(JsonRecord):
    """What a manifest says of one. Times in UTC; ``size`` in bytes; ``error`` why there is no
    snapshot; ``restore``: the command that brings it back by hand."""

    name: str
    engine: str
    repository: str = ""
    paths: tuple[str, ...] = ()
    when: str = "before"
    snapshot: str | None = None
    started: str = ""
    finished: str = ""
    size: int | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None
    restore: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return self.snapshot is not None and not self.warnings

    def words(self) -> str:
        """A line for people."""
        if self.snapshot is None:
            return f"{self.name} ({self.engine}) FAILED: {self.error}"
        size = "" if self.size is None else f", {show_bytes(self.size)}"
        state = f", NOT WHOLE: {'; '.join(self.warnings)}" if self.warnings else ""
        return f"{self.name}: {self.engine} {self.shown_snapshot}{size}, {self.finished}{state}"

    @property
    def shown_snapshot(self) -> str:
        return shown_snapshot(self.engine, self.snapshot)


def backups_of(manifest: Manifest) -> list[DataBackup]:
    """The data backups that were taken with an image. Raises FormatError."""
    items = manifest.document.get("data", [])
    if not isinstance(items, list):
        raise FormatError(f"image {manifest.id}: its data backups are not a list")
    return [DataBackup.from_json(item) for item in items]


def shown_snapshot(engine: str, snapshot: str | None) -> str:
    """As its tool shows it: restic the first eight digits."""
    return "-" if snapshot is None else snapshot[:8] if engine == "restic" else snapshot


def data_is_whole(manifest: Manifest) -> bool:
    """Whether nothing failed of the data backups that were taken with an image; one without any is
    whole."""
    try:
        return all(backup.whole for backup in backups_of(manifest))
    except FormatError:
        return False


def without_secrets(repository: str) -> str:
    """``rest:https://user:***@host/``: what is shown and stored of a repository's address."""
    return _SECRET_IN_URL.sub(r"\1:***@", repository)
