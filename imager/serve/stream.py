"""A client's byte stream, plain or encrypted.

One thread reads; any number of threads send, each message whole.
"""

from __future__ import annotations

import io
import socket
import ssl
import struct
import threading
from collections.abc import Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview

# What one sendmsg(2) takes (IOV_MAX), and what one recv of encrypted bytes takes: some TLS records.
_MAX_VIEWS = 1024
_RECEIVE_BYTES = 64 << 10

# A client that takes nothing for so long is gone.
SEND_SECONDS = 60


class StreamEnded(Exception):
    """The client closed its end, or is gone."""


class Stream(Protocol):
    def receive_into(self, buffer: memoryview) -> int:
        """At least one byte; 0 when the client has closed its end. Raises OSError."""

    def send(self, parts: Sequence[Buffer]) -> None:
        """All of them, in order and not mixed with what others send. Raises OSError."""


class PlainStream:
    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def receive_into(self, buffer: memoryview) -> int:
        return self._socket.recv_into(buffer)

    def send(self, parts: Sequence[Buffer]) -> None:
        with self._lock:
            send_all(self._socket, parts)


class EncryptedStream:
    """TLS by memory buffers: an SSL object must not be used by two threads at once, and one that
    waits for bytes to come must not keep others from sending."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        """Does the handshake. Raises OSError (ssl.SSLError) and StreamEnded."""
        self._socket = connection
        self._lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fill():
                    raise StreamEnded from None
            except ssl.SSLError:
                self._flush()  # the alert that tells the client why
                raise
            else:
                self._flush()
                return

    def receive_into(self, buffer: memoryview) -> int:
        while True:
            with self._lock:
                try:
                    return self._tls.read(len(buffer), buffer)  # type: ignore[return-value]
                except ssl.SSLWantReadError:
                    self._flush()
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return 0
            if not self._fill():
                return 0

    def send(self, parts: Sequence[Buffer]) -> None:
        with self._lock:
            for part in parts:
                view = memoryview(part)
                while len(view):
                    view = view[self._tls.write(view) :]
                    if self._outgoing.pending >= _RECEIVE_BYTES:
                        self._flush()
            self._flush()

    def _fill(self) -> bool:
        content = self._socket.recv(_RECEIVE_BYTES)
        self._incoming.write(content)
        return bool(content)

    def _flush(self) -> None:
        if self._outgoing.pending:
            send_all(self._socket, [self._outgoing.read()])


class _Raw(io.RawIOBase):
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        return self._stream.receive_into(memoryview(buffer))


def buffered(stream: Stream) -> io.BufferedReader:
    """Many small requests come by one call of the kernel."""
    return io.BufferedReader(_Raw(stream), _RECEIVE_BYTES)


def read_exactly(stream: Stream, length: int) -> bytes:
    """Not a byte more than that. Raises StreamEnded, OSError."""
    content = bytearray(length)
    view = memoryview(content)
    while len(view):
        count = stream.receive_into(view)
        if not count:
            raise StreamEnded
        view = view[count:]
    return bytes(content)


def send_all(connection: socket.socket, parts: Sequence[Buffer]) -> None:
    """Raises OSError, also when the client takes nothing for ``SEND_SECONDS``."""
    sent = connection.sendmsg(parts[:_MAX_VIEWS])
    total = sum(map(len, parts))
    if sent == total:
        return
    views = [memoryview(part) for part in parts]
    while True:
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if not views:
            return
        views[0] = views[0][sent:]
        sent = connection.sendmsg(views[:_MAX_VIEWS])


def set_time_limits(connection: socket.socket, *, receive_seconds: int) -> None:
    """By the kernel (socket(7)), which costs nothing per call; 0 is no limit."""
    for option, seconds in (
        (socket.SO_RCVTIMEO, receive_seconds),
        (socket.SO_SNDTIMEO, SEND_SECONDS),
    ):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, 0))
