"""Any pair of commands: one backs up, the other brings it back (`docs/data-backup.md`).

They are told by the environment, and may tell by lines of their standard output:
``imager: snapshot ID``, ``imager: size BYTES``, ``imager: progress DONE TOTAL`` (bytes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from imager.data.meter import Meter
from imager.data.model import DataEntry, DataSnapshot, Taken
from imager.errors import ToolError, UsageError
from imager.process import OnLine, follow
from imager.progress import Progress

_TOLD = re.compile(r"imager: (snapshot|size|progress) (\S+)(?: (\d+))?\s*\Z")
_ID_FORMAT = "%Y%m%dt%H%M%Sz"


class Command:
    """See ``model.Engine``. The command ``list`` prints a line for each snapshot, oldest first: its
    id and, if it likes, its time (ISO 8601)."""

    def __init__(self, entry: DataEntry) -> None:
        self._entry = entry

    def back_up(self, progress: Progress) -> Taken:
        meter = Meter(progress, f"data backup {self._entry.name}")
        told: dict[str, str] = {"snapshot": f"{datetime.now(UTC):{_ID_FORMAT}}"}

        def hear(line: str) -> None:
            if found := _TOLD.match(line):
                key, value, total = found.groups()
                if key == "progress" and value.isdecimal():
                    meter.show(int(value), int(total or 0))
                told[key] = value

        self._run("backup", hear, snapshot=told["snapshot"])
        size = told.get("size", "")
        return Taken(told["snapshot"], int(size) if size.isdecimal() else None)

    def snapshots(self) -> list[DataSnapshot]:
        lines: list[str] = []
        self._run("list", lines.append)
        found = [_snapshot(line.split()) for line in lines if line.strip()]
        return sorted(found, key=lambda item: item.time)

    def restore(self, snapshot: str, target: Path, progress: Progress) -> None:
        meter = Meter(progress, f"data backup {self._entry.name}")

        def hear(line: str) -> None:
            if (found := _TOLD.match(line)) and found[1] == "progress" and found[2].isdecimal():
                meter.show(int(found[2]), int(found[3] or 0))

        self._run("restore", hear, snapshot=snapshot, target=target)

    def forget(self, snapshots: Sequence[str]) -> None:
        for snapshot in snapshots:
            self._run("forget", snapshot=snapshot)

    def by_hand(self, snapshot: str, target: Path) -> list[str]:
        words = self._entry.commands.get("restore", ())
        variables = [f"IMAGER_DATA_SNAPSHOT={snapshot}", f"IMAGER_DATA_TARGET={target}"]
        return ["env", *variables, *words]

    def _run(
        self, which: str, hear: OnLine | None = None, snapshot: str = "", target: Path | None = None
    ) -> None:
        words = self._entry.commands.get(which)
        if not words:
            raise UsageError(
                f"data backup {self._entry.name} has no command to {which}",
                hint=f'name one in imager.toml: {which} = ["…"]',
            )
        place = self._entry.place(words[0])
        variables = dict(_variables(self._entry, snapshot))
        if target is not None:
            variables["IMAGER_DATA_TARGET"] = place.folder(target)
        follow(
            place.command(words),
            on_output=hear,
            environment=variables,
            timeout_seconds=self._entry.timeout,
        )


def _variables(entry: DataEntry, snapshot: str) -> Iterator[tuple[str, str]]:
    yield "IMAGER_DATA_NAME", entry.name
    yield "IMAGER_DATA_HOST", entry.host
    yield "IMAGER_DATA_REPOSITORY", entry.repository
    yield "IMAGER_DATA_PATHS", "\n".join(entry.paths)
    yield "IMAGER_DATA_EXCLUDES", "\n".join(entry.excludes)
    yield "IMAGER_DATA_SNAPSHOT", snapshot
    if entry.password.file:
        yield "IMAGER_DATA_PASSWORD_FILE", entry.password.file
    password = entry.password.from_environment(entry.name)
    if password is not None:
        yield "IMAGER_DATA_PASSWORD", password


def _snapshot(words: list[str]) -> DataSnapshot:
    """Of a line; an id of ours is its time."""
    try:
        if len(words) > 1:
            time = datetime.fromisoformat(words[1].replace("Z", "+00:00"))
        else:
            time = datetime.strptime(words[0], _ID_FORMAT)
    except ValueError:
        raise ToolError(f"a snapshot without a time: {' '.join(words)}") from None
    return DataSnapshot(words[0], time if time.tzinfo else time.replace(tzinfo=UTC))
