"""Hooks: the administrator's commands around an image (`docs/hooks.md`).

They come from the tables ``[hooks.NAME]`` of imager.toml and the programs in ``hooks.d/`` beside
it, all ordered by name: what goes down comes up in the opposite order.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal, get_args

from imager.config import CONFIG_FILE, table
from imager.errors import ImagerError, UsageError
from imager.jsonrecord import JsonRecord
from imager.process import follow
from imager.progress import Progress

Point = Literal["before", "quiesce", "thaw", "after", "failed"]
POINTS: tuple[Point, ...] = get_args(Point)

# What these undo was done in the order of the names.
_BACKWARDS: tuple[Point, ...] = ("thaw", "after", "failed")

# Whether an image is taken hangs on these.
_DECISIVE: tuple[Point, ...] = ("before", "quiesce")

_TIMEOUT_SECONDS = 60.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


class HookFailed(ImagerError):
    """A hook failed, and no image is taken without it."""


@dataclass(frozen=True)
class Hook:
    """``commands`` by point; ``timeout`` in seconds; with ``required`` no image is taken when a
    ``before`` or ``quiesce`` of it fails."""

    name: str
    commands: Mapping[Point, tuple[str, ...]]
    timeout: float = _TIMEOUT_SECONDS
    required: bool = True


@dataclass(frozen=True)
class HookResult(JsonRecord):
    """What the manifest keeps of a hook that ran; ``error`` is None when it succeeded."""

    name: str
    point: str
    milliseconds: int = 0
    error: str | None = None


def load_hooks() -> list[Hook]:
    """Of imager.toml and of hooks.d, by name. Raises UsageError for what is not understood, and
    for what others than root (or this user) could change: it runs with this user's rights."""
    hooks = {hook.name: hook for hook in (*_from_table(table("hooks")), *_from_folder())}
    return [hooks[name] for name in sorted(hooks)]


def _config_file() -> Path:
    return Path(os.environ.get("IMAGER_CONFIG", CONFIG_FILE))


def _from_table(values: Mapping[str, Any]) -> Iterator[Hook]:
    if values:
        check_owner(_config_file())
    for name, item in values.items():
        where = f"{_config_file()}: [hooks.{name}]"
        if not isinstance(item, dict) or not _NAME.match(name):
            raise UsageError(f"{where} must be a table, of a name of letters, digits, dots, dashes")
        if unknown := sorted(item.keys() - {*POINTS, "timeout", "on-failure"}):
            raise UsageError(f"{where}: unknown: {', '.join(unknown)}")
        commands = {point: _words(item[point], where, point) for point in POINTS if point in item}
        timeout = item.get("timeout", _TIMEOUT_SECONDS)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
            raise UsageError(f"{where}: timeout must be a number of seconds")
        on_failure = item.get("on-failure", "stop")
        if on_failure not in ("stop", "continue"):
            raise UsageError(f'{where}: on-failure can be "stop" or "continue"')
        yield Hook(name, commands, float(timeout), on_failure == "stop")


def _words(value: object, where: str, point: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(w, str) for w in value):
        raise UsageError(
            f"{where}: {point} must be a list of words, a program and its arguments",
            hint='for example ["systemctl", "stop", "postfix"]; no shell reads it',
        )
    return tuple(value)


def _from_folder() -> Iterator[Hook]:
    """A program is called with the point as its only argument, at every point."""
    folder = _config_file().with_name("hooks.d")
    try:
        files = [file for file in folder.iterdir() if _NAME.match(file.name)]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from None
    if files:
        check_owner(folder)
    for file in files:
        if file.is_file() and os.access(file, os.X_OK):
            check_owner(file)
            yield Hook(file.name, {point: (str(file), point) for point in POINTS})


def check_owner(path: Path) -> None:
    """Raises UsageError when somebody else could change a file that names commands."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(
            f"{path}: others could change it, and its commands run as this user",
            hint=f"chown root: {path}; chmod go-w {path}",
        )


@dataclass
class HookRun:
    """The hooks of one run. ``about``: the documented environment, without ``IMAGER_``."""

    hooks: Sequence[Hook]
    progress: Progress
    about: dict[str, str] = field(default_factory=dict)
    results: list[HookResult] = field(default_factory=list)

    @contextmanager
    def around(self) -> Iterator[None]:
        """``before``, the run, then ``after``, or ``failed`` when the run raises.

        Raises HookFailed before anything is done; hooks that fail afterwards are noted.
        """
        try:
            self.call("before")
            yield
        except BaseException as error:
            words = error.message if isinstance(error, ImagerError) else repr(error)
            with _undisturbed():
                self.call("failed", error=words)
            raise
        with _undisturbed():
            self.call("after")

    @contextmanager
    def quiesced(self) -> Iterator[None]:
        """``quiesce``, the block, then ``thaw``, whatever happens in between and to whomever was
        quiesced. Raises HookFailed when one that is required can't be quiesced."""
        begun: list[Hook] = []
        try:
            self._each("quiesce", self.hooks, begun)
            yield
        finally:
            with _undisturbed():
                self._each("thaw", begun, [])

    def call(self, point: Point, **about: str) -> None:
        """Run all hooks of a point. Raises HookFailed as the class says."""
        self._each(point, self.hooks, [], **about)

    @property
    def whole(self) -> bool:
        """Whether every hook succeeded."""
        return all(result.error is None for result in self.results)

    def _each(self, point: Point, hooks: Sequence[Hook], begun: list[Hook], **about: str) -> None:
        for hook in reversed(hooks) if point in _BACKWARDS else hooks:
            begun.append(hook)
            if command := hook.commands.get(point):
                result = self._run(hook, point, command, about)
                self.results.append(result)
                if result.error is not None:
                    self._fail(hook, point, result.error)

    def _run(
        self, hook: Hook, point: Point, command: tuple[str, ...], about: Mapping[str, str]
    ) -> HookResult:
        variables = {f"IMAGER_{key.upper()}": text for key, text in {**self.about, **about}.items()}
        begun, error = monotonic(), None
        try:
            follow(
                list(command),
                environment={"IMAGER_HOOK": point, **variables},
                timeout_seconds=hook.timeout,
            )
        except ImagerError as failure:
            error = failure.message
        return HookResult(hook.name, point, int((monotonic() - begun) * 1000), error)

    def _fail(self, hook: Hook, point: Point, error: str) -> None:
        text = f"hook {hook.name}, {point}: {error}"
        if hook.required and point in _DECISIVE:
            raise HookFailed(
                f"no image was taken: {text}",
                hint=f'to go on without it: on-failure = "continue" in [hooks.{hook.name}]',
            )
        self.progress.note(f"warning: {text}")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Interrupts wait: what was stopped has to be started again. Each hook has a time limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt
