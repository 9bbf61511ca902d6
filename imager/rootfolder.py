"""A foreign system's root below a folder: its paths, with its own symbolic links, never ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MAX_LINKS = 40  # as many as the kernel follows: path_resolution(7)
_MAX_TEXT = 4 << 20


class RootFolder:
    """``folder`` is what that system calls ``/``; nothing above it is ever opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path | None:
        """Where a path of that system lies here, or None when it doesn't exist."""
        todo = [part for part in reversed(name.split("/")) if part]
        done: list[str] = []
        links = 0
        while todo:
            part = todo.pop()
            if part in (".", ".."):
                done = done[:-1] if part == ".." else done
                continue
            here = self.folder.joinpath(*done, part)
            try:
                target = str(here.readlink()) if here.is_symlink() else None
            except (OSError, ValueError):
                return None
            if target is None:
                done.append(part)
                continue
            links += 1
            if links > _MAX_LINKS:
                return None
            if target.startswith("/"):
                done = []
            todo += [piece for piece in reversed(target.split("/")) if piece]
        found = self.folder.joinpath(*done)
        try:
            return found if found.exists() else None
        except (OSError, ValueError):
            return None

    def names(self, folder: str) -> list[str]:
        """What is in a folder, sorted; nothing when there is no such folder."""
        path = self.path(folder)
        try:
            return sorted(e.name for e in path.iterdir()) if path is not None else []
        except OSError:
            return []

    def text(self, name: str) -> str | None:
        """A file's text, at most its first 4 MiB; None when it can't be read."""
        path = self.path(name)
        try:
            if path is None or not path.is_file():
                return None
            with path.open("rb") as file:
                return file.read(_MAX_TEXT).decode(errors="replace")
        except OSError:
            return None

    def files(self, folder: str, ending: str) -> Iterator[tuple[str, str]]:
        """(path, text) of the folder's files whose name ends so."""
        for name in self.names(folder):
            if name.endswith(ending) and (text := self.text(f"{folder}/{name}")) is not None:
                yield f"{folder}/{name}", text
