"""Tracking: which bytes of a disk were written, by the block layer's own word.

A ``WriteTracker`` has a thread that reads the kernel's events into a ``WrittenMap``. ``take`` gives
what was written since the last ``take``: whatever is read from the disk after a ``take`` is as new
as that, or is in the next one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import groupby
from typing import Self

from imager.blocktrace import SECTOR, BlockTrace, Drained, disk_of
from imager.errors import ImagerError
from imager.extents import Extents

# Blocks have at least this size: finer records would not save reading.
UNIT = 64 << 10

_LOOK_SECONDS = 1.0
_BITS = [bytes(n for n in range(8) if byte >> n & 1) for byte in range(256)]


class WrittenMap:
    """Which units of a disk were written: one bit each, 2 MiB for a disk of 1 TiB."""

    def __init__(self, size: int) -> None:
        """``size`` of the disk in bytes."""
        self._size = size
        self._units = -(-size // UNIT)
        self._bits = bytearray(-(-self._units // 8))

    def add(self, offset: int, length: int) -> None:
        """Mark a range in bytes; what lies outside of the disk is another's."""
        first, stop = max(offset, 0) // UNIT, min(-(-(offset + length) // UNIT), self._units)
        bits = self._bits
        while first < stop:
            if first % 8 == 0 and stop - first >= 8:
                count = (stop - first) // 8
                bits[first // 8 : first // 8 + count] = b"\xff" * count
                first += count * 8
            else:
                bits[first >> 3] |= 1 << (first & 7)
                first += 1

    def extents(self) -> Extents:
        """All that was written, widened to whole units."""
        units = (n * 8 + bit for n, byte in enumerate(self._bits) if byte for bit in _BITS[byte])
        runs = (
            [unit for _, unit in run]
            for _, run in groupby(enumerate(units), key=lambda pair: pair[1] - pair[0])
        )
        found = Extents.from_sorted((run[0] * UNIT, len(run) * UNIT) for run in runs)
        return found.clip(0, self._size)


@dataclass(frozen=True)
class Written:
    """What happened to a disk between two takes."""

    extents: Extents
    lost: bool = False
    """The kernel could not keep all events: anything may have been written."""
    commands: int = 0
    """Commands that bypass the block layer; what they wrote is unknown."""


class WriteTracker:
    """Tracks a disk or partition from now on, in a thread. A context manager."""

    def __init__(
        self,
        path: str,
        size: int,
        *,
        buffer_kib: int | None = None,
        kept: str | None = None,
        overruns: int | None = None,
    ) -> None:
        """``size`` in bytes; ``buffer_kib`` of the kernel's buffer of each CPU; ``kept`` and
        ``overruns`` as in ``BlockTrace``.

        Raises ImagerError where the kernel cannot tell (``blocktrace``).
        """
        self.path = path
        self._size = size
        disk, self._start = disk_of(path)
        self._trace = BlockTrace(disk, buffer_kib=buffer_kib, kept=kept, overruns=overruns)
        self._lock = threading.Lock()
        self._map = WrittenMap(size)
        self._lost = False
        self._commands = 0
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tracker", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._trace.__exit__()

    def _end(self) -> None:
        self._ended.set()
        self._trace.wake()
        self._thread.join()

    def leave(self) -> tuple[Written, int]:
        """End here while the kernel goes on gathering; what was written since the last take, and
        the number for ``overruns``. Instead of leaving the block."""
        self._end()
        return self.take(), self._trace.leave()

    def take(self) -> Written:
        """What was written since the last one. Raises ImagerError when tracking has failed."""
        with self._lock:
            self._drain()
            taken = Written(self._map.extents(), self._lost, self._commands)
            self._map, self._lost, self._commands = WrittenMap(self._size), False, 0
        return taken

    def _follow(self) -> None:
        try:
            while not self._ended.is_set():
                self._trace.wait(_LOOK_SECONDS)
                with self._lock:
                    self._drain()
        except BaseException as error:  # told by the next take
            self._error = error

    def _drain(self) -> None:
        if self._error is not None:
            raise ImagerError(f"tracking of {self.path} has ended: {self._error}")
        self._note(self._trace.drain())

    def _note(self, drained: Drained) -> None:
        add, start = self._map.add, self._start
        for sector, sectors in drained.writes:
            add(sector * SECTOR - start, sectors * SECTOR)
        self._lost |= drained.lost
        self._commands += drained.commands
