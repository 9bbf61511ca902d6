"""A command that runs in a guest: through the QEMU guest agent, or typed on the serial line.

Each is a small state machine that is asked again and again, so that nothing waits for a guest.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from imager.bootsigns import LOGIN
from imager.serialline import SerialLine, plain_text

_RESEND_SECONDS = 30.0
_RECEIVE_BYTES = 64 << 10
_MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True)
class CommandEnd:
    """How a command ended in the guest."""

    code: int
    output: str


@dataclass(frozen=True)
class LogIn:
    """Of an account of the guest."""

    user: str
    password: str


class AgentCommand:
    """By the agent, if the guest has one (QEMU's docs/interop/qemu-ga-ref)."""

    def __init__(self, connection: socket.socket, command: str) -> None:
        self._connection = connection
        self._connection.setblocking(False)
        self._command = command
        self._pending = b""
        self._sync = 0
        self._sent = float("-inf")
        self._pid: int | None = None
        self._waiting = False

    def step(self) -> CommandEnd | None:
        """What the agent has said by now."""
        for answer in self._answers():
            end = self._take(answer)
            if end is not None:
                return end
        if self._pid is not None and not self._waiting:
            self._send("guest-exec-status", pid=self._pid)
        elif self._pid is None and time.monotonic() - self._sent > _RESEND_SECONDS:
            self._sync = int(time.monotonic() * 1000)
            self._send("guest-sync", id=self._sync)
        return None

    def _take(self, answer: dict[str, Any]) -> CommandEnd | None:
        self._waiting = False
        if "error" in answer:
            if self._pid is None and answer["error"].get("class") == "CommandNotFound":
                return CommandEnd(-1, f"the guest agent refuses: {answer['error'].get('desc')}")
            return None
        found = answer.get("return")
        if found == self._sync and self._pid is None:
            shell = {"path": "/bin/sh", "arg": ["-c", self._command], "capture-output": True}
            self._send("guest-exec", **shell)
        elif isinstance(found, dict) and "pid" in found:
            self._pid = int(found["pid"])
        elif isinstance(found, dict) and found.get("exited"):
            said = b"".join(_decoded(found.get(key)) for key in ("out-data", "err-data"))
            code = int(found.get("exitcode", -int(found.get("signal", 1))))
            return CommandEnd(code, said.decode(errors="replace").strip())
        return None

    def _send(self, name: str, **arguments: object) -> None:
        self._waiting = True
        self._sent = time.monotonic()
        line = json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
        with suppress(OSError):  # nobody listens yet: it is sent again
            self._connection.sendall(line)

    def _answers(self) -> list[dict[str, Any]]:
        with suppress(OSError):
            while content := self._connection.recv(_RECEIVE_BYTES):
                self._pending = (self._pending + content)[-_MAX_LINE_BYTES:]
        *lines, self._pending = self._pending.split(b"\n")
        found = []
        for line in lines:
            with suppress(ValueError):
                document = json.loads(line.lstrip(b"\xff"))
                found += [document] if isinstance(document, dict) else []
        return found


class SerialCommand:
    """Typed after a log-in on the serial line."""

    def __init__(self, serial: SerialLine, login: LogIn, command: str) -> None:
        self._serial = serial
        self._login = login
        self._command = command
        self._seen = 0
        self._steps = [
            (LOGIN, login.user),
            (re.compile(r"[Pp]ass(?:word|code|phrase)[^\n]*: ?"), login.password),
            # Quotes keep the echoed line from looking like what it prints.
            (
                re.compile(r"[#$%>] \Z"),
                f"echo imager'-begin'; ( {command} ); echo imager'-end' $?",
            ),
        ]

    def step(self) -> CommandEnd | None:
        """Type the next line when its time has come."""
        raw = self._serial.raw()
        news = plain_text(raw[self._seen :].decode(errors="replace"))
        if self._steps:
            pattern, line = self._steps[0]
            if re.search(r"Login incorrect", news):
                return CommandEnd(-1, f"the guest does not let {self._login.user} in")
            if pattern.search(news):
                self._seen = len(raw)
                self._serial.send(line.encode() + b"\n")
                self._steps.pop(0)
            return None
        found = re.search(r"imager-begin\n(.*?)\n?imager-end (\d+)", news, re.DOTALL)
        return CommandEnd(int(found[2]), found[1].strip()) if found else None


def _decoded(text: object) -> bytes:
    with suppress(ValueError):
        return base64.b64decode(text) if isinstance(text, str) else b""
    return b""
