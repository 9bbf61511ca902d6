"""This terminal as the terminal of a virtual machine's serial line."""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imager.machine import Machine

_CUT_OFF = b"\x1d"  # Ctrl-]
_LOOK_SECONDS = 0.1


@contextmanager
def connected(machine: Machine, wanted: bool) -> Iterator[None]:
    """Show what the machine says and type what is typed, until the block ends."""
    if not wanted:
        yield
        return
    done = threading.Event()
    threads = [
        threading.Thread(target=_show, args=(machine, done), daemon=True),
        threading.Thread(target=_type, args=(machine, done), daemon=True),
    ]
    with _raw_terminal():
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the machine, Ctrl-C too; nothing changes where there is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _show(machine: Machine, done: threading.Event) -> None:
    shown = 0
    while True:
        is_last = done.is_set()
        content = machine.serial.raw()
        os.write(sys.stdout.fileno(), content[shown:])
        shown = len(content)
        if is_last:
            return
        done.wait(_LOOK_SECONDS)


def _type(machine: Machine, done: threading.Event) -> None:
    while not done.is_set():
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], _LOOK_SECONDS)
        if readable:
            content = os.read(sys.stdin.fileno(), 4096)
            if not content:
                return
            before, cut, _ = content.partition(_CUT_OFF)
            machine.serial.send(before)
            if cut:
                machine.cut_off()
                return
