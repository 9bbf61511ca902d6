"""Questions to a person. Without a terminal nothing is asked: the command refuses."""

from __future__ import annotations

import sys

from imager.errors import RefusedError


def confirm(question: str) -> None:
    """Raises RefusedError unless the answer is yes."""
    if _ask(f"{question} [y/N] ").lower() not in ("y", "yes"):
        raise RefusedError(["not confirmed"])


def confirm_by_name(name: str) -> None:
    """Have the name of what will be overwritten typed. Raises RefusedError for anything else."""
    if _ask(f"Type {name} to overwrite it: ") != name:
        raise RefusedError([f"{name} was not typed"])


def can_ask() -> bool:
    """Whether there is a person at a terminal."""
    return sys.stdin.isatty()


def choose(question: str, answers: str) -> str:
    """One of the letters of ``answers``; the last one for an empty or another answer."""
    answer = _ask(f"{question} [{'/'.join(answers)}] ").lower()[:1]
    return answer if answer and answer in answers else answers[-1]


def _ask(question: str) -> str:
    if not sys.stdin.isatty():
        raise RefusedError(["there is no terminal to ask on"], hint="give --yes to go ahead")
    print(question, end="", file=sys.stderr, flush=True)  # standard output may be a document
    return sys.stdin.readline().strip()
