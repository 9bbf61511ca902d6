"""QEMU's control line: commands and events, one JSON document per line (QEMU's docs/interop/
qmp-spec.txt).

A thread reads, so that no event waits for a command. The machine has ended when the line has: the
events that say why come before that, and its process may be gone earlier.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from contextlib import suppress
from typing import Any, NamedTuple, Self

from imager.errors import ToolError

_ANSWER_SECONDS = 60.0
_RECEIVE_BYTES = 64 << 10
_MAX_LINE_BYTES = 16 << 20


class Event(NamedTuple):
    """Something that happened to the machine, like RESET or SHUTDOWN."""

    name: str
    data: dict[str, Any]


class ControlLine:
    """A context manager; owns the connection. One thread at a time gives commands."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read, name="qmp", daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._connection.close()

    @property
    def ended(self) -> bool:
        """Whether the machine is gone, and all its events are here."""
        return self._ended.is_set()

    def wait_for_end(self, timeout_seconds: float) -> bool:
        return self._ended.wait(timeout_seconds)

    def begin(self) -> None:
        """Take the greeting and have the machine, which waits for that (-S), run. Raises ToolError
        when it ends before it."""
        self._answer("its start")
        self.execute("qmp_capabilities")
        self.execute("cont")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its result. Raises ToolError with QEMU's reason, and when the
        machine has ended."""
        request = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        with suppress(OSError):  # the reader finds out that the line has ended
            self._connection.sendall(request)
        answer = self._answer(command)
        if "error" in answer:
            raise ToolError(f"QEMU, {command}: {answer['error'].get('desc')}")
        return answer.get("return")

    def take_events(self) -> list[Event]:
        """What has happened since the last call."""
        with self._lock:
            taken, self._events = self._events, []
        return taken

    def _answer(self, what: str) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=_ANSWER_SECONDS)
        except queue.Empty:
            raise ToolError(f"QEMU, {what}: no answer in {_ANSWER_SECONDS:.0f} s") from None
        if answer is None:
            self._answers.put(None)
            raise ToolError(f"QEMU, {what}: the machine has ended")
        return answer

    def _read(self) -> None:
        pending = b""
        try:
            while len(pending) < _MAX_LINE_BYTES and (
                content := self._connection.recv(_RECEIVE_BYTES)
            ):
                *lines, pending = (pending + content).split(b"\n")
                for line in lines:
                    self._take(line)
        except OSError:
            pass
        finally:
            self._answers.put(None)
            self._ended.set()

    def _take(self, line: bytes) -> None:
        try:
            document = json.loads(line)
        except ValueError:
            return
        if not isinstance(document, dict):
            return
        if "event" in document:
            with self._lock:
                self._events.append(Event(str(document["event"]), document.get("data") or {}))
        else:
            self._answers.put(document)
