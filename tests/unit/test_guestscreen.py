"""Screens as text: the VGA card's memory, and the kernel's buffer found in a machine's memory."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from imager.guestscreen import console_texts, picture_width, text_mode_text

PAGE = 4096
LINES = ["Debian GNU/Linux 12 web1 tty1", "", "web1 login: "]


def cells(lines: list[str], columns: int, rows: int, colours: int = 7) -> bytes:
    text = "".join(line.ljust(columns) for line in lines).ljust(columns * rows)
    return b"".join(bytes((letter, colours)) for letter in text.encode("cp437"))


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 64 << 20)
    yield descriptor
    os.close(descriptor)


def test_text_mode() -> None:
    screen = cells(LINES, 80, 25).ljust(0x8000, b"\0")
    assert text_mode_text(screen) == "Debian GNU/Linux 12 web1 tty1\n\nweb1 login:"
    assert text_mode_text(b"\xff" * 0x8000) == ""
    assert text_mode_text(random.Random(1).randbytes(0x8000)) == ""
    assert text_mode_text(b"") == ""


@pytest.mark.parametrize(("columns", "rows"), [(80, 25), (128, 48), (160, 50), (240, 67)])
def test_a_console_in_memory(memory: int, columns: int, rows: int) -> None:
    noise = random.Random(2).randbytes(1 << 20)
    os.pwrite(memory, noise, 0)
    os.pwrite(memory, cells(LINES, columns, rows), 40 * PAGE)
    os.pwrite(memory, noise[: -(-columns * rows * 2 // PAGE) * 7], 40 * PAGE + columns * rows * 2)
    os.pwrite(memory, noise, 8 << 20)
    assert console_texts(memory, columns * 8) == ["Debian GNU/Linux 12 web1 tty1\n\nweb1 login:"]


def test_two_consoles(memory: int) -> None:
    os.pwrite(memory, cells(["one"], 80, 25), 10 * PAGE)
    os.pwrite(memory, cells(["two"], 80, 25, colours=0x0F), 30 * PAGE)
    assert console_texts(memory, 640) == ["one", "two"]


def test_memory_that_holds_no_console(memory: int) -> None:
    assert console_texts(memory, 640) == []
    os.pwrite(memory, b"a" * (1 << 20), 0)  # a text, and no cells of it
    os.pwrite(memory, b"\x20\x07" * 500, 2 << 20)  # too small
    assert console_texts(memory, 640) == []


def test_the_width_of_a_picture() -> None:
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (1280).to_bytes(4, "big") + bytes(9)
    assert picture_width(header) == 1280
    assert picture_width(None) == picture_width(b"no picture") == 640
