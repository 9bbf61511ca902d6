"""One tree of errors. Each class knows its exit code; only ``__main__`` prints and exits.

A message says what happened and where; the hint says what to do next.
"""

from __future__ import annotations


class ImagerError(Exception):
    """Something failed. ``hint`` is the next step for the person who reads it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ImagerError):
    """The command was called wrongly: contradicting or missing arguments."""

    exit_code = 2


class IntegrityError(ImagerError):
    """Stored or read-back bytes are not what their digest or structure says."""

    exit_code = 3


class FormatError(IntegrityError):
    """Bytes of a repository file do not follow the format."""


class UnsupportedError(ImagerError):
    """A newer version or an unknown mandatory feature, named in the message."""


class ObjectMissing(ImagerError):
    """A repository object is not there (missing is not the same as invalid)."""


class ObjectExists(ImagerError):
    """Create-if-absent found the object already there."""


class RefusedError(ImagerError):
    """An unsafe or incompatible target; nothing was written. Lists every reason."""

    exit_code = 4

    def __init__(self, reasons: list[str], *, hint: str | None = None) -> None:
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        super().__init__(f"refused, nothing was written:\n{lines}", hint=hint)
        self.reasons = reasons


class SourceError(ImagerError):
    """The source could not be opened or read at all."""


class ToolError(ImagerError):
    """An external program is missing or failed."""


class NotRecognized(ImagerError):
    """A parser looked at a structure and it is not (soundly) of its kind."""
