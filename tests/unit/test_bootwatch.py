"""Watching a machine that plays its part: control line, serial line and memory, without QEMU."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from imager import boot, bootwatch
from imager.bootsigns import Sign
from imager.bootwatch import Outcome, watch
from imager.errors import ToolError
from imager.guestcommand import AgentCommand, CommandEnd, LogIn, SerialCommand
from imager.machine import Machine
from imager.progress import NullProgress
from imager.qmp import ControlLine
from imager.serialline import SerialLine

SECONDS = 60


class Actor:
    """QEMU's side of the lines."""

    def __init__(self, control: socket.socket, serial: socket.socket) -> None:
        self.control = control
        self.serial = serial
        self.asked: list[str] = []
        self.after: dict[str, Callable[[], None]] = {}
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self.control.sendall(b'{"QMP": {}}\n')
        self._thread.start()

    def _answer(self) -> None:
        for line in self.control.makefile("rb"):
            request = json.loads(line)
            self.asked.append(request["execute"])
            if request["execute"] == "pmemsave":
                Path(request["arguments"]["filename"]).write_bytes(bytes(0x8000))
            if request["execute"] == "screendump":
                Path(request["arguments"]["filename"]).write_bytes(b"\x89PNG")
            try:
                self.control.sendall(b'{"return": {}}\n')
            except OSError:
                return
            self.after.pop(request["execute"], lambda: None)()

    def happens(self, name: str, **data: Any) -> None:
        self.control.sendall(json.dumps({"event": name, "data": data}).encode() + b"\n")

    def says(self, text: str) -> None:
        self.serial.sendall(text.encode())

    def goes(self) -> None:
        self.control.shutdown(socket.SHUT_RDWR)


class NoProcess:
    """In place of QEMU's own."""

    pid = 0

    def wait(self, timeout_seconds: float) -> bool:
        return True

    def said(self) -> str:
        return "qemu: a reason"

    def kill(self) -> None:
        pass


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Machine, Actor]]:
    monkeypatch.setattr(bootwatch, "_SETTLE_SECONDS", 0.1)
    with ExitStack() as stack:
        ends = [socket.socketpair() for _ in range(2)]
        actor = Actor(ends[0][1], ends[1][1])
        control = stack.enter_context(ControlLine(ends[0][0]))
        serial = stack.enter_context(SerialLine(ends[1][0]))
        memory = os.memfd_create("test")
        stack.callback(os.close, memory)
        for _, there in ends:
            stack.callback(there.close)
        control.begin()
        process: Any = NoProcess()
        yield Machine(process, control, serial, memory, None, tmp_path), actor


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def seen(machine: Machine, sign: Sign | None = None, seconds: float = SECONDS) -> Outcome:
    outcome, evidence = watch(machine, sign or Sign(), timeout_seconds=seconds)
    assert evidence.picture in (None, b"\x89PNG")
    return outcome


def test_a_login(played: tuple[Machine, Actor]) -> None:
    machine, actor = played
    actor.says("\x1b[1mDebian\x1b[0m\r\n\r\nweb1 login: ")
    outcome, evidence = watch(machine, Sign(), timeout_seconds=SECONDS)
    assert outcome == Outcome(True)
    assert evidence.console == "Debian\n\nweb1 login:"
    assert evidence.picture == b"\x89PNG"


def test_a_panic_before_the_end(played: tuple[Machine, Actor]) -> None:
    machine, actor = played
    actor.says("Kernel panic - not syncing: no init found\n")
    assert seen(machine).cause == "panic"


@pytest.mark.parametrize(
    ("act", "cause"),
    [
        (lambda actor: actor.happens("SHUTDOWN", guest=True, reason="guest-shutdown"), "power-off"),
        (lambda actor: actor.happens("SHUTDOWN", reason="host-signal"), "ended"),
        (lambda actor: None, "ended"),
    ],
)
def test_a_machine_that_ends(
    played: tuple[Machine, Actor], act: Callable[[Actor], None], cause: str
) -> None:
    """The last events count, however soon the line ends after them."""
    machine, actor = played
    act(actor)
    actor.goes()
    outcome = seen(machine)
    assert outcome.cause == cause
    if "SHUTDOWN" not in outcome.reason and cause == "ended":
        assert "host-signal" in outcome.reason or "a reason" in outcome.reason


def test_the_last_words_of_a_machine_that_ends(played: tuple[Machine, Actor]) -> None:
    machine, actor = played
    actor.says("You are in emergency mode.\n")
    wait_for(lambda: b"emergency" in machine.serial.raw())
    actor.goes()
    assert seen(machine).cause == "emergency"


def test_resets(played: tuple[Machine, Actor]) -> None:
    machine, actor = played
    for _ in range(3):
        actor.happens("RESET", guest=True, reason="guest-reset")
    actor.happens("RESET", guest=False, reason="host-qmp-system-reset")
    actor.says("web1 login: ")
    assert seen(machine).proved  # a few are no loop
    for _ in range(4):
        actor.happens("RESET", guest=True, reason="guest-reset")
    assert seen(machine, Sign("target", "none")).cause == "reset-loop"


def test_a_full_disk_of_the_host(played: tuple[Machine, Actor]) -> None:
    machine, actor = played
    actor.happens("BLOCK_IO_ERROR", device="disk0", nospace=True, reason="No space", action="stop")
    outcome = seen(machine)
    assert outcome.cause == "disk-error"
    assert "the host's disk is full" in outcome.reason


def test_time_is_up(played: tuple[Machine, Actor]) -> None:
    machine, actor = played
    actor.says("Starting something...\n")
    wait_for(lambda: b"Starting" in machine.serial.raw())
    outcome = seen(machine, seconds=0.5)
    assert outcome.cause == "timeout"
    assert "Starting something" in outcome.reason


def test_commands_after_the_end(played: tuple[Machine, Actor]) -> None:
    machine, actor = played
    actor.goes()
    assert machine.control.wait_for_end(SECONDS)
    with pytest.raises(ToolError, match="has ended"):
        machine.control.execute("query-status")
    assert machine.screenshot() is None
    assert machine.text_memory() == b""


# --- boot ---


class Told(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_run_goes_on_when_there_is_room(
    played: tuple[Machine, Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, actor = played
    rooms = iter([False, True])

    def go_on() -> None:
        actor.happens("SHUTDOWN", guest=True, reason="guest-shutdown")
        actor.goes()

    monkeypatch.setattr(boot, "_has_room", lambda overlay: next(rooms))
    monkeypatch.setattr(boot, "_LOOK_SECONDS", 0.05)
    event = {"device": "disk0", "operation": "write", "action": "stop"}
    actor.happens("BLOCK_IO_ERROR", nospace=True, **event)
    actor.after["cont"] = go_on
    told = Told()
    assert boot.attend_machine(machine, told) == "the machine switched itself off"
    assert "IS FULL" in told.notes[0]
    assert "goes on" in told.notes[1]
    assert "cont" in actor.asked


# --- commands in a guest ---


def until_end(step: Callable[[], CommandEnd | None], react: Callable[[], None]) -> CommandEnd:
    deadline = time.monotonic() + SECONDS
    while (end := step()) is None:
        assert time.monotonic() < deadline
        react()
        time.sleep(0.005)
    return end


def test_a_command_by_the_agent() -> None:
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)
        command = AgentCommand(here, "systemctl is-system-running")
        asked = []

        def agent() -> None:
            try:
                lines = there.recv(65536).splitlines()
            except BlockingIOError:
                return
            for line in lines:
                request = json.loads(line)
                asked.append(request["execute"])
                answer: Any = {
                    "guest-sync": request["arguments"].get("id"),
                    "guest-exec": {"pid": 7},
                    "guest-exec-status": {"exited": False},
                }[request["execute"]]
                if len(asked) == 4:
                    answer = {"exited": True, "exitcode": 3, "out-data": "ZGVncmFkZWQK"}
                there.sendall(json.dumps({"return": answer}).encode() + b"\n")

        assert until_end(command.step, agent) == CommandEnd(3, "degraded")
        assert asked == ["guest-sync", "guest-exec", "guest-exec-status", "guest-exec-status"]


@pytest.mark.parametrize(("password", "code"), [("right", 0), ("wrong", -1)])
def test_a_command_on_the_serial_line(password: str, code: int) -> None:
    here, there = socket.socketpair()
    with SerialLine(here) as serial, there:
        there.setblocking(False)
        command = SerialCommand(serial, LogIn("root", password), "true")
        there.sendall(b"\r\nDebian\r\n\r\nweb1 login: ")
        typed = []

        def guest() -> None:
            try:
                line = there.recv(65536).decode().strip()
            except BlockingIOError:
                return
            typed.append(line)
            if line == "root":
                there.sendall(b"root\r\nPassword: ")
            elif line == "right":
                there.sendall(b"\r\nLinux web1\r\nroot@web1:~# ")
            elif line == "wrong":
                there.sendall(b"\r\nLogin incorrect\r\nweb1 login: ")
            else:  # the shell echoes what is typed before it prints
                there.sendall(f"{line}\r\nimager-begin\r\nimager-end 0\r\nroot@web1:~# ".encode())

        end = until_end(command.step, guest)
        assert end.code == code
        assert typed[:2] == ["root", password]
