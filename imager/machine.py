"""A running virtual machine: its control line, serial line, screen and memory."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from imager.errors import ToolError
from imager.process import Companion, beside
from imager.qemu import Drive, Hardware, NetworkKind, Wiring, command_line
from imager.qmp import ControlLine, Event
from imager.serialline import SerialLine

# IBM VGA: the memory of text modes, a character and its colours in turn.
_TEXT_MEMORY = 0xB8000
_TEXT_BYTES = 0x8000

_END_SECONDS = 10.0


@dataclass(frozen=True)
class MachineJob:
    """Everything that a machine is told."""

    hardware: Hardware
    drives: tuple[Drive, ...]
    acceleration: str
    network: NetworkKind = "none"
    forwards: tuple[tuple[int, int], ...] = ()
    agent: bool = False
    display: str = "none"


class Machine:
    """See ``running_machine``."""

    def __init__(
        self,
        process: Companion,
        control: ControlLine,
        serial: SerialLine,
        memory: int,
        agent: socket.socket | None,
        scratch: Path,
    ) -> None:
        self.control = control
        self.serial = serial
        self.memory = memory
        """An open file, the machine's memory; its holes were never touched."""
        self.agent = agent
        self.was_cut_off = False
        self._process = process
        self._scratch = scratch

    @property
    def ended(self) -> bool:
        """Whether it is gone, and everything that it said before is here."""
        return self.control.ended

    def events(self) -> list[Event]:
        """What has happened since the last call."""
        return self.control.take_events()

    def failure(self) -> str:
        """What QEMU itself said, after an end that nobody asked for."""
        self._process.wait(_END_SECONDS)
        return self._process.said()

    def screenshot(self) -> bytes | None:
        """The screen as a PNG; None when the machine has ended."""
        file = self._scratch / "screen.png"
        try:
            self.control.execute("screendump", filename=str(file), format="png")
            return file.read_bytes()
        except (ToolError, OSError):
            return None
        finally:
            file.unlink(missing_ok=True)

    def text_memory(self) -> bytes:
        """The memory of the screen's text mode; noise in graphics modes, nothing after the end."""
        file = self._scratch / "text"
        try:
            self.control.execute("pmemsave", val=_TEXT_MEMORY, size=_TEXT_BYTES, filename=str(file))
            return file.read_bytes()
        except (ToolError, OSError):
            return b""
        finally:
            file.unlink(missing_ok=True)

    def cut_off(self) -> None:
        """Pull the plug; may be called from any thread."""
        self.was_cut_off = True
        self._process.kill()

    def power_down(self) -> None:
        """Press the power button."""
        self.control.execute("system_powerdown")


@contextmanager
def running_machine(job: MachineJob, *, variables: Path | None = None) -> Iterator[Machine]:
    """Start a machine; it is cut off at the end of the block if it still runs.

    ``variables`` keeps the variables of UEFI firmware. Raises ToolError with QEMU's words when it
    does not start.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imager-machine-")))
        memory = stack.enter_context(_memory_file())
        control_here, control_there = _pair(stack)
        serial_here, serial_there = _pair(stack)
        agent_here, agent_there = _pair(stack) if job.agent else (None, None)
        wiring = Wiring(
            control=control_there.fileno(),
            serial=serial_there.fileno(),
            memory=memory,
            agent=agent_there.fileno() if agent_there else None,
            network=job.network,
            forwards=job.forwards,
            display=job.display,
        )
        command = command_line(
            job.hardware,
            job.drives,
            wiring,
            acceleration=job.acceleration,
            variables=variables or scratch / "variables",
        )
        ends = [end for end in (control_there, serial_there, agent_there) if end is not None]
        control = ControlLine(control_here)
        process = stack.enter_context(
            beside(command, inherit=[*(end.fileno() for end in ends), memory])
        )
        for end in ends:
            end.close()  # so that the lines end with the machine
        stack.enter_context(control)
        serial = stack.enter_context(SerialLine(serial_here))
        try:
            control.begin()
        except ToolError:
            process.wait(_END_SECONDS)
            raise ToolError(f"QEMU does not start the machine: {process.said()}") from None
        yield Machine(process, control, serial, memory, agent_here, scratch)


@contextmanager
def _memory_file() -> Iterator[int]:
    descriptor = os.memfd_create("imager-machine")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    here, there = socket.socketpair()
    stack.enter_context(closing(here))
    stack.enter_context(closing(there))
    return here, there
