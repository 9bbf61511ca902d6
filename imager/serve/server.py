"""The server: listens, and gives each client a thread."""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from imager.blocksource import BlockSource
from imager.errors import UsageError
from imager.serve.address import Address, TcpAddress, listen
from imager.serve.export import Export
from imager.serve.handshake import shake_hands
from imager.serve.stream import StreamEnded, set_time_limits
from imager.serve.transmission import OnError, transmit

# More than that are not let in: each has threads and what it is sent in memory.
MAX_CLIENTS = 128

# For the handshake; a client that is asked for a certificate may have to ask a person.
_HANDSHAKE_SECONDS = 60

# When no file can be opened: until some client is gone.
_PAUSE_SECONDS = 1.0

# TCP clients whose machine is gone are noticed after about two minutes; tcp(7).
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class ImageServer:
    """Serves while its block lasts; a context manager. ``address`` is where, in full."""

    def __init__(
        self,
        exports: Mapping[str, BlockSource] | Iterable[Export],
        address: Address,
        *,
        tls: ssl.SSLContext | None = None,
        on_error: OnError | None = None,
    ) -> None:
        """The first export has the empty name too. ``on_error`` is told of reads that failed, from
        any thread. Raises UsageError when others could listen in, ImagerError."""
        if isinstance(exports, Mapping):
            exports = [Export(name, source) for name, source in exports.items()]
        self._exports = {export.name: export for export in exports}
        _check_safety(address, tls)
        self._tls = tls
        self._on_error = on_error or _log
        self._listener = listen(address)
        self.address = _bound(address, self._listener)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()  # here: later there may be no file for it
        for waiting in (self._listener, self._woken):
            self._selector.register(waiting, selectors.EVENT_READ)
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._accept_all, name="nbd-listener", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._wake.send(b"x")
        self._thread.join()
        self._selector.close()
        self._listener.close()
        if isinstance(self.address, Path):
            self.address.unlink(missing_ok=True)
        with self._lock:
            threads = list(self._clients.values())
            for connection in self._clients:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        self._wake.close()
        self._woken.close()

    @property
    def clients(self) -> int:
        """How many are connected."""
        with self._lock:
            return len(self._clients)

    def _accept_all(self) -> None:
        self._listener.setblocking(False)
        while not self._stopped.is_set():
            self._selector.select()
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError, InterruptedError):
                continue
            except OSError:  # no more files: the client waits, and so do we
                self._stopped.wait(_PAUSE_SECONDS)
                continue
            self._let_in(connection)

    def _let_in(self, connection: socket.socket) -> None:
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="nbd-client", daemon=True
        )
        with self._lock:
            full = len(self._clients) >= MAX_CLIENTS
            if not full:
                self._clients[connection] = thread
        if full:
            connection.close()
            return
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._let_go(connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._prepare(connection)
            agreement = shake_hands(connection, self._exports, self._tls)
            if agreement is not None:
                set_time_limits(connection, receive_seconds=0)
                transmit(agreement, self._on_error)
        except (StreamEnded, OSError):
            pass  # the client is gone, or doesn't speak NBD
        finally:
            self._let_go(connection)

    def _prepare(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        set_time_limits(connection, receive_seconds=_HANDSHAKE_SECONDS)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _let_go(self, connection: socket.socket) -> None:
        with self._lock:
            self._clients.pop(connection, None)
            connection.close()


def _check_safety(address: Address, tls: ssl.SSLContext | None) -> None:
    if isinstance(address, Path) or address.is_local:
        return
    if tls is None or tls.verify_mode != ssl.CERT_REQUIRED:
        raise UsageError(
            f"{address} can be reached from other machines, so it needs TLS with client "
            "certificates",
            hint="name them (--tls-certificate, --tls-clients), or listen at 127.0.0.1",
        )


def _bound(address: Address, listener: socket.socket) -> Address:
    """With the port that the kernel chose."""
    if isinstance(address, TcpAddress):
        return TcpAddress(address.host, listener.getsockname()[1])
    return address


def _log(name: str, error: Exception) -> None:
    logging.getLogger(__name__).error("%s: %s", name, error)
