"""Terminals: the screen and every serial line that works, each with a person perhaps before it.

The kernel's /dev/console is not used: when its last ``console=`` names a serial port that the
machine lacks, nothing written there is seen. Each terminal is opened by itself, and one that fails
is left alone (a serial port without a chip answers EIO).

Ctrl-C is no signal here, since several terminals share one process: while a terminal asks, and
whenever work reports progress, the key raises KeyboardInterrupt in the thread of that terminal.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Self

from imager.errors import ImagerError
from imager.process import attend
from imager.sysfs import entries, read_number, read_text
from imager.units import show_bytes

_CTRL_C, _CTRL_D, _CTRL_U = b"\x03", b"\x04", b"\x15"
_ERASERS = (b"\x7f", b"\x08")
_ENTERS = (b"\r", b"\n")

# A serial line says nothing about its size.
_ROWS, _COLUMNS = 24, 80

_REDRAW_SECONDS = 0.5


class Terminal:
    """One terminal, used by one thread. A line that breaks off raises TerminalLost."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = Path(path).name
        self._last_key = b""
        self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            self._set_up()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _set_up(self) -> None:
        """No echo and no line editing by the kernel; output as usual."""
        settings = termios.tcgetattr(self._fd)
        settings[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
        # IXON: one byte of line noise (Ctrl-S) would stop all output for ever.
        settings[0] &= ~(termios.IXON | termios.ICRNL | termios.INLCR)
        settings[1] |= termios.OPOST | termios.ONLCR
        # Serial: no modem lines, a cable may have three wires.
        settings[2] |= termios.CLOCAL | termios.CREAD
        termios.tcsetattr(self._fd, termios.TCSANOW, settings)
        size = fcntl.ioctl(self._fd, termios.TIOCGWINSZ, bytes(8))
        if struct.unpack("4H", size)[:2] == (0, 0):
            fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", _ROWS, _COLUMNS, 0, 0))

    # --- output ---

    def write(self, text: str) -> None:
        """Text with newlines; nothing is added."""
        self._send(text.encode(errors="replace"))

    def _send(self, content: bytes) -> None:
        while content:
            try:
                content = content[os.write(self._fd, content) :]
            except OSError as error:
                raise TerminalLost(f"{self.path}: {error.strerror}") from None

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    # --- input ---

    def ask(self, prompt: str) -> str:
        """One line, edited with the usual keys. Raises KeyboardInterrupt for Ctrl-C."""
        self.write(prompt)
        typed = bytearray()
        while True:
            key, before = self._read_key(), self._last_key
            self._last_key = key
            if key == b"\n" and before == b"\r":
                continue  # the second half of a line end
            if key in _ENTERS:
                self.write("\n")
                return typed.decode(errors="replace").strip()
            if key in (_CTRL_C, _CTRL_D):
                self.write("^C\n")
                raise KeyboardInterrupt
            if key in _ERASERS and typed:
                self.write("\b \b" * _drop_character(typed))
            elif key == _CTRL_U:
                self.write("\b \b" * len(typed.decode(errors="replace")))
                typed.clear()
            elif key >= b" " and key not in _ERASERS:
                typed += key
                self._send(key)

    def wait_for_key(self, seconds: float) -> bool:
        """Whether a key was pressed in time; the key is used up."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        self._read_key()
        return True

    def check_interrupt(self) -> None:
        """Raises KeyboardInterrupt when Ctrl-C was typed; drops what else was."""
        while select.select([self._fd], [], [], 0)[0]:
            if self._read_key() == _CTRL_C:
                self.write("^C\n")
                raise KeyboardInterrupt

    def _read_key(self) -> bytes:
        try:
            key = os.read(self._fd, 1)
        except OSError as error:
            raise TerminalLost(f"{self.path}: {error.strerror}") from None
        if not key:
            raise TerminalLost(f"{self.path}: hung up")
        return key

    # --- others on this terminal ---

    def progress(self) -> TerminalProgress:
        return TerminalProgress(self)

    def shell(self) -> int:
        """A shell with job control, until it ends. Returns its exit code."""
        before = termios.tcgetattr(self._fd)
        usual = [*before]
        usual[3] |= termios.ECHO | termios.ICANON | termios.ISIG
        termios.tcsetattr(self._fd, termios.TCSANOW, usual)
        try:
            return attend(["setsid", "-c", "/bin/sh", "-l"], self._fd)
        finally:
            termios.tcsetattr(self._fd, termios.TCSANOW, before)


class TerminalLost(ImagerError):
    """The screen or serial line is gone: its thread ends, the others go on."""


class TerminalProgress:
    """A line with share, rate and time left, drawn anew now and then; see ``Progress``."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._label, self._total, self._done = "", 0, 0
        self._begun = self._drawn = monotonic()
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def start(self, label: str, total: int) -> None:
        self._finish()
        self._label, self._total, self._done = label, total, 0
        self._begun = monotonic()
        self._draw()

    def advance(self, amount: int) -> None:
        """Raises KeyboardInterrupt when Ctrl-C was typed."""
        self._done += amount
        if monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._terminal.check_interrupt()
            self._draw()

    def note(self, message: str) -> None:
        self._finish()
        self._terminal.line(message)

    def _draw(self) -> None:
        self._drawn = monotonic()
        text = progress_text(self._label, self._done, self._total, self._drawn - self._begun)
        self._terminal.write("\r" + text.ljust(self._width))
        self._width = len(text)

    def _finish(self) -> None:
        """Leave the line as it ends."""
        if self._label:
            self._draw()
            self._terminal.line()
        self._label, self._width = "", 0


def progress_text(label: str, done: int, total: int, seconds: float) -> str:
    """For people, within 80 columns. Bytes."""
    share = f"{100 * done // total:3d}%" if total else "    "
    amount = f"{show_bytes(done)} of {show_bytes(total)}" if total else show_bytes(done)
    parts = [f"{label} {share} {amount}"]
    if seconds >= 1 and done:
        rate = done / seconds
        parts.append(f"{show_bytes(int(rate))}/s")
        if done < total:
            left = int((total - done) / rate)
            parts.append(f"{left // 60}:{left % 60:02d} left")
    return ", ".join(parts)[: _COLUMNS - 1]


def open_terminals() -> Iterator[Terminal]:
    """The screen, then serial lines; those that do not work are left out."""
    for name in terminal_names():
        with suppress(OSError, termios.error):
            yield Terminal(f"/dev/{name}")


def terminal_names(sys_root: Path = Path("/")) -> list[str]:
    """tty1 for the screen, consoles that the kernel was told of, serial ports with a chip."""
    ttys = sys_root / "sys/class/tty"
    told = (read_text(ttys / "console/active") or "").split()
    ports = [
        entry.name
        for entry in entries(ttys)
        if entry.name.startswith("ttyS") and read_number(entry / "type")  # 0: nothing there
    ]
    names = ["tty1", *(name for name in told if not name.startswith("tty0")), *ports]
    return list(dict.fromkeys(names))


def _drop_character(typed: bytearray) -> int:
    """Remove the last character, of one byte or more. Returns 1, the columns it took."""
    while typed and typed[-1] & 0xC0 == 0x80:
        typed.pop()
    if typed:
        typed.pop()
    return 1
