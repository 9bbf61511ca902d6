"""Rescue media for the tests, and a person at their menu."""

from __future__ import annotations

import re
from pathlib import Path

from tests.machines.guest import debian_kernel
from tests.machines.qemu import Machine
from tests.support.commandline import imager_alone

# Whole lines: the end of one may come later than its start.
READY = r"imager-rescue: ready .*\n"
RESULT = r"imager-rescue: result exit=(\d+) .*\n"
READY_SECONDS = 300
"""15 to 25 s on an idle machine of two cores, several times that on a loaded one."""

MENU = r"menu, 1 to 9 \(Enter: show it\)\? "
CHOICE = r"which one \(Enter: back\)\? "
YES_NO = r"\[y/N\] "
TARGET_NAME = r"type the name of the target \((\S+)\): "


def build(out: Path, *options: str | Path) -> Path:
    """A medium with Debian's kernel, and all drivers: the virtual machine isn't this one."""
    imager_alone("media", "build", out, "--modules-dir", debian_kernel(), *options)
    return out


class Person:
    """Types at the menu on the serial line, each answer after its question."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._at = 0

    def wait_until_ready(self) -> str:
        """The line that says so."""
        self.machine.expect(READY, timeout_seconds=READY_SECONDS)
        return re.findall(READY, self.machine.log)[-1]

    def answer(self, question: str, text: str, *, seconds: float = 120) -> None:
        self.see(question, seconds=seconds)
        self.machine.send(text)

    def see(self, pattern: str, *, seconds: float = 120) -> str:
        """Wait for it behind what was seen before; returns its first group, or all of it."""
        found = self.look(pattern, seconds=seconds)
        return str(found[1] if found.re.groups else found[0])

    def look(self, pattern: str, *, seconds: float = 120) -> re.Match[str]:
        """As ``see``, with all groups."""
        begun = self._at
        self._at = self.machine.expect(pattern, timeout_seconds=seconds, after=begun)
        found = re.compile(pattern).search(self.machine.log, begun)
        assert found is not None
        return found

    def restore(self, target: str = "1", *, seconds: float = 600) -> str:
        """The first image onto a target, by the menu; returns what was said up to the question
        for a restart."""
        self.choose_restore(target)
        name = self.see(TARGET_NAME, seconds=seconds)
        begun = self._at
        self.machine.send(name)
        self.see(r"restart now\? ", seconds=seconds)
        return self.machine.log[begun : self._at]

    def choose_restore(self, target: str = "1") -> None:
        """Up to the plan."""
        self.answer(MENU, "1")
        self.answer(CHOICE, "1")
        self.answer(CHOICE, target)
        for _ in ("grow", "delta", "read back"):
            self.answer(YES_NO, "n")
