"""All terminals as one, for work that no person began: it may be watched on any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from time import monotonic, sleep
from typing import Self

from bootmedia.guest.choosing import show
from bootmedia.guest.console import Terminal, TerminalLost, TerminalProgress


class AllTerminals:
    """A terminal that breaks off is left out from then on."""

    def __init__(self, terminals: Sequence[Terminal]) -> None:
        self._terminals = list(terminals)

    def show(self, texts: Iterable[str]) -> None:
        """Each text as a paragraph."""
        texts = list(texts)
        self._each(lambda terminal: show(terminal, texts))

    def write(self, text: str) -> None:
        self._each(lambda terminal: terminal.write(text))

    def key_pressed(self, seconds: float) -> bool:
        """Whether a key was pressed anywhere in that time; not all of it is waited for then."""
        deadline = monotonic() + seconds
        while True:
            left = max(deadline - monotonic(), 0)
            if not self._terminals:
                sleep(left)
                return False
            if any(self._one_pressed(min(left, 0.1))):
                return True
            if not left:
                return False

    def progress(self) -> AllProgress:
        return AllProgress([terminal.progress() for terminal in self._terminals])

    def _one_pressed(self, seconds: float) -> list[bool]:
        pressed: list[bool] = []
        share = seconds / len(self._terminals)
        self._each(lambda terminal: pressed.append(terminal.wait_for_key(share)))
        return pressed

    def _each(self, action: Callable[[Terminal], object]) -> None:
        for terminal in list(self._terminals):
            try:
                action(terminal)
            except TerminalLost:
                self._terminals.remove(terminal)


class AllProgress:
    """See ``Progress``; a terminal that breaks off does not stop the work.

    Ctrl-C at one of them raises KeyboardInterrupt.
    """

    def __init__(self, parts: Sequence[TerminalProgress]) -> None:
        self._parts = parts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._each(lambda part: part.__exit__(*error))

    def start(self, label: str, total: int) -> None:
        self._each(lambda part: part.start(label, total))

    def advance(self, amount: int) -> None:
        self._each(lambda part: part.advance(amount))

    def note(self, message: str) -> None:
        self._each(lambda part: part.note(message))

    def _each(self, action: Callable[[TerminalProgress], object]) -> None:
        for part in self._parts:
            with suppress(TerminalLost):
                action(part)
