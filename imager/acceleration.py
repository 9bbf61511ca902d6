"""How QEMU runs a machine here: by the processor (KVM) where that works, else emulated."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from imager.errors import UsageError
from imager.process import run

QEMU = "qemu-system-x86_64"
ACCELERATIONS = ("auto", "kvm", "tcg")

_DEVICE = Path("/dev/kvm")
_PROBE_SECONDS = 10.0
_POLL_SECONDS = 0.1
# A probe that hangs takes long and leaves a process behind: once is enough until the next boot.
_REMEMBERED = Path("/run/imager/kvm")


def choose_acceleration(wanted: str) -> str:
    """``kvm`` or ``tcg``. Raises UsageError when kvm is asked for and does not work."""
    if wanted not in ACCELERATIONS:
        raise UsageError(f"--accel {wanted}: it can be {', '.join(ACCELERATIONS)}")
    if wanted == "tcg":
        return "tcg"
    if _kvm_works_here():
        return "kvm"
    if wanted == "kvm":
        raise UsageError("kvm does not run a machine here", hint="use --accel tcg")
    return "tcg"


def acceleration_options(acceleration: str) -> list[str]:
    """QEMU's, for what ``choose_acceleration`` chose."""
    return ["-accel", "tcg,thread=multi" if acceleration == "tcg" else acceleration, "-cpu", "max"]


def _kvm_works_here() -> bool:
    """As ``kvm_works``, found out once since this machine booted."""
    with suppress(OSError):
        return _REMEMBERED.read_text() == "works\n"
    works = kvm_works(_DEVICE)
    with suppress(OSError):
        _REMEMBERED.parent.mkdir(exist_ok=True)
        _REMEMBERED.write_text("works\n" if works else "does not work\n")
    return works


def kvm_works(device: Path = _DEVICE) -> bool:
    """Whether a machine really runs with KVM; on some hosts the first call into it never returns.

    So QEMU is started apart from this process, and nobody waits for its end: the firmware has some
    seconds to say its first word on its debug port.
    """
    if not os.access(device, os.R_OK | os.W_OK):
        return False
    with tempfile.TemporaryDirectory(prefix="imager-kvm-") as name:
        said, monitor = Path(name) / "said", Path(name) / "monitor"
        machine = [
            # The processor of the real machines: hosts were seen where another one works.
            *(QEMU, *acceleration_options("kvm"), "-machine", "q35", "-m", "64", "-nodefaults"),
            *("-display", "none", "-chardev", f"file,id=word,path={said}"),
            *("-device", "isa-debugcon,iobase=0x402,chardev=word"),
            *("-monitor", f"unix:{monitor},server=on,wait=off"),
        ]
        run([sys.executable, "-c", _START_APART, str(int(_PROBE_SECONDS)), *machine])
        deadline = time.monotonic() + _PROBE_SECONDS
        while time.monotonic() < deadline:
            if said.exists() and said.stat().st_size:
                quit_machine(monitor)
                return True
            time.sleep(_POLL_SECONDS)
    return False


def quit_machine(monitor: Path) -> None:
    """Tell QEMU to end, by the socket of its human monitor; nothing happens if it is gone."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        connection.connect(str(monitor))
        connection.sendall(b"quit\n")
        connection.recv(1 << 12)


# A session of its own and no pipes of ours; what can still be ended ends by an alarm signal.
_START_APART = """
import os, signal, sys
if os.fork():
    os._exit(0)
os.setsid()
quiet = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(quiet, number)
signal.alarm(int(sys.argv[1]))
try:
    os.execvp(sys.argv[2], sys.argv[2:])
finally:
    os._exit(1)
"""
