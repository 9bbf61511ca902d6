"""What happened in the rescue system, on whichever terminal: kept in memory for the logs."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from time import gmtime, strftime

# Some hours of work; the rescue system has no disk to keep more on.
_KEPT_LINES = 2000


class Log:
    """The last lines. ``sink`` is given each of them too, for instance the kernel's log."""

    def __init__(self, sink: Callable[[str], None] | None = None) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._sink = sink
        self._lock = threading.Lock()

    def add(self, text: str) -> None:
        """One entry, of one line or more; UTC goes before it."""
        stamp = strftime("%H:%M:%S", gmtime())
        with self._lock:
            for line in text.splitlines():
                self._lines.append(f"{stamp} {line}")
                if self._sink is not None:
                    self._sink(line)

    def add_error(self, error: BaseException) -> None:
        """An error with its traceback, which the screen does not show."""
        self.add("".join(traceback.format_exception(error)))

    def lines(self) -> list[str]:
        with self._lock:
            return list(self._lines)
