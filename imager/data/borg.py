"""Borg (1.2 and newer 1.x; its JSON: borgbackup.readthedocs.io, "All about JSON")."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imager.data.meter import Meter
from imager.data.model import DataEntry, DataSnapshot, Taken, without_secrets
from imager.errors import ToolError, UsageError
from imager.process import OnLine, follow
from imager.progress import Progress

_MOST_WARNINGS = 20
_WARNING = 1
"""Exit code of a run that was finished with warnings."""


class Borg:
    """See ``model.Engine``. A snapshot is an archive, by its name ``imager+HOST+NAME+TIME``."""

    def __init__(self, entry: DataEntry) -> None:
        self._entry = entry
        self._place = entry.place("borg")

    def back_up(self, progress: Progress) -> Taken:
        meter = Meter(progress, f"data backup {self._entry.name}")
        lines: list[str] = []
        warnings: list[str] = []

        def hear(line: str) -> None:
            message = _message(line)
            match message.get("type"):
                case "archive_progress" if isinstance(message.get("original_size"), int):
                    meter.show(message["original_size"])
                case "log_message" if message.get("levelname") in ("WARNING", "ERROR"):
                    warnings.append(str(message.get("message", "")))

        excludes = [f"--exclude={pattern}" for pattern in self._entry.excludes]
        name = f"{self._prefix}{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}"
        paths = [self._place.path(path) for path in self._entry.paths]
        code = self._run(
            ["create", "--json", "--log-json", "--progress", *excludes, f"::{name}", *paths],
            hear=lines.append,
            warn=hear,
            accept=(0, _WARNING),
        )
        if code == _WARNING and not warnings:
            warnings.append("borg ended with a warning")
        told = _message("".join(lines)).get("archive", {})
        size = told.get("stats", {}).get("original_size") if isinstance(told, dict) else None
        if code != _WARNING:
            warnings = []
        return Taken(
            name, size if isinstance(size, int) else None, tuple(warnings[:_MOST_WARNINGS])
        )

    def snapshots(self) -> list[DataSnapshot]:
        lines: list[str] = []
        # --glob-archives is the older name of --match-archives; 1.x knows it.
        self._run(["list", "--json", "--glob-archives", f"{self._prefix}*"], hear=lines.append)
        try:
            items = json.loads("".join(lines))["archives"]
            found = [DataSnapshot(str(item["name"]), _time(item["start"])) for item in items]
        except (KeyError, TypeError, ValueError) as error:
            raise ToolError(f"borg's list of archives is not understood: {error!r}") from None
        return sorted(found, key=lambda item: item.time)

    def restore(self, snapshot: str, target: Path, progress: Progress) -> None:
        meter = Meter(progress, f"data backup {self._entry.name}")

        def hear(line: str) -> None:
            message = _message(line)
            if message.get("type") == "progress_percent" and isinstance(message.get("total"), int):
                meter.show(int(message.get("current") or 0), message["total"])

        words = ["extract", "--log-json", "--progress", "--numeric-ids", f"::{snapshot}"]
        if self._place.changes_root:  # extract writes to its working folder, which is "/" then
            if target != self._entry.root:
                raise UsageError(f"borg of the restored system restores to {self._entry.root} only")
            self._run(words, warn=hear)
        else:
            self._run(words, warn=hear, folder=target)

    def forget(self, snapshots: Sequence[str]) -> None:
        for name in snapshots:
            self._run(["delete", f"::{name}"])
        self._run(["compact"])

    def by_hand(self, snapshot: str, target: Path) -> list[str]:
        archive = f"{without_secrets(self._entry.repository)}::{snapshot}"
        return ["sh", "-c", f"cd {shlex.quote(str(target))} && borg extract {shlex.quote(archive)}"]

    # --- running it ---

    @property
    def _prefix(self) -> str:
        return f"imager+{self._entry.host}+{self._entry.name}+"

    def _run(
        self,
        words: list[str],
        hear: OnLine | None = None,
        warn: OnLine | None = None,
        accept: tuple[int, ...] = (0,),
        folder: Path | None = None,
    ) -> int:
        # The repository of a rescue system may be read-only.
        apart = [] if self._entry.root == Path("/") else ["--bypass-lock"]
        return follow(
            self._place.command(["borg", words[0], *apart, *words[1:]]),
            on_output=hear,
            on_error=warn,
            accept=accept,
            environment=dict(self._variables()),
            folder=folder,
            timeout_seconds=self._entry.timeout,
        )

    def _variables(self) -> Iterator[tuple[str, str]]:
        entry = self._entry
        repository = entry.repository
        yield (
            "BORG_REPO",
            self._place.path(repository) if repository.startswith("/") else repository,
        )
        if entry.root != Path("/"):  # where the repository was seen is not known there
            yield "BORG_RELOCATED_REPO_ACCESS_IS_OK", "yes"
        if not entry.password:  # said by imager.toml: it is not encrypted
            yield "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes"
        if entry.password.file:
            file = self._place.path(entry.password.file)
            yield "BORG_PASSCOMMAND", shlex.join(["cat", file])
        if entry.password.command:
            yield "BORG_PASSCOMMAND", shlex.join(entry.password.command)
        password = entry.password.from_environment(entry.name)
        if password is not None:
            yield "BORG_PASSPHRASE", password


def _message(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _time(text: str) -> datetime:
    """Local time without a zone."""
    return datetime.fromisoformat(text).astimezone(UTC)
