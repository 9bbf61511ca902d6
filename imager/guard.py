"""A guarded change: a command, then the checks that say whether the machine is well after it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from time import monotonic, sleep

from imager.errors import ToolError
from imager.process import pass_through

_CHECK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Change:
    """``checks`` are commands that end with 0 when all is well; each may take up to
    ``check_seconds`` to do so, as services take a while to come up. ``output`` is the open file
    for what the commands print, where standard output is for something else."""

    command: tuple[str, ...]
    checks: tuple[tuple[str, ...], ...] = ()
    check_seconds: float = 0
    output: int | None = None


def make(change: Change) -> str | None:
    """Run the command, then the checks; what failed, in words, or None.

    Raises ToolError when the command cannot be started: nothing was changed then.
    """
    code = pass_through(list(change.command), output=change.output)
    if code:
        return f"exit code {code} from: {shlex.join(change.command)}"
    for check in change.checks:
        if failure := _check(list(check), change):
            return failure
    return None


def _check(command: list[str], change: Change) -> str | None:
    deadline = monotonic() + change.check_seconds
    while True:
        try:
            code = pass_through(command, output=change.output)
        except ToolError as error:
            return f"the check could not be made: {error.message}"
        if code == 0:
            return None
        left = deadline - monotonic()
        if left <= 0:
            return f"the check failed, exit code {code} from: {shlex.join(command)}"
        sleep(min(left, _CHECK_AGAIN_SECONDS))
