"""A medium proves itself: it boots in QEMU in each way that machines boot it.

QEMU runs headless with the medium as its only disk, opened read-only or with a throw-away overlay.
What the rescue system says goes to a file; when its ready line is there, QEMU is told to quit.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from imager.acceleration import (
    QEMU,
    acceleration_options,
    choose_acceleration,
    quit_machine,
)
from imager.errors import ImagerError, ToolError
from imager.firmware import (
    FIRMWARE_NAMES,
    OVMF,
    firmware_missing,
    firmware_options,
    machine_options,
)
from imager.jsonrecord import JsonRecord
from imager.process import find_tool, run
from imager.progress import Progress

READY = "imager-rescue: ready"
BOOT_SECONDS = 300
"""Time for one boot: some 20 s emulated on an idle machine, many times that on a loaded one."""
MEMORY = 1 << 30
"""Bytes of memory of the machine that is emulated."""

_OVMF = OVMF
_POLL_SECONDS = 0.2

# What cannot end well, so that nobody waits for the time limit.
_DEAD_ENDS = re.compile(
    r"^(?:error: (?!no suitable video mode).*"
    r"|.*(?:imager-rescue: sentinel failed|imager-rescue: the rescue system ended"
    r"|Kernel panic|grub rescue>|No bootable|Access Denied|Shell>).*)$",
    re.MULTILINE,
)
_TERMINAL_CODES = re.compile(r"\x1b(\[[0-9;?=]*[A-Za-z]|[()][A-Z0-9]|[=>])|[\r\x00]")
_SECURE_BOOT_IS_ON = re.compile(r"secure ?boot[ =:]+(on|enabled)", re.IGNORECASE)
_TAIL_LINES = 12
_LINE_LENGTH = 160


class Mode(NamedTuple):
    """A way to boot: ``firmware`` is bios, uefi or secureboot; ``bus`` is cd or usb."""

    firmware: str
    bus: str

    @property
    def name(self) -> str:
        return f"{FIRMWARE_NAMES[self.firmware]} {self.bus.upper()}"


MODES = (
    Mode("bios", "cd"),
    Mode("bios", "usb"),
    Mode("uefi", "cd"),
    Mode("uefi", "usb"),
    Mode("secureboot", "cd"),
    Mode("secureboot", "usb"),
)


@dataclass(frozen=True)
class Attempt(JsonRecord):
    """One boot. ``outcome`` is "works", "fails" or "not tried"; ``reason`` says why not."""

    mode: str
    outcome: str
    milliseconds: int = 0
    reason: str = ""
    console: tuple[str, ...] = ()
    """The end of what was on the console, after a failure."""


def check_boots(
    iso: Path,
    progress: Progress,
    *,
    modes: tuple[Mode, ...] = MODES,
    signed: bool = True,
    accel: str = "auto",
    memory: int = MEMORY,
    limit_seconds: float = BOOT_SECONDS,
) -> list[Attempt]:
    """Boot the medium in each mode, one after the other.

    ``signed``: the medium is made for Secure Boot. ``memory`` in bytes. Raises ToolError without
    QEMU, UsageError for an acceleration that is not known or does not work.
    """
    if find_tool(QEMU) is None:
        raise ToolError(
            f"{QEMU} is not installed: the medium cannot be booted here",
            hint="install QEMU (Debian: qemu-system-x86 and ovmf), or try it on a machine",
        )
    acceleration = choose_acceleration(accel)
    attempts = []
    for mode in modes:
        progress.note(f"boots by {mode.name}, accelerated by {acceleration} …")
        reason = why_not(mode, signed=signed)
        attempts.append(
            Attempt(mode.name, "not tried", reason=reason)
            if reason
            else _boot(iso, mode, acceleration, memory, limit_seconds)
        )
    return attempts


def why_not(mode: Mode, *, signed: bool = True, firmware_folder: Path = _OVMF) -> str:
    """What keeps this machine or this medium from a mode; empty when nothing does."""
    if mode.firmware == "secureboot" and not signed:
        return "the medium was built without signed boot loaders or without a signed kernel"
    return firmware_missing(mode.firmware, firmware_folder)


def _boot(iso: Path, mode: Mode, accel: str, memory: int, limit_seconds: float) -> Attempt:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="imager-check-") as name:
        scratch = Path(name)
        command = _machine(iso, mode, accel, memory, scratch)
        with _running(command, scratch, limit_seconds) as machine:
            reason = _wait_for_ready(machine, started + limit_seconds)
        text = machine.console()
    took = round((time.monotonic() - started) * 1000)
    if not reason and mode.firmware == "secureboot" and not _SECURE_BOOT_IS_ON.search(text):
        reason = "it booted, but did not say that Secure Boot is on"
    if reason:
        return Attempt(mode.name, "fails", took, reason, tuple(_last_lines(text)))
    return Attempt(mode.name, "works", took)


def _last_lines(text: str) -> list[str]:
    """Of the console, without the frames and blanks of GRUB's menu."""
    lines = ["".join(filter(str.isprintable, line)).strip() for line in text.splitlines()]
    return [line[:_LINE_LENGTH] for line in lines if any(map(str.isalnum, line))][-_TAIL_LINES:]


class _Machine:
    """QEMU, run by a thread that keeps its error for the one who asks."""

    def __init__(self, command: list[str], log: Path, monitor: Path, limit_seconds: float) -> None:
        self._log, self.monitor = log, monitor
        self.error: ImagerError | None = None
        self.thread = threading.Thread(target=self._run, args=(command, limit_seconds))

    def console(self) -> str:
        try:
            return _TERMINAL_CODES.sub("", self._log.read_text(errors="replace"))
        except FileNotFoundError:
            return ""

    def _run(self, command: list[str], limit_seconds: float) -> None:
        try:
            run(command, timeout_seconds=limit_seconds)
        except ImagerError as error:
            self.error = error


@contextmanager
def _running(command: list[str], scratch: Path, limit_seconds: float) -> Iterator[_Machine]:
    # The time limit of its own is for a QEMU that does not listen any more.
    machine = _Machine(command, scratch / "console", scratch / "monitor", limit_seconds + 5)
    machine.thread.start()
    try:
        yield machine
    finally:
        while machine.thread.is_alive():
            quit_machine(machine.monitor)
            machine.thread.join(_POLL_SECONDS)


def _wait_for_ready(machine: _Machine, deadline: float) -> str:
    """Empty when the ready line came, else what came instead."""
    while True:
        alive = machine.thread.is_alive()
        text = machine.console()
        if READY in text:
            return ""
        if dead_end := _DEAD_ENDS.search(text):
            return f"the console says: {dead_end.group().strip()}"
        if not alive:
            return machine.error.message if machine.error else "the machine switched itself off"
        if time.monotonic() > deadline:
            return f"no line '{READY}' in time"
        time.sleep(_POLL_SECONDS)


def _machine(iso: Path, mode: Mode, accel: str, memory: int, scratch: Path) -> list[str]:
    return [
        # The kernel ends QEMU when the thread that started it dies, however it dies.
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *(QEMU, *acceleration_options(accel)),
        *machine_options(mode.firmware, "graphics=off"),
        *("-smp", "2", "-m", f"{memory >> 20}M", "-nodefaults", "-display", "none"),
        *("-serial", f"file:{scratch / 'console'}", "-no-reboot"),
        *("-monitor", f"unix:{scratch / 'monitor'},server=on,wait=off"),
        *_drive(iso, mode),
        *firmware_options(mode.firmware, scratch / "variables", _OVMF),
    ]


def _drive(iso: Path, mode: Mode) -> list[str]:
    path = str(iso).replace(",", ",,")  # a comma ends a value for QEMU
    if mode.bus == "cd":
        drive = f"if=none,id=medium,format=raw,media=cdrom,readonly=on,file={path}"
        return ["-drive", drive, "-device", "ide-cd,bus=ide.0,drive=medium,bootindex=0"]
    drive = f"if=none,id=medium,format=raw,snapshot=on,file={path}"
    stick = "usb-storage,drive=medium,bootindex=0,removable=on"
    return ["-drive", drive, "-device", "qemu-xhci", "-device", stick]
