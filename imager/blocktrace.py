"""Writes to a disk, as the kernel's own tracepoint ``block_rq_complete`` tells them.

A private instance of tracefs has its own ring buffers, one a CPU, and its own filter: nobody else's
tracing is touched. They are read as pages (``per_cpu/cpuN/trace_pipe_raw``); what a page and an
event look like is read from ``events/header_page`` and the event's ``format`` (kernel:
Documentation/trace/events.rst, ring-buffer-design.rst; linux/ring_buffer.h for the event header).
The event comes when the device has finished a write and before those who wait for it are told. So
what is read from the device after an event is no older than that write, and whoever saw fsync(2)
return finds its writes in the buffer.

Events that the kernel could not keep are counted by it; that, or a page that makes no sense, is
``lost`` here, and the reader must count everything as written.
"""

from __future__ import annotations

import os
import re
import secrets
import select
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from imager.errors import ImagerError, ToolError
from imager.process import run

TRACEFS = Path("/sys/kernel/tracing")

SECTOR = 512  # bytes; what the block layer counts in, whatever the device's sectors are

_EVENT = "block_rq_complete"
_PREFIX = "imager-"
_NAME = re.compile(r"imager-(\d+)-[0-9a-f]+")

# All CPUs together: seconds of a disk that does 100,000 writes a second, of some 60 bytes each.
_BUFFER_KIB, _LEAST_KIB = 64 << 10, 1 << 10

# linux/ring_buffer.c: RB_MISSED_EVENTS, RB_MISSED_STORED in the commit field of a page
_MISSED = 3 << 30
_LENGTH = ~_MISSED & 0xFFFFFFFF
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31

# A request that is no read or write of sectors has no place: a command of SG_IO or NVMe
# passthrough.
_NO_SECTOR = (1 << 64) - 1


class Write(NamedTuple):
    """In sectors of 512 bytes, from the start of the disk."""

    sector: int
    sectors: int


@dataclass
class Drained:
    """What a reading of the buffers brought."""

    writes: list[Write]
    lost: bool = False
    commands: int = 0
    """Commands that bypass the block layer's reads and writes; what they do is unknown."""


@dataclass(frozen=True)
class EventFormat:
    """Where a page and an event have what; offsets and sizes in bytes."""

    page_bytes: int
    commit_at: int
    data_at: int
    event_id: int
    event_bytes: int
    fields: struct.Struct
    """type, sector, number of sectors: at the offsets that the kernel names."""

    @classmethod
    def parse(cls, header_page: str, event: str) -> EventFormat:
        """Raises ToolError for a kernel that describes them in other words."""
        page, fields = _fields(header_page), _fields(event)
        number = re.search(r"^ID:\s*(\d+)", event, re.MULTILINE)
        try:
            wanted = [fields["common_type"], fields["sector"], fields["nr_sector"]]
            commit, data = page["commit"][0], page["data"]
            sizes = [size for _, size in wanted]
        except KeyError as error:
            raise ToolError(f"the kernel's trace format has no field {error}") from None
        if number is None or sizes != [2, 8, 4] or page["commit"][1] not in (4, 8):
            raise ToolError("the kernel's trace format is another than this program knows")
        layout, at = "=", 0
        for code, (offset, size) in zip("HQI", wanted, strict=True):
            if offset < at:
                raise ToolError("the kernel's trace format is another than this program knows")
            layout += f"{offset - at}x{code}"
            at = offset + size
        return cls(sum(data), commit, data[0], int(number[1]), at, struct.Struct(layout))


def parse_page(page: bytes, kind: EventFormat, found: Drained) -> None:
    """Add a page's writes to ``found``. No length in it is trusted: nonsense means ``lost``."""
    if len(page) < kind.data_at:
        found.lost = True
        return
    (commit,) = struct.unpack_from("=I", page, kind.commit_at)
    if commit & _MISSED:
        found.lost = True
    end = kind.data_at + (commit & _LENGTH)
    if end > len(page):
        found.lost = True
        end = len(page)
    at, writes, unpack = kind.data_at, found.writes, kind.fields.unpack_from
    least, event_id, header = kind.event_bytes, kind.event_id, struct.Struct("=II").unpack_from
    while at + 8 <= end:
        word, first = header(page, at)
        length = word & 31
        if length == 0:
            start, size = at + 8, first - 4
            following = at + 4 + first
        elif length < _PADDING:
            start, size = at + 4, length * 4
            following = start + size
        elif length == _PADDING:
            if not word >> 5:  # nothing behind it
                return
            at += 4 + first
            if first < 4:
                break
            continue
        else:
            at += 8
            continue
        if size < least or following > end:
            break
        number, sector, count = unpack(page, start)
        if number != event_id:
            break
        if sector == _NO_SECTOR:
            found.commands += 1
        elif count:
            writes.append(Write(sector, count))
        at = following
    else:
        if at == end:
            return
    found.lost = True


class BlockTrace:
    """The writes to one disk from now on. A context manager; used by one thread at a time."""

    def __init__(
        self,
        disk: str,
        *,
        buffer_kib: int | None = None,
        kept: str | None = None,
        overruns: int | None = None,
    ) -> None:
        """``disk``: ``major:minor`` of a whole disk, as its requests name it; ``buffer_kib``: of
        each CPU; ``kept``: name of an instance that outlives this process when it is left, and
        ``overruns``: what it had counted then (``leave``), to go on with it.

        Raises ToolError where the kernel has no tracefs or not this event, or we are not root.
        """
        root = tracefs()
        remove_stale(root)
        name = kept or f"{os.getpid()}-{secrets.token_hex(4)}"
        self._folder = root / "instances" / f"{_PREFIX}{name}"
        self._fds: list[int] = []
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._overruns = 0
        try:
            goes_on = overruns is not None and self._folder.exists()
            if not goes_on:
                _remove_instance(self._folder)
                self._folder.mkdir()
            self._start(root, disk, buffer_kib, goes_on=goes_on)
            # One that has gone meanwhile saw nothing: the first reading says that events are lost.
            self._overruns = self._count_overruns() if overruns is None else overruns
            self._is_lost = overruns is not None and not goes_on
        except OSError as error:
            self._remove()
            raise ToolError(
                f"the kernel's tracing cannot be used, {self._folder}: {error.strerror}",
                hint="run as root; a kernel under lockdown=confidentiality has no tracing",
            ) from None
        except BaseException:
            self._remove()
            raise

    def _start(self, root: Path, disk: str, buffer_kib: int | None, *, goes_on: bool) -> None:
        event = self._folder / "events/block" / _EVENT
        if not event.exists():
            raise ToolError(f"this kernel has no tracepoint {_EVENT}")
        header = (self._folder / "events/header_page", root / "events/header_page")
        page = next(path.read_text() for path in header if path.exists())
        self.format = EventFormat.parse(page, (event / "format").read_text())
        self._cpus = sorted((self._folder / "per_cpu").iterdir())
        size = buffer_kib or max(_BUFFER_KIB // len(self._cpus), _LEAST_KIB)
        if not goes_on:
            (self._folder / "buffer_size_kb").write_text(str(size))
            major, minor = map(int, disk.split(":"))
            # MAJOR and MINOR of the kernel's own dev_t. Of what is no read, only what has sectors
            # or is a command (N) counts; flushes have none.
            (event / "filter").write_text(
                f'dev == {major << 20 | minor} && !(rwbs ~ "R*") && (nr_sector > 0 || rwbs ~ "N*")'
            )
        for cpu in self._cpus:
            self._fds.append(
                os.open(cpu / "trace_pipe_raw", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            )
        self._poll = select.poll()
        for fd in self._fds:
            self._poll.register(fd, select.POLLIN)
        self._poll.register(self._waker, select.POLLIN)
        (event / "enable").write_text("1")
        # Twice what fits into the buffer: what comes later need not be in this reading.
        self._most_pages = max(2 * size * 1024 // self.format.page_bytes, 16)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def leave(self) -> int:
        """End here, and let the kernel go on gathering; the number for ``overruns``.

        What ``drain`` has not brought is for the one who goes on.
        """
        self._close()
        return self._overruns

    def wait(self, seconds: float) -> None:
        """Until a buffer is filled by half, the time is over, or ``wake`` is called."""
        self._poll.poll(seconds * 1000)

    def wake(self) -> None:
        """End a ``wait``, and all further ones; from any thread."""
        os.eventfd_write(self._waker, 1)

    def drain(self) -> Drained:
        """All events that the buffers held when this was called, and maybe some more."""
        found = Drained([], lost=self._is_lost)
        self._is_lost = False
        for fd in self._fds:
            for _ in range(self._most_pages):
                try:
                    page = os.read(fd, self.format.page_bytes)
                except BlockingIOError:
                    break
                if not page:
                    break
                parse_page(page, self.format, found)
        count = self._count_overruns()
        if count != self._overruns:
            self._overruns = count
            found.lost = True
        return found

    def _count_overruns(self) -> int:
        return sum(_overrun(cpu) for cpu in self._cpus)

    def _close(self) -> None:
        for fd in [*self._fds, self._waker]:
            os.close(fd)

    def _remove(self) -> None:
        self._close()
        _remove_instance(self._folder)


def tracefs() -> Path:
    """Where tracefs is mounted; it is, when it is not. Raises ToolError."""
    if not (TRACEFS / "instances").is_dir():
        run(["mount", "-t", "tracefs", "tracefs", str(TRACEFS)], accept=(0, 32))
    if not (TRACEFS / "instances").is_dir():
        raise ToolError(
            f"there is no tracefs at {TRACEFS}", hint="writes cannot be seen on this kernel"
        )
    return TRACEFS


def remove_kept(kept: str) -> None:
    """Remove an instance that was left."""
    _remove_instance(tracefs() / "instances" / f"{_PREFIX}{kept}")


def remove_stale(root: Path) -> None:
    """Remove the instances of processes that were killed."""
    with suppress(OSError):
        for folder in (root / "instances").iterdir():
            name = _NAME.fullmatch(folder.name)
            if name and not Path("/proc", name[1]).exists():
                _remove_instance(folder)


def _remove_instance(folder: Path) -> None:
    with suppress(OSError):
        (folder / "events/enable").write_text("0")
    with suppress(OSError):  # absent, or a reader holds it: the next one removes it
        folder.rmdir()


def _overrun(cpu: Path) -> int:
    """Events that the kernel dropped on this CPU so far."""
    stats = (cpu / "stats").read_text()
    words = re.findall(r"^(overrun|commit overrun|dropped events): (\d+)", stats, re.MULTILINE)
    return sum(int(number) for _, number in words)


def _fields(text: str) -> dict[str, tuple[int, int]]:
    """Name to (offset, size) of ``field:TYPE NAME; offset:N; size:N;`` lines."""
    found = re.findall(r"field:\s*[^;]*?(\w+)(?:\[\w*\])?;\s*offset:(\d+);\s*size:(\d+);", text)
    return {name: (int(offset), int(size)) for name, offset, size in found}


def disk_of(path: str, *, sys_root: Path = Path("/sys")) -> tuple[str, int]:
    """``major:minor`` of the whole disk of a device, and where on it the device begins, in bytes.

    Raises ImagerError for what has no requests of its own, as all that is stacked on disks (LVM,
    md, LUKS): its writes cannot be placed by the time they end.
    """
    status = Path(path).stat()
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    folder = (sys_root / "dev/block" / number).resolve()
    start = 0
    if (folder / "partition").exists():
        start = int((folder / "start").read_text()) * SECTOR
        folder = folder.parent
        number = (folder / "dev").read_text().strip()
    if not (folder / "mq").is_dir():
        raise ImagerError(
            f"{path} has no requests of its own: its writes cannot be tracked",
            hint="capture the disks that it lies on",
        )
    return number, start
