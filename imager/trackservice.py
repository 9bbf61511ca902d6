"""The tracking service of a disk: it notes what is written between images.

It serves one talk at a time over a socket (``trackrecord``). A capture begins, takes what was
written as often as it likes, and commits: from the last take on the record is relative to the new
image. A talk that ends without that changes nothing.

Told to end by SIGTERM, as at a restart, it leaves the kernel gathering and a record to go on with;
whoever goes on learns from the kernel whether events were lost meanwhile. Killed, it leaves no
record, and the next capture reads everything.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from imager.blocksource import FileSource
from imager.blocktrace import remove_kept
from imager.errors import ImagerError, RefusedError
from imager.extents import Extents
from imager.jobs import replace_file
from imager.sysfs import read_text
from imager.tracking import WriteTracker, Written
from imager.trackrecord import (
    BaseRecord,
    TrackRecord,
    record_path,
    socket_path,
    track_folder,
    track_key,
    written_to_json,
)

_LONGEST_LINE = 64 << 20
_NO_IMAGE = "no image was made since it began"


class TrackService:
    """What is known of one disk."""

    def __init__(self, path: str, tracker: WriteTracker, left: TrackRecord | None) -> None:
        self._path = path
        self._tracker = tracker
        self._base = left.base if left else None
        self._reason = _NO_IMAGE
        self._written = left.written if left else Extents()
        """Since the base, as far as it was taken."""
        self._off = False
        """It was found to be wrong once, and is not believed any more."""
        self.is_ended = False

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question.get("ask"):
            case "begin":
                taken = self._take()
                since = Written(self._written, False, taken.commands)
                known = self._base.to_json() if self._base else None
                return {"base": known, "reason": self._reason, **written_to_json(since)}
            case "take":
                return written_to_json(self._take())
            case "commit":
                base = BaseRecord.from_json(question["base"])
                self._base = None if self._off else base
                self._written = Extents()
                return {}
            case "distrust":
                self._off, self._reason = True, str(question.get("reason"))
                self._base = None
                return {}
            case "status":
                self._take()
                return self._status()
            case "stop":
                self.is_ended = True
                return {}
        return {"error": "an unknown question"}

    def record(self, key: str, size: int, last: Written, overruns: int) -> TrackRecord:
        """For the one who goes on."""
        self._note(last)
        return TrackRecord(
            boot=boot_id(),
            device=key,
            size=size,
            overruns=overruns,
            base=self._base,
            written=self._written,
        )

    def _take(self) -> Written:
        taken = self._tracker.take()
        self._note(taken)
        return taken

    def _note(self, taken: Written) -> None:
        self._written = self._written.union(taken.extents)
        if taken.lost and self._base is not None:
            self._base = None
            self._reason = "the kernel lost events"

    def _status(self) -> dict[str, Any]:
        return {
            "disk": self._path,
            "since": self._base.image if self._base else None,
            "written_bytes": self._written.total,
            "reason": "" if self._base else self._reason,
            "off": self._off,
        }


def serve(path: str, ready: Callable[[], object] = lambda: None) -> None:
    """Track a disk until told to end. ``ready`` is called when it is tracked and can be asked.

    Raises RefusedError when another service does, ImagerError where the kernel can't.
    """
    with FileSource(path) as source, ExitStack() as stack:
        key = track_key(path)
        track_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        stack.enter_context(_only_one(path, key))
        left = _left(key, source.size)
        tracker = WriteTracker(
            path, source.size, kept=f"track-{key}", overruns=left.overruns if left else None
        )
        tracker.__enter__()
        service = TrackService(path, tracker, left)
        ended = stack.enter_context(_ending())
        listener = stack.enter_context(_listening(socket_path(key)))
        ready()
        try:
            _answer_all(listener, service, ended)
        except BaseException:
            tracker.__exit__()
            raise
        if service.is_ended:
            tracker.__exit__()
            return
        last, overruns = tracker.leave()
        record = service.record(key, source.size, last, overruns)
        replace_file(record_path(key), record.to_bytes())


def forget(path: str) -> None:
    """Remove what a service left for the next; waits for one that is ending."""
    key = track_key(path)
    if not track_folder().is_dir():
        return
    with _lock(key, fcntl.LOCK_EX):
        record_path(key).unlink(missing_ok=True)
        remove_kept(f"track-{key}")


def boot_id() -> str:
    return read_text(Path("/proc/sys/kernel/random/boot_id")) or ""


def _left(key: str, size: int) -> TrackRecord | None:
    """The record of the service before, which is gone then: killed, this one leaves none."""
    file = record_path(key)
    try:
        content = file.read_bytes()
        file.unlink()
        record = TrackRecord.from_bytes(content, str(file))
    except (OSError, ImagerError):
        return None
    is_ours = (record.boot, record.device, record.size) == (boot_id(), key, size)
    return record if is_ours else None


@contextmanager
def _only_one(path: str, key: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(_lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            raise RefusedError([f"{path} is tracked already"]) from None
        yield


@contextmanager
def _lock(key: str, kind: int) -> Iterator[None]:
    fd = os.open(track_folder() / f"{key}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, kind)
        yield
    finally:
        os.close(fd)


@contextmanager
def _ending() -> Iterator[int]:
    """A file that can be read once SIGTERM or SIGINT came."""
    told, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda *_: os.write(tell, b"e"))
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(told)
        os.close(tell)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _waits_for(door: socket.socket, ended: int) -> bool:
    """Until somebody is there; whether it is the signal."""
    ready, _, _ = select.select([door.fileno(), ended], [], [])
    return ended in ready


def _answer_all(listener: socket.socket, service: TrackService, ended: int) -> None:
    while not service.is_ended:
        if _waits_for(listener, ended):
            return
        talk, _ = listener.accept()
        with talk, suppress(OSError):
            _answer(talk, service, ended)


def _answer(talk: socket.socket, service: TrackService, ended: int) -> None:
    """One talk. SIGTERM waits for nobody: the capture learns that the service has ended."""
    pending = b""
    while not service.is_ended:
        if _waits_for(talk, ended):
            return
        content = talk.recv(1 << 16)
        if not content or len(pending) > _LONGEST_LINE:
            return
        *lines, pending = (pending + content).split(b"\n")
        for line in lines:
            talk.sendall(json.dumps(_answered(line, service)).encode() + b"\n")


def _answered(line: bytes, service: TrackService) -> dict[str, Any]:
    try:
        question = json.loads(line)
        if not isinstance(question, dict):
            raise ValueError
        return service.answer(question)
    except ImagerError as error:
        return {"error": error.message}
    except (ValueError, KeyError):
        return {"error": "no sensible question"}
