"""Where a server listens: a Unix socket, or a host and port."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from imager.errors import ImagerError, UsageError

DEFAULT_PORT = 10809
"""Of NBD, at IANA."""

_MAX_PATH = 107  # unix(7): sun_path, with its zero byte
_BACKLOG = 64


@dataclass(frozen=True)
class TcpAddress:
    host: str
    port: int
    """0 has the kernel choose."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


Address = Path | TcpAddress


def parse_listen(text: str) -> TcpAddress:
    """``HOST``, ``HOST:PORT``, ``[HOST]:PORT`` or ``:PORT`` on loopback. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535 or not port.isascii():
        raise UsageError(f"{text}: {port or 'nothing'} is not a port")
    return TcpAddress(host, int(port))


def listen(address: Address) -> socket.socket:
    """A listening socket. Raises ImagerError saying why not."""
    try:
        return _listen_unix(address) if isinstance(address, Path) else _listen_tcp(address)
    except OSError as error:
        raise ImagerError(f"cannot listen at {address}: {error.strerror or error}") from None


def uri(address: Address, export: str, *, tls: bool = False) -> str:
    """As clients take it; source: doc/uri.md of the NBD project."""
    scheme = "nbds" if tls else "nbd"
    name = quote(export, safe="/:@")
    if isinstance(address, Path):
        return f"{scheme}+unix:///{name}?socket={quote(str(address.absolute()))}"
    return f"{scheme}://{address}/{name}"


def _listen_unix(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _MAX_PATH:
        raise UsageError(f"{path}: the path of a socket has at most {_MAX_PATH} bytes")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)  # nobody can connect before it listens
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """A socket whose server is gone. Raises ImagerError when it is there."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f"{path} is there already, and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise ImagerError(f"another server listens at {path}")


def _listen_tcp(address: TcpAddress) -> socket.socket:
    found = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    if not found:
        raise OSError(errno.EADDRNOTAVAIL, "no such address")
    family, kind, protocol, _, where = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
