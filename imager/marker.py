"""The marker of an unfinished restore, on the target itself.

While a restore runs, the start of its target holds this marker instead of the boot sector. An
interrupted restore therefore never looks like a bootable disk, and any later run, from any
machine, knows that it goes on with the same image and what it may compare instead of write. The
true start of the disk is written last.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

MARKER_SIZE = 4096
_MAGIC = b"imager: unfinished restore\n"


@dataclass(frozen=True)
class Marker:
    image: str
    disk: str
    root: str
    offset: int
    """Where in the disk the restored range begins, in bytes."""

    def encode(self) -> bytes:
        """``MARKER_SIZE`` bytes: a magic line, JSON, zeros."""
        return (_MAGIC + json.dumps(asdict(self)).encode()).ljust(MARKER_SIZE, b"\0")

    @classmethod
    def decode(cls, content: bytes) -> Marker | None:
        if not content.startswith(_MAGIC):
            return None
        try:
            # Power may fail when only the first sector of it is written: that one is enough.
            values = json.loads(content[len(_MAGIC) : MARKER_SIZE].partition(b"\0")[0])
            image, disk, root = (str(values[key]) for key in ("image", "disk", "root"))
            return cls(image, disk, root, int(values["offset"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
