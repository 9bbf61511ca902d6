"""A terminal of the rescue system, on a pseudo-terminal; and which consoles there are."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bootmedia.guest.coldplug import added_modalias
from bootmedia.guest.console import Terminal, TerminalLost, progress_text, terminal_names
from bootmedia.guest.system import kernel_argument


class Wire(NamedTuple):
    """A terminal, and the end where the person sits."""

    terminal: Terminal
    person: int

    def type(self, keys: bytes) -> None:
        os.write(self.person, keys)

    def seen(self, length: int) -> bytes:
        """As many bytes of the screen: the kernel hands them over in pieces."""
        content = b""
        while len(content) < length:
            assert select.select([self.person], [], [], 60)[0], content
            content += os.read(self.person, length - len(content))
        return content


@pytest.fixture
def wire() -> Iterator[Wire]:
    person, device = os.openpty()
    with Terminal(os.ttyname(device)) as terminal:
        os.close(device)
        yield Wire(terminal, person)
    os.close(person)


def test_a_line_is_edited_with_the_usual_keys(wire: Wire) -> None:
    wire.type(b"wrong\x15sdx\x7fa\r")
    assert wire.terminal.ask("disk? ") == "sda"
    assert wire.seen(11) == b"disk? wrong"


def test_a_character_of_two_bytes_is_erased_as_one(wire: Wire) -> None:
    wire.type("aé\x7fb\r".encode())
    assert wire.terminal.ask("") == "ab"


def test_ctrl_c_interrupts_a_question(wire: Wire) -> None:
    wire.type(b"abc\x03")
    with pytest.raises(KeyboardInterrupt):
        wire.terminal.ask("")


def test_ctrl_c_interrupts_work_and_other_keys_do_not(wire: Wire) -> None:
    wire.type(b"xyz")
    wire.terminal.check_interrupt()
    wire.type(b"x\x03")
    with pytest.raises(KeyboardInterrupt):
        wire.terminal.check_interrupt()


def test_lines_end_with_a_carriage_return_too(wire: Wire) -> None:
    wire.terminal.line("hello")
    assert wire.seen(7) == b"hello\r\n"


def test_a_line_without_a_size_gets_one(wire: Wire) -> None:
    size = fcntl.ioctl(wire.person, termios.TIOCGWINSZ, bytes(8))
    assert struct.unpack("4H", size)[:2] == (24, 80)


def test_a_line_that_hangs_up_is_lost() -> None:
    person, device = os.openpty()
    with Terminal(os.ttyname(device)) as terminal:
        os.close(device)
        os.close(person)
        with pytest.raises(TerminalLost):
            terminal.ask("")


def test_consoles_are_the_screen_what_the_kernel_was_told_and_ports_with_a_chip(
    tmp_path: Path,
) -> None:
    ttys = tmp_path / "sys/class/tty"
    for name, kind in (("ttyS0", "4"), ("ttyS1", "0"), ("ttyS2", "4")):
        (ttys / name).mkdir(parents=True)
        (ttys / name / "type").write_text(f"{kind}\n")
    (ttys / "console").mkdir()
    (ttys / "console/active").write_text("tty0 hvc0 ttyS0\n")
    assert terminal_names(tmp_path) == ["tty1", "hvc0", "ttyS0", "ttyS2"]


def test_progress_fits_a_line() -> None:
    text = progress_text("restoring", 1 << 30, 4 << 30, 10)
    assert text == "restoring  25% 1.0 GiB of 4.0 GiB, 102 MiB/s, 0:30 left"
    assert len(progress_text("x" * 200, 1, 2, 3)) == 79


def test_kernel_argument() -> None:
    line = "quiet imager.medium=first myimager.medium=other imager.medium=0123"
    assert kernel_argument("imager.medium", line) == "0123"
    assert kernel_argument("imager.med", line) is None


def test_an_event_names_the_driver_of_a_device_that_came() -> None:
    event = b"add@/devices/pci0/usb1\0ACTION=add\0DEVPATH=/devices/x\0MODALIAS=usb:v1234\0"
    assert added_modalias(event) == "usb:v1234"
    assert added_modalias(event.replace(b"ACTION=add", b"ACTION=remove")) is None
    assert added_modalias(b"libudev\0\xfe\xed\xca\xfe") is None
