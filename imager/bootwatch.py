"""Watching a machine boot, until it has proved that it does or shows that it will not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from imager.bootsigns import LOGIN, Sign, find_dead_end, stopped_in_first_stage, target_reached
from imager.errors import ToolError
from imager.guestcommand import AgentCommand, LogIn, SerialCommand
from imager.guestport import GuestPort
from imager.guestscreen import console_texts, picture_width, text_mode_text
from imager.machine import Machine
from imager.proofs import Evidence
from imager.qmp import Event

_LOOK_SECONDS = 0.5
# What follows a dead end's first words belongs into the evidence.
_SETTLE_SECONDS = 3.0
# A machine that restarts once or twice may have had a reason (a new label, a firmware's entry).
_MOST_RESETS = 3
# Much more than it takes to read GRUB's core, emulated on a loaded machine.
_STALL_SECONDS = 40.0
# Searching the memory takes up to a second: it is done for a small part of the time.
_SEARCH_SECONDS = 5.0
_SEARCH_SHARE = 0.1


@dataclass(frozen=True)
class Outcome:
    """``cause`` is a word for programs, empty when it is proved."""

    proved: bool
    cause: str = ""
    reason: str = ""


Check = Callable[[], Outcome | None]


def watch(
    machine: Machine, sign: Sign, *, timeout_seconds: float, login: LogIn | None = None
) -> tuple[Outcome, Evidence]:
    """Wait for the sign, a dead end, the machine's end or the end of the time."""
    with ExitStack() as stack:
        screen = _Screen(machine)
        check = _check_of(sign, machine, screen, login, stack)
        outcome = _Watch(machine, screen, sign, check, timeout_seconds).run()
        return outcome, screen.evidence()


class _Screen:
    """What can be read of a machine, kept for when it is gone."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._text = ""
        self._consoles: list[str] = []
        self._picture: bytes | None = None
        self._next_search = 0.0

    def look(self, *, closely: bool = False) -> None:
        """Read the screen; ``closely`` also its picture and what the memory holds of it."""
        self._text = text_mode_text(self._machine.text_memory()) or self._text
        started = time.monotonic()
        if closely or started >= self._next_search:
            self._picture = self._machine.screenshot() or self._picture
            width = picture_width(self._picture)
            self._consoles = console_texts(self._machine.memory, width) or self._consoles
            took = time.monotonic() - started
            self._next_search = started + max(_SEARCH_SECONDS, took / _SEARCH_SHARE)

    @property
    def text(self) -> str:
        """Of the text mode."""
        return self._text

    def texts(self) -> Iterator[str]:
        """All that the machine says, the serial line first."""
        yield self._machine.serial.text()
        yield self._text
        yield from self._consoles

    def evidence(self) -> Evidence:
        serial, *screens = (text.rstrip() for text in self.texts())
        parts = [serial, *(f"--- screen ---\n{text}" for text in screens if text.strip())]
        return Evidence("\n\n".join(filter(None, parts)), self._picture)


@dataclass
class _Watch:
    machine: Machine
    screen: _Screen
    sign: Sign
    check: Check
    timeout_seconds: float
    resets: int = 0
    shutdown: str = ""
    trouble: Outcome | None = None
    stalled: tuple[str, float] = field(default=("", 0.0))

    def run(self) -> Outcome:
        started = time.monotonic()
        while True:
            ended = self.machine.ended  # first: what came before the end is all seen below
            outcome = self._look(ended)
            if outcome is not None:
                return outcome
            if time.monotonic() - started > self.timeout_seconds:
                return self._too_late()
            self.machine.control.wait_for_end(_LOOK_SECONDS)

    def _look(self, ended: bool) -> Outcome | None:
        for event in self.machine.events():
            self._take(event)
        if not ended:
            self.screen.look()
        try:
            outcome = self.check()
        except ToolError:
            outcome = None  # the machine has just ended
        if outcome is not None:
            self.screen.look(closely=True)
            return outcome
        found = self.trouble or self._dead_end(ended) or (self._end() if ended else None)
        return found or self._stall()

    def _take(self, event: Event) -> None:
        if event.name == "RESET" and event.data.get("guest"):
            self.resets += 1
            if self.resets > _MOST_RESETS:
                words = f"the machine resets again and again ({self.resets} times)"
                self.trouble = Outcome(False, "reset-loop", words)
        elif event.name == "SHUTDOWN":
            self.shutdown = str(event.data.get("reason", ""))
        elif event.name == "BLOCK_IO_ERROR":
            where = "the host's disk is full" if event.data.get("nospace") else "a disk error"
            words = f"{where}: {event.data.get('reason', 'I/O error')} ({event.data.get('device')})"
            self.trouble = Outcome(False, "disk-error", words)

    def _dead_end(self, ended: bool) -> Outcome | None:
        if not any(map(find_dead_end, self.screen.texts())):
            return None
        if not ended:
            self.machine.control.wait_for_end(_SETTLE_SECONDS)
            self.screen.look(closely=True)
        for text in self.screen.texts():
            found = find_dead_end(text)
            if found:
                return Outcome(False, found[0].kind, found[1])
        return None

    def _end(self) -> Outcome:
        if self.shutdown == "guest-shutdown":
            return Outcome(False, "power-off", "the machine switched itself off")
        if self.shutdown:
            return Outcome(False, "ended", f"the machine ended: {self.shutdown}")
        said = self.machine.failure() or "QEMU ended by itself"
        return Outcome(False, "ended", f"the machine ended: {said}")

    def _stall(self) -> Outcome | None:
        """A first stage of a boot loader that jumped to nothing."""
        text, since = self.stalled
        if self.screen.text != text:
            self.stalled = (self.screen.text, time.monotonic())
        elif stopped_in_first_stage(text) and time.monotonic() - since > _STALL_SECONDS:
            return Outcome(False, "grub-core", "GRUB's first stage finds no core image")
        return None

    def _too_late(self) -> Outcome:
        self.screen.look(closely=True)
        last = _last_line(list(self.screen.texts()))
        words = f"no sign of {self.sign} in {self.timeout_seconds:.0f} s"
        return Outcome(False, "timeout", f"{words}; the last line: {last}" if last else words)


def _last_line(texts: list[str]) -> str:
    lines = [line.strip() for text in texts for line in text.splitlines()[-1:]]
    return next(filter(None, lines), "")


def _check_of(
    sign: Sign, machine: Machine, screen: _Screen, login: LogIn | None, stack: ExitStack
) -> Check:
    """What to ask again and again whether the sign is there."""
    if sign.kind == "port":
        port = stack.enter_context(GuestPort(machine.control, sign.port))
        return lambda: Outcome(True) if port.is_open() else None
    if sign.kind == "command":
        return _command_check(sign.value, machine, login)
    pattern = LOGIN if sign.kind == "login" else target_reached(sign.value)
    return lambda: Outcome(True) if any(map(pattern.search, screen.texts())) else None


def _command_check(command: str, machine: Machine, login: LogIn | None) -> Check:
    ways: list[AgentCommand | SerialCommand] = []
    if machine.agent is not None:
        ways.append(AgentCommand(machine.agent, command))
    if login is not None:
        ways.append(SerialCommand(machine.serial, login, command))

    def check() -> Outcome | None:
        for way in ways:
            end = way.step()
            if end is not None and end.code == 0:
                return Outcome(True)
            if end is not None:
                words = f"the command ended with {end.code} in the guest: {end.output[-500:]}"
                return Outcome(False, "command", words)
        return None

    return check
