"""What is mounted where, from proc(5) mountinfo: read without touching any of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_TABLE = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    point: Path
    kind: str
    """Of the filesystem; of FUSE with its subtype: fuse.imager."""
    source: str
    root: str = "/"
    """Which folder of the filesystem is seen there."""


def mounts() -> list[Mount]:
    """In the order of mounting: of several at one point the last one is seen."""
    found = []
    for line in _TABLE.read_bytes().splitlines():
        place, _, what = line.partition(b" - ")
        kind, source = what.split(b" ")[:2]
        root, point = map(_text, place.split(b" ")[3:5])
        found.append(Mount(Path(point), kind.decode(errors="replace"), _text(source), root))
    return found


def mount_at(folder: Path) -> Mount | None:
    """The one that is seen there. ``folder``: absolute, without symbolic links."""
    return next((mount for mount in reversed(mounts()) if mount.point == folder), None)


def mount_of(path: Path) -> Mount | None:
    """The one that a path lies in. ``path``: absolute, without symbolic links."""
    around = [mount for mount in reversed(mounts()) if path.is_relative_to(mount.point)]
    return max(around, key=lambda mount: len(mount.point.parts), default=None)


def _text(raw: bytes) -> str:
    return _ESCAPED.sub(lambda code: bytes([int(code[1], 8)]), raw).decode(errors="surrogateescape")
