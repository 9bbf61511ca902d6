"""restic (version 0.14 and newer; its JSON output: restic.readthedocs.io, "Scripting")."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imager.data.meter import Meter
from imager.data.model import DataEntry, DataSnapshot, Taken, without_secrets
from imager.errors import ToolError
from imager.process import OnLine, follow
from imager.progress import Progress

_MOST_WARNINGS = 20
_INCOMPLETE = 3
"""Exit code of a snapshot that lacks what could not be read."""


class Restic:
    """See ``model.Engine``. Snapshots of an entry have the tags ``imager`` and its name."""

    def __init__(self, entry: DataEntry) -> None:
        self._entry = entry
        self._place = entry.place("restic")

    def back_up(self, progress: Progress) -> Taken:
        excludes = [f"--exclude={pattern}" for pattern in self._entry.excludes]
        tags = ["--host", self._entry.host, "--tag", self._tags]
        meter = Meter(progress, f"data backup {self._entry.name}")
        found: dict[str, Any] = {}
        warnings: list[str] = []

        def hear(line: str) -> None:
            message = _message(line)
            match message.get("message_type"):
                case "status":
                    meter.show(_count(message, "bytes_done"), _count(message, "total_bytes"))
                case "summary":
                    found.update(message)

        paths = [self._place.path(path) for path in self._entry.paths]
        code = self._run(
            ["backup", "--json", *tags, *excludes, "--", *paths],
            hear,
            lambda line: warnings.extend(_warning(line)),
            accept=(0, _INCOMPLETE),
        )
        if not isinstance(found.get("snapshot_id"), str):
            raise ToolError("restic told no snapshot's id")
        if code == _INCOMPLETE and not warnings:
            warnings.append("restic could not read all of it")
        size = _count(found, "total_bytes_processed")
        return Taken(self._full_id(found["snapshot_id"]), size, tuple(warnings[:_MOST_WARNINGS]))

    def _full_id(self, short: str) -> str:
        """Older versions tell the first eight digits only."""
        ids = [item.id for item in self.snapshots() if item.id.startswith(short)]
        if len(ids) != 1:
            raise ToolError(f"restic made the snapshot {short} and does not list it")
        return ids[0]

    def snapshots(self) -> list[DataSnapshot]:
        lines: list[str] = []
        own = ["--host", self._entry.host, "--tag", self._tags]
        self._run(["snapshots", "--json", *own], lines.append)
        try:
            found = [DataSnapshot(str(item["id"]), _time(item["time"])) for item in _list(lines)]
        except (KeyError, TypeError, ValueError) as error:
            raise ToolError(f"restic's list of snapshots is not understood: {error!r}") from None
        return sorted(found, key=lambda item: item.time)

    def restore(self, snapshot: str, target: Path, progress: Progress) -> None:
        """restic tells nothing meanwhile; the progress is for an interrupt to be seen."""
        progress.start(f"data backup {self._entry.name}", 0)
        words = ["restore", snapshot, "--target", self._place.folder(target)]
        self._run(words, wait=lambda: progress.advance(0))

    def forget(self, snapshots: Sequence[str]) -> None:
        self._run(["forget", "--prune", *snapshots])

    def by_hand(self, snapshot: str, target: Path) -> list[str]:
        where = ["-r", without_secrets(self._entry.repository)]
        file = self._entry.password.file
        password = ["--password-file", file] if file else []
        return ["restic", *where, *password, "restore", snapshot[:8], "--target", str(target)]

    # --- running it ---

    @property
    def _tags(self) -> str:
        return f"imager,{self._entry.name}"

    def _run(
        self,
        words: list[str],
        hear: OnLine | None = None,
        warn: OnLine | None = None,
        wait: Callable[[], object] | None = None,
        accept: tuple[int, ...] = (0,),
    ) -> int:
        # Of a rescue system: a cache would fill its memory, the repository may be read-only.
        apart = [] if self._entry.root == Path("/") else ["--no-cache", "--no-lock"]
        return follow(
            self._place.command(["restic", *apart, *words]),
            on_output=hear,
            on_error=warn,
            on_wait=wait,
            accept=accept,
            environment=dict(self._variables()),
            timeout_seconds=self._entry.timeout,
        )

    def _variables(self) -> Iterator[tuple[str, str]]:
        entry = self._entry
        yield "RESTIC_PROGRESS_FPS", "2"
        repository = entry.repository
        yield (
            "RESTIC_REPOSITORY",
            (self._place.path(repository) if repository.startswith("/") else repository),
        )
        if entry.password.file:
            yield "RESTIC_PASSWORD_FILE", self._place.path(entry.password.file)
        if entry.password.command:
            yield "RESTIC_PASSWORD_COMMAND", shlex.join(entry.password.command)
        password = entry.password.from_environment(entry.name)
        if password is not None:
            yield "RESTIC_PASSWORD", password


def _message(line: str) -> dict[str, Any]:
    """A JSON object; anything else tells nothing."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _warning(line: str) -> Iterator[str]:
    """Newer versions write their errors as JSON, older ones as text."""
    message = _message(line)
    error = message.get("error")
    if isinstance(error, dict):
        yield f"{message.get('item', '')}: {error.get('message', error)}".lstrip(": ")
    elif line.startswith(("error:", "Fatal:")):
        yield line.strip()


def _list(lines: list[str]) -> list[dict[str, Any]]:
    found = json.loads("".join(lines) or "[]")
    return found if isinstance(found, list) else []


def _count(message: dict[str, Any], key: str) -> int:
    value = message.get(key)
    return value if isinstance(value, int) and value >= 0 else 0


def _time(text: str) -> datetime:
    """RFC 3339 with nanoseconds, of which Python takes six digits."""
    whole, _, rest = text.partition(".")
    fraction = rest.lstrip("0123456789")
    zone = fraction if rest else ""
    found = datetime.fromisoformat((whole + zone).replace("Z", "+00:00"))
    return found if found.tzinfo else found.replace(tzinfo=UTC)
