"""Progress of an engine, which tells how much is done by now and not how much more."""

from __future__ import annotations

from imager.progress import Progress


class Meter:
    """Begins to show when the total stays the same (a tool that still counts lets it grow), or at
    once when there is none."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label
        self._total: int | None = None
        self._done = 0
        self._shown = False

    def show(self, done: int, total: int = 0) -> None:
        """Bytes; ``total`` 0 is unknown."""
        if not self._shown:
            if total and total != self._total:
                self._total = total
                return
            self._progress.start(self._label, total)
            self._shown = True
        self._progress.advance(max(done - self._done, 0))
        self._done = max(done, self._done)
