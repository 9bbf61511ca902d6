"""Consistency: how disks that are in use are captured as they were at one moment.

``choose`` picks the method, ``one_moment`` carries it out. The methods, best first: offline
(nothing writes), snapshot, track, freeze; none only by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from imager.blocksource import BlockSource
from imager.deviceuse import LiveFilesystem, live_filesystems, uses_of
from imager.errors import RefusedError, UsageError
from imager.freeze import LIMIT_SECONDS, Freeze, frozen, written_here
from imager.hooks import HookRun
from imager.manifest import Manifest
from imager.snapshot import Snapshots, is_volume, taken, why_no_snapshot
from imager.trackcapture import DiskTracker

Method = Literal["offline", "snapshot", "track", "freeze", "none"]
METHODS: tuple[Method, ...] = get_args(Method)
CHOICES = ("auto", *METHODS)

WORDS: dict[Method, str] = {
    "offline": "offline",
    "snapshot": "snapshot",
    "track": "tracked",
    "freeze": "frozen",
    "none": "none",
}
"""In the manifest."""


def check_choice(asked: str) -> None:
    """Raises UsageError."""
    if asked not in CHOICES:
        raise UsageError(f"--consistency {asked}: it can be {', '.join(CHOICES)}")


@dataclass(frozen=True)
class Situation:
    """Who uses the disks. ``writers``: in words."""

    paths: tuple[str, ...]
    writers: tuple[str, ...]
    live: tuple[LiveFilesystem, ...]

    @classmethod
    def of(cls, paths: Sequence[str]) -> Situation:
        writers = [
            f"{path}: {use.device} is {use.description}"
            for path in paths
            for use in uses_of(path)
            if use.writable and use.description != "in use as swap"
        ]
        return cls(tuple(paths), tuple(writers), tuple(live_filesystems(paths)))


def refuse_writers(situation: Situation) -> None:
    """Raises RefusedError when something may be writing to the disks."""
    if situation.writers:
        raise RefusedError(
            list(situation.writers),
            hint="unmount it, or remount it read-only; --consistency auto captures a disk that is "
            "in use as well, --consistency none without any care",
        )


def choose(asked: str, situation: Situation, repository: str) -> Method:
    """The method that was asked for, or the best that can be had.

    ``repository`` is its URL. Raises UsageError for an unknown one, RefusedError with the reasons
    when it can't be had.
    """
    check_choice(asked)
    if asked in ("auto", "offline") and not situation.writers:
        return "offline"
    if asked == "none":
        return "none" if situation.writers else "offline"
    reasons: dict[Method, list[str]] = {}
    for method in ("snapshot", "track", "freeze"):
        if asked in ("auto", method):
            reasons[method] = _why_not(method, situation, repository)
            if not reasons[method]:
                return method
    why = [f"no {method}: {text}" for method, texts in reasons.items() for text in texts]
    raise RefusedError(
        [*situation.writers, *why],
        hint="unmount it, or remount it read-only; a repository on another disk can be written "
        "while the disk is frozen; --consistency none captures a disk that changes meanwhile, at "
        "your own risk",
    )


def _why_not(method: Method, situation: Situation, repository: str) -> list[str]:
    if not situation.live:
        return ["no filesystem of it is mounted for writing"]
    if method == "snapshot":
        reasons = why_no_snapshot(situation.live)
        return reasons or written_here(_not_lvm(situation.live), repository)
    if method == "track":
        return DiskTracker().why_not(situation.paths)
    return written_here(situation.live, repository)


def _not_lvm(live: Sequence[LiveFilesystem]) -> list[LiveFilesystem]:
    return [each for each in live if not is_volume(each)]


# --- carrying it out ----------------------------------------------------------------------------


class Moment:
    """``sources`` show the disks as they were at one moment, until ``end``."""

    def __init__(
        self,
        sources: Sequence[BlockSource],
        stack: ExitStack,
        *,
        freeze: Freeze | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        self.sources = list(sources)
        self._stack = stack
        self._freeze = freeze
        self._snapshots = snapshots

    @contextmanager
    def noting(self, freezing: AbstractContextManager[Freeze]) -> Iterator[Freeze]:
        """For a capture that freezes by itself: the freeze that counts is the last one."""
        with freezing as self._freeze:
            yield self._freeze

    @property
    def warnings(self) -> list[str]:
        """What is less than could be wished for."""
        return [
            f"{point} cannot be frozen: it was written out, and captured while it may have changed"
            for point in (self._freeze.synced if self._freeze else ())
        ]

    def end(self) -> dict[str, Any]:
        """All is read: let the disks go on. Returns what the manifest says of it.

        Raises ImagerError when the moment did not last until now.
        """
        if self._snapshots is not None:
            self._snapshots.check()
        self._stack.close()
        found: dict[str, Any] = {}
        if self._freeze is not None:
            found["freeze"] = freeze_record(self._freeze)
        if self._snapshots is not None:
            found["snapshots"] = self._snapshots.names
        return found


def freeze_record(freeze: Freeze) -> dict[str, Any]:
    """For the manifest."""
    return {
        "milliseconds": freeze.milliseconds,
        "filesystems": freeze.frozen,
        "synced": freeze.synced,
    }


def consistency_words(manifest: Manifest) -> str:
    """How an image was made consistent, for people: "tracked, frozen for 0.147 s: /, /boot"."""
    document = manifest.document
    parts = [str(document.get("consistency") or "unknown")]
    volumes, freeze = document.get("snapshots"), document.get("freeze")
    if isinstance(volumes, list):
        parts[0] += f" of {', '.join(map(str, volumes))}"
    if isinstance(freeze, dict) and isinstance(freeze.get("milliseconds"), int):
        points = ", ".join(map(str, freeze.get("filesystems") or ["nothing"]))
        parts.append(f"frozen for {freeze['milliseconds'] / 1000:.3f} s: {points}")
    return ", ".join(parts)


@contextmanager
def still(
    live: Sequence[LiveFilesystem], hooks: HookRun, *, limit_seconds: float = LIMIT_SECONDS
) -> Iterator[Freeze]:
    """Applications quiesced, then filesystems frozen, until the block ends. Raises ImagerError."""
    with hooks.quiesced(), frozen(live, limit_seconds=limit_seconds) as freeze:
        yield freeze


@contextmanager
def one_moment(
    method: Method,
    situation: Situation,
    sources: Sequence[BlockSource],
    hooks: HookRun,
    *,
    limit_seconds: float = LIMIT_SECONDS,
) -> Iterator[Moment]:
    """What a capture reads; with ``track`` the capture decides itself when all is ``still``.

    Raises ImagerError when it can't be brought about.
    """
    with ExitStack() as stack:
        if method == "freeze":
            freeze = stack.enter_context(still(situation.live, hooks, limit_seconds=limit_seconds))
            yield Moment(sources, stack, freeze=freeze)
        elif method == "snapshot":
            others = _not_lvm(situation.live)
            with hooks.quiesced():
                frozen_too = (
                    stack.enter_context(frozen(others, limit_seconds=limit_seconds))
                    if others
                    else None
                )
                snapshots = stack.enter_context(taken(situation.live, sources))
            yield Moment(snapshots.sources, stack, freeze=frozen_too, snapshots=snapshots)
        else:
            if method != "track":
                stack.enter_context(hooks.quiesced())
            yield Moment(sources, stack)
