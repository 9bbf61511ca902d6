"""Whether a guest accepts connections on a TCP port.

QEMU's user-mode network takes a connection before the guest does; its own table tells whether the
guest has answered.
"""

from __future__ import annotations

import re
import socket
import time
from contextlib import suppress
from typing import Self

from imager.errors import ToolError
from imager.qmp import ControlLine

_TRIES = 20
_KEPT_SECONDS = 10.0
_CONNECT_SECONDS = 5.0


class GuestPort:
    """A context manager. Raises ToolError when no port of this host can be forwarded."""

    def __init__(self, control: ControlLine, port: int) -> None:
        self._control = control
        self._port = port
        self._here = self._forward()
        self._connection: socket.socket | None = None
        self._since = 0.0
        self._established = re.compile(rf"TCP\[ESTABLISHED\].*\s10\.0\.2\.15\s+{port}\s")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hang_up()

    def is_open(self) -> bool:
        """Whether the guest has taken the connection that is tried now."""
        if self._connection is None or time.monotonic() - self._since > _KEPT_SECONDS:
            self._call()
        if self._connection is None:
            return False
        return bool(self._established.search(self._monitor("info usernet")))

    def _call(self) -> None:
        self._hang_up()
        self._since = time.monotonic()
        with suppress(OSError):
            self._connection = socket.create_connection(
                ("127.0.0.1", self._here), timeout=_CONNECT_SECONDS
            )

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _forward(self) -> int:
        said = ""
        for _ in range(_TRIES):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                here = int(probe.getsockname()[1])
            said = self._monitor(f"hostfwd_add net tcp:127.0.0.1:{here}-:{self._port}")
            if not said.strip():
                return here
        raise ToolError(f"QEMU forwards no port to the guest: {said.strip()}")

    def _monitor(self, line: str) -> str:
        return str(self._control.execute("human-monitor-command", **{"command-line": line}))
