"""Progress is injected: engines report bytes, never print."""

from __future__ import annotations

from typing import Protocol, Self


class Progress(Protocol):
    """One task's progress. ``advance`` may be called from any one thread at a time."""

    def start(self, label: str, total: int) -> None:
        """A phase begins; ``total`` in bytes."""

    def advance(self, amount: int) -> None:
        """``amount`` more bytes are done."""

    def note(self, message: str) -> None:
        """Something that the user should read."""


class NullProgress:
    """Says nothing."""

    def start(self, label: str, total: int) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
