"""``imager files diff``: what differs between two trees, of two images or of one."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal, NamedTuple

from imager.files.model import Entry, Piece, Reader
from imager.files.tree import Found

Change = Literal["added", "removed", "changed"]


class Difference(NamedTuple):
    path: str
    change: Change
    what: tuple[str, ...]
    """Of what changed: kind, content, target, mode, owner, attributes, device."""

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "change": self.change, "what": list(self.what)}


class Side(NamedTuple):
    reader: Reader
    start: Found


def compare(one: Side, other: Side, *, quick: bool = False) -> Iterator[Difference]:
    """By path below the starts, each folder before what is in it.

    ``quick``: a file with the same inode, size, mtime and ctime has the same content.
    """
    todo = [(one.start, other.start)]
    while todo:
        a, b = todo.pop()
        what = tuple(_differences(one.reader, other.reader, a.entry, b.entry, quick))
        if what:
            yield Difference(b.path or "/", "changed", what)
        if a.entry.is_folder and b.entry.is_folder:
            both = []
            for name, before, after in _matched(one.reader, other.reader, a.entry, b.entry):
                if before is None:
                    yield Difference(f"{b.path}/{name}", "added", ())
                elif after is None:
                    yield Difference(f"{a.path}/{name}", "removed", ())
                else:
                    both.append(
                        (Found(f"{a.path}/{name}", before), Found(f"{b.path}/{name}", after))
                    )
            todo += reversed(both)


def _matched(
    one: Reader, other: Reader, a: Entry, b: Entry
) -> Iterator[tuple[str, Entry | None, Entry | None]]:
    before = {entry.name: entry for entry in one.entries(a)}
    after = {entry.name: entry for entry in other.entries(b)}
    for name in sorted(before.keys() | after.keys()):
        yield name, before.get(name), after.get(name)


def _differences(one: Reader, other: Reader, a: Entry, b: Entry, quick: bool) -> Iterator[str]:
    if stat.S_IFMT(a.mode) != stat.S_IFMT(b.mode):
        yield "kind"
        return
    if a.is_file and not (quick and _looks_untouched(a, b)) and not _same_content(one, other, a, b):
        yield "content"
    if a.is_link and one.target(a) != other.target(b):
        yield "target"
    if a.rdev != b.rdev:
        yield "device"
    if a.mode != b.mode:
        yield "mode"
    if (a.uid, a.gid) != (b.uid, b.gid):
        yield "owner"
    if dict(one.attributes(a)) != dict(other.attributes(b)):
        yield "attributes"


def _looks_untouched(a: Entry, b: Entry) -> bool:
    return (a.number, a.size, a.mtime_ns, a.ctime_ns) == (b.number, b.size, b.mtime_ns, b.ctime_ns)


def _same_content(one: Reader, other: Reader, a: Entry, b: Entry) -> bool:
    return a.size == b.size and digest(one, a) == digest(other, b)


def digest(reader: Reader, file: Entry) -> bytes:
    """Of the content, holes as zeros: the same however it is stored."""
    state = hashlib.blake2b(digest_size=32)
    zeros = bytes(1 << 16)
    at = 0
    for offset, content in chain(reader.pieces(file), [Piece(file.size, b"")]):
        while at < offset:
            length = min(offset - at, len(zeros))
            state.update(zeros[:length])
            at += length
        state.update(content)
        at += len(content)
    return state.digest()
