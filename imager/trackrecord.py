"""What the tracking service knows of a disk, and how it is asked: JSON lines over a socket.

The record names the image that it is relative to, and the allocation map of that image, which a
later capture compares with its own. It lies below /run: a reboot, in which anything may be written,
takes it away.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from imager.blocktrace import disk_of
from imager.errors import FormatError, ImagerError
from imager.extents import Extents
from imager.jsonrecord import JsonRecord
from imager.tracking import Written

_FOLDER = Path("/run/imager/track")
_SECONDS = 60.0


@dataclass(frozen=True)
class BaseRecord(JsonRecord):
    """The image that a record begins with."""

    repository: str
    """Its id."""
    image: str
    disk: str
    """Its name in the image."""
    used: Extents
    """What the image has of it, in bytes."""


@dataclass(frozen=True)
class TrackRecord(JsonRecord):
    """What one service leaves for the next, while the kernel goes on gathering."""

    boot: str
    device: str
    size: int
    overruns: int
    base: BaseRecord | None
    written: Extents
    """Since the base."""


def track_folder() -> Path:
    """``IMAGER_TRACK_DIR``, else below /run."""
    return Path(os.environ.get("IMAGER_TRACK_DIR", _FOLDER))


def track_key(path: str) -> str:
    """Of a disk or partition: its number and, since numbers are used again, the count of disks
    that the kernel has seen (sysfs-block, diskseq). Raises ImagerError as ``disk_of``."""
    number, start = disk_of(path)
    count = Path("/sys/dev/block", number, "diskseq")
    seen = count.read_text().strip() if count.exists() else "0"
    return f"{number.replace(':', '-')}-{start // 512}-{seen}"


def socket_path(key: str) -> Path:
    return track_folder() / f"{key}.socket"


def record_path(key: str) -> Path:
    return track_folder() / f"{key}.json"


class TrackClient:
    """A talk with the service of a disk; what was taken and not committed is not lost by its end.

    A context manager.
    """

    def __init__(self, path: str) -> None:
        """Raises ImagerError when no service tracks this disk."""
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_SECONDS)
        try:
            self._socket.connect(str(socket_path(track_key(path))))
            self._lines = self._socket.makefile("rb")
        except OSError:
            self._socket.close()
            raise ImagerError(
                f"{path} is not tracked", hint=f"start it with: imager track start {path}"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def begin(self) -> tuple[BaseRecord | None, Written, str]:
        """The image that the record begins with, what was written since, and in words why there is
        none."""
        answer = self.ask("begin")
        base = None if answer.get("base") is None else BaseRecord.from_json(answer["base"])
        return base, _written(answer), str(answer.get("reason", ""))

    def take(self) -> Written:
        """As of ``WriteTracker``."""
        return _written(self.ask("take"))

    def commit(self, base: BaseRecord) -> None:
        """From the last take on the record is relative to this image."""
        self.ask("commit", base=base.to_json())

    def wait(self) -> None:
        """Until the service has closed the talk."""
        self._lines.read()

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """Raises ImagerError when the service does not answer or says no."""
        try:
            self._socket.sendall(json.dumps({"ask": what, **values}).encode() + b"\n")
            line = self._lines.readline()
            answer = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            answer = None
        if not isinstance(answer, dict):
            raise ImagerError(f"the tracking service of {self.path} has ended")
        if "error" in answer:
            raise ImagerError(f"the tracking service of {self.path}: {answer['error']}")
        return answer


def written_to_json(written: Written) -> dict[str, Any]:
    return {
        "extents": [list(extent) for extent in written.extents],
        "lost": written.lost,
        "commands": written.commands,
    }


def _written(answer: dict[str, Any]) -> Written:
    try:
        extents = Extents((int(offset), int(length)) for offset, length in answer["extents"])
        return Written(extents, bool(answer["lost"]), int(answer["commands"]))
    except (KeyError, TypeError, ValueError):
        raise FormatError("an answer of the tracking service makes no sense") from None
