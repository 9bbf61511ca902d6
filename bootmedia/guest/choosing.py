"""Questions on a terminal: choose from a numbered list, say yes, type a word.

Plain lines of less than 80 columns, since the same text goes to a screen and to a serial line.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from bootmedia.guest.console import Terminal

_MARGIN = re.compile(r"(?:\s+(?:(?:-|\d+)\s+)?)?")

T = TypeVar("T")

# One column is left free: some terminals begin a new line after the last.
_COLUMNS = 79

# Of a screen of 24 lines.
_CHOICES_A_PAGE = 8
_LINES_A_PAGE = 20


class Back(Exception):
    """The person does not want to go on with this screen."""


@dataclass(frozen=True)
class Choice(Generic[T]):
    """``refused`` says why it is shown and cannot be chosen; ``key`` stands for the number."""

    text: str
    value: T
    refused: str | None = None
    key: str | None = None


def choose(terminal: Terminal, title: str, choices: Sequence[Choice[T]]) -> T:
    """Raises Back when nothing is chosen."""
    numbered = [choice for choice in choices if choice.key is None]
    lettered = {choice.key: choice for choice in choices if choice.key is not None}
    by_key = {str(number): choice for number, choice in enumerate(numbered, 1)} | lettered
    first = 0
    while True:
        _show_page(terminal, title, numbered, first)
        more = first + _CHOICES_A_PAGE < len(numbered)
        if more:
            terminal.line("  m  further ones")
        for key, choice in lettered.items():
            terminal.line(f"  {key}  {choice.text}")
        answer = terminal.ask("which one (Enter: back)? ").lower()
        if not answer:
            raise Back
        if answer == "m" and more:
            first += _CHOICES_A_PAGE
        elif (chosen := by_key.get(answer)) is None:
            terminal.line(f"there is no {printable(answer)} here")
        elif chosen.refused is not None:
            show(terminal, [f"this one cannot be chosen: {chosen.refused}"])
        else:
            return chosen.value


def confirm(terminal: Terminal, question: str) -> bool:
    """No unless "y" or "yes" is typed."""
    return terminal.ask(f"{question} [y/N] ").lower() in ("y", "yes")


def show(terminal: Terminal, texts: Iterable[str], indent: str = "") -> None:
    """Each text as a paragraph, wrapped."""
    for text in texts:
        for line in text.splitlines() or [""]:
            terminal.write("\n".join(_wrapped(line, indent)) + "\n")


def show_pages(terminal: Terminal, texts: Sequence[str], *, last_first: bool = False) -> None:
    """As ``show``, a screen at a time. Raises Back when the person has seen enough."""
    lines = [part for text in texts for line in text.splitlines() for part in _wrapped(line, "")]
    if last_first:
        ends = range(len(lines), 0, -_LINES_A_PAGE)
        pages = [lines[max(0, end - _LINES_A_PAGE) : end] for end in ends]
    else:
        firsts = range(0, len(lines), _LINES_A_PAGE)
        pages = [lines[first : first + _LINES_A_PAGE] for first in firsts]
    for number, page in enumerate(pages, 1):
        terminal.write("\n".join(page) + "\n")
        more = "earlier ones" if last_first else "more"
        if number < len(pages) and terminal.ask(f"Enter: {more}, q: back "):
            raise Back


def printable(text: str) -> str:
    """Without control characters: names and notes come from images and firmware."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _show_page(terminal: Terminal, title: str, numbered: Sequence[Choice[T]], first: int) -> None:
    terminal.line()
    show(terminal, [title])
    for number, choice in enumerate(numbered[first : first + _CHOICES_A_PAGE], first + 1):
        mark = f"{number:3d}  "
        refused = f"\n({choice.refused})" if choice.refused else ""
        show(terminal, [mark + (choice.text + refused).replace("\n", "\n" + " " * len(mark))])


def _wrapped(line: str, indent: str) -> list[str]:
    """Lines that follow stand below the text of the first, behind its number or dash."""
    line = indent + printable(line)
    margin = _MARGIN.match(line)
    below = " " * (margin.end() if margin else 0)
    wrapped = textwrap.wrap(line, _COLUMNS, subsequent_indent=below, break_on_hyphens=False)
    return wrapped or [""]
