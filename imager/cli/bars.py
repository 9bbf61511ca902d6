"""Progress for people (tqdm bars) and for programs (JSON lines), both on standard error."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any, Self

from imager.errors import UsageError
from imager.progress import NullProgress, Progress

_LINE_INTERVAL_SECONDS = 0.5


def open_progress(mode: str) -> AbstractContextManager[Progress]:
    """``auto``: bars on a terminal, nothing elsewhere; ``json``; ``none``. Notes always show."""
    if mode == "json":
        return JsonProgress()
    if mode == "auto":
        return BarProgress() if sys.stderr.isatty() else NoteProgress()
    if mode == "none":
        return NoteProgress()
    raise UsageError(f"--progress {mode}: it can be auto, json or none")


class NoteProgress(NullProgress):
    """Only what must be read."""

    def note(self, message: str) -> None:
        print(f"imager: {message}", file=sys.stderr)


class BarProgress:
    """One bar at a time, with rate and time left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def start(self, label: str, total: int) -> None:
        from tqdm import tqdm

        self._close()
        self._bar = tqdm(
            desc=label,
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.2,
        )

    def advance(self, amount: int) -> None:
        self._bar.update(amount)

    def note(self, message: str) -> None:
        from tqdm import tqdm

        tqdm.write(f"imager: {message}", file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class JsonProgress:
    """A JSON object a line: ``label``, ``done``, ``total`` (bytes), ``seconds``; or ``note``."""

    def __init__(self) -> None:
        self._label, self._done, self._total = "", 0, 0
        self._started = self._shown = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._label:
            self._show()

    def start(self, label: str, total: int) -> None:
        if self._label:
            self._show()
        self._label, self._done, self._total = label, 0, total
        self._started = monotonic()
        self._show()

    def advance(self, amount: int) -> None:
        self._done += amount
        if monotonic() - self._shown >= _LINE_INTERVAL_SECONDS:
            self._show()

    def note(self, message: str) -> None:
        _print_line({"note": message})

    def _show(self) -> None:
        self._shown = monotonic()
        _print_line(
            {
                "label": self._label,
                "done": self._done,
                "total": self._total,
                "seconds": round(self._shown - self._started, 1),
            }
        )


def _print_line(document: dict[str, Any]) -> None:
    print(json.dumps(document, ensure_ascii=False), file=sys.stderr, flush=True)
