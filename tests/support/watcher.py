"""A terminal with a person who only watches, and perhaps presses one key."""

from __future__ import annotations

from bootmedia.guest.console import Terminal, TerminalLost


class Watcher(Terminal):
    """Presses a key, or breaks off, when ``cue`` is on the screen; no time passes otherwise."""

    def __init__(
        self, cue: str | None = None, *, is_lost: bool = False, ctrl_c: str | None = None
    ) -> None:
        self.path, self.name = "/dev/watched", "watched"
        self.written = ""
        self._cue, self._is_lost, self._ctrl_c = cue, is_lost, ctrl_c

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, text: str) -> None:
        self.written += text
        if self._is_lost and self._has_cue():
            raise TerminalLost("watched: hung up")

    def wait_for_key(self, seconds: float) -> bool:
        return self._has_cue()

    def check_interrupt(self) -> None:
        if self._ctrl_c is not None and self._ctrl_c in self.written:
            self._ctrl_c = None
            raise KeyboardInterrupt

    def _has_cue(self) -> bool:
        return self._cue is not None and self._cue in self.written
