"""Paths: from names to entries, and whole trees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from imager.errors import NotRecognized, ObjectMissing
from imager.files.model import Entry, Reader

_MAX_LINKS = 40  # as many as the kernel follows: path_resolution(7)
_MAX_DEPTH = 4096  # folders within each other


class Found(NamedTuple):
    path: str
    """From the top, with a slash before each name; empty of the top itself."""
    entry: Entry


def look_up(reader: Reader, path: str, *, follow: bool = False) -> Found:
    """The entry at a path. Symbolic links on the way are followed, within the filesystem; the last
    one only with ``follow``. Raises ObjectMissing naming what isn't there."""
    todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    done = [Found("", reader.top())]
    links = 0
    while todo:
        name = todo.pop()
        if name == "..":
            done = done[:-1] or done
            continue
        here = done[-1]
        if not here.entry.is_folder:
            raise ObjectMissing(f"{here.path} is a {here.entry.kind}, not a folder")
        entry = reader.find(here.entry, name)
        if entry is None:
            raise ObjectMissing(f"there is no {here.path}/{name} in this filesystem")
        if entry.is_link and (todo or follow):
            links += 1
            if links > _MAX_LINKS:
                raise ObjectMissing(f"{path} goes through more than {_MAX_LINKS} symbolic links")
            target = reader.target(entry)
            if target.startswith("/"):
                done = done[:1]
            todo += [part for part in reversed(target.split("/")) if part not in ("", ".")]
            continue
        done.append(Found(f"{here.path}/{name}", entry))
    return done[-1]


def walk(reader: Reader, start: Found) -> Iterator[Found]:
    """What is below a folder, each folder before what is in it, by name.

    Raises NotRecognized for a folder that is inside of itself.
    """
    stack: list[tuple[Iterator[Entry], str, tuple[int, int]]] = []
    above = {start.entry.number}
    stack.append((_sorted(reader, start.entry), start.path, start.entry.number))
    while stack:
        entries, path, number = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            above.discard(number)
            continue
        found = Found(f"{path}/{entry.name}", entry)
        yield found
        if entry.is_folder:
            if entry.number in above or len(stack) >= _MAX_DEPTH:
                raise NotRecognized(f"{found.path} is a folder inside of itself")
            above.add(entry.number)
            stack.append((_sorted(reader, entry), found.path, entry.number))


def _sorted(reader: Reader, folder: Entry) -> Iterator[Entry]:
    return iter(sorted(reader.entries(folder), key=lambda entry: entry.name))
