"""The serial line of a virtual machine: all that it said, and a way to type."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from typing import Self

_RECEIVE_BYTES = 64 << 10
# A machine that talks without end must not fill the memory: its start and its end are kept.
_KEPT_START = 1 << 20
_KEPT_END = 3 << 20

# Colours, cursor moves and the rest of what boot loaders and firmware send to a terminal.
_TERMINAL_CODES = re.compile(
    r"\x1b(?:\[[0-9;?=]*[A-Za-z]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][A-Z0-9]|[=>78cM])|[\r\x00\x07]"
)


def plain_text(raw: str) -> str:
    """Terminal output without terminal codes."""
    return _TERMINAL_CODES.sub("", raw)


class SerialLine:
    """A context manager; owns the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._start = bytearray()
        self._end = bytearray()
        self._left_out = 0
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="serial line", daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._connection.close()

    def raw(self) -> bytes:
        """What came, as it came."""
        with self._lock:
            gap = b"\n[... %d bytes ...]\n" % self._left_out if self._left_out else b""
            return bytes(self._start) + gap + bytes(self._end)

    def text(self) -> str:
        """What came, without terminal codes."""
        return plain_text(self.raw().decode(errors="replace"))

    def send(self, content: bytes) -> None:
        """Type; nothing happens when the machine is gone."""
        with suppress(OSError):
            self._connection.sendall(content)

    def _read(self) -> None:
        with suppress(OSError):
            while content := self._connection.recv(_RECEIVE_BYTES):
                with self._lock:
                    room = _KEPT_START - len(self._start)
                    self._start += content[:room]
                    self._end += content[room:]
                    excess = max(len(self._end) - _KEPT_END, 0)
                    del self._end[:excess]
                    self._left_out += excess
