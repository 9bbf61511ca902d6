"""Boot a disk image in QEMU and talk with it over the serial line.

Software emulation only, so that it works on any machine; the disk is opened with a throw-away
overlay and is never changed.

    python -m tests.machines.qemu DISK.img [--firmware bios|uefi] [--bus virtio|sata|scsi|nvme|usb]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal, Self

from tests.machines.debian_disk import BOOT_MARKER, ROOT_PASSWORD

Firmware = Literal["bios", "uefi"]
Bus = Literal["virtio", "sata", "scsi", "nvme", "usb"]

BOOT_SECONDS = 300
"""A boot takes about 30 s emulated on an idle machine, several times that on a loaded one."""

_OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
_OVMF_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")

_DEVICES: dict[Bus, tuple[str, ...]] = {
    "virtio": ("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
    "sata": ("-device", "ide-hd,bus=ide.0,drive=disk,bootindex=0"),
    "scsi": ("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk,bootindex=0"),
    "nvme": ("-device", "nvme,serial=imager,drive=disk,bootindex=0"),
    "usb": ("-device", "qemu-xhci", "-device", "usb-storage,drive=disk,bootindex=0"),
}

# Colours, cursor moves and the rest of what GRUB and OVMF send to a terminal.
_TERMINAL_CODES = re.compile(r"\x1b(\[[0-9;?=]*[A-Za-z]|[()][A-Z0-9]|[=>])|\r")

_KERNEL_LINE = re.compile(r"\[ *\d+\.\d+\] ")
_DEAD_ENDS = re.compile(
    r"(?:GRUB ){3}|Kernel panic|emergency mode|\(initramfs\)|grub rescue>|grub>|GRUB.*error:|Shell>"
    r"|No bootable (?:device|option)|Give root password for maintenance"
)
_TAIL_LINES = 30


class BootFailed(Exception):
    """The machine did not come to what was awaited; the message has the end of its console."""


class Machine:
    """A running virtual machine with one disk. Leaving the ``with`` block kills it.

    ``log`` is everything it said on the serial line so far, without terminal codes.
    """

    def __init__(
        self,
        disk: Path,
        *,
        firmware: Firmware = "bios",
        bus: Bus = "virtio",
        memory_mib: int = 1024,
        cpus: int = 2,
        extra: tuple[str, ...] = (),
    ) -> None:
        self._command = [
            # The kernel kills QEMU when this process dies, however it dies.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-machine", "q35,graphics=off", "-smp", str(cpus), "-m", str(memory_mib)),
            *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *("-drive", f"if=none,id=disk,format=raw,snapshot=on,cache=unsafe,file={disk}"),
            *_DEVICES[bus],
            *extra,
        ]
        self._firmware = firmware
        self._raw = bytearray()
        self._news = threading.Condition()
        self._ended = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imager-vm-")))
            command = [*self._command, *_firmware_options(self._firmware, scratch)]
            # Standard error in the same stream: what QEMU itself says belongs into the log.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            stack.callback(self._kill)
            assert self._process.stdout is not None
            self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
            self._reader.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def log(self) -> str:
        with self._news:
            text = self._raw.decode(errors="replace")
        return _TERMINAL_CODES.sub("", text)

    def expect(self, pattern: str, *, timeout_seconds: float, after: int = 0) -> int:
        """Wait for a regular expression in the log from position ``after`` on; returns the
        position behind it. Raises BootFailed on a panic, a rescue prompt, the machine's end, or
        when the time is over."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            ended, log = self._ended, self.log
            if found := re.compile(pattern).search(log, after):
                return found.end()
            if dead_end := _DEAD_ENDS.search(log, after):
                raise BootFailed(self._report(f"dead end {dead_end.group()!r}", pattern))
            if ended:
                raise BootFailed(self._report("the machine ended", pattern))
            left = deadline - time.monotonic()
            if left <= 0:
                raise BootFailed(self._report(f"nothing in {timeout_seconds:.0f} s", pattern))
            with self._news:
                self._news.wait(min(left, 0.5))

    def send(self, text: str) -> None:
        """Type text and Enter on the serial line."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()

    def log_in(self, *, timeout_seconds: float = 120) -> None:
        """Log in as root at the prompt that is already there."""
        start = self.expect(r"login: ", timeout_seconds=timeout_seconds)
        self.send("root")
        start = self.expect(r"Password: ", timeout_seconds=timeout_seconds, after=start)
        self.send(ROOT_PASSWORD)
        self.expect(r"# ", timeout_seconds=timeout_seconds, after=start)

    def run(self, command: str, *, timeout_seconds: float = 60) -> str:
        """Run a command in the logged-in shell and return what it printed."""
        start = len(self.log)
        # The quotes keep the echoed command line from looking like its result.
        self.send(f"echo '<''<'; {command}; echo '>''>'")
        first = self.expect(r"<<\n", timeout_seconds=timeout_seconds, after=start)
        last = self.expect(r">>\n", timeout_seconds=timeout_seconds, after=first)
        return self.log[first : last - len(">>\n")]

    def _report(self, what: str, pattern: str) -> str:
        tail = "\n".join(self.log.splitlines()[-_TAIL_LINES:])
        return f"{what} while waiting for {pattern!r}; the console's end:\n{tail}"

    def _read(self, console: BinaryIO) -> None:
        while piece := console.read1(65536):  # type: ignore[attr-defined]
            with self._news:
                self._raw += piece
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def boot_disk(
    disk: Path,
    *,
    firmware: Firmware = "bios",
    bus: Bus = "virtio",
    until: str = re.escape(BOOT_MARKER),
    timeout_seconds: float = BOOT_SECONDS,
) -> str:
    """Boot a disk until a regular expression and the login prompt have been on its console, and
    return the console's log. Raises BootFailed."""
    deadline = time.monotonic() + timeout_seconds
    with Machine(disk, firmware=firmware, bus=bus) as machine:
        machine.expect(until, timeout_seconds=timeout_seconds)
        machine.expect(r"login: ", timeout_seconds=max(deadline - time.monotonic(), 1))
        return machine.log


def _firmware_options(firmware: Firmware, scratch: Path) -> list[str]:
    if firmware == "bios":
        return []
    variables = scratch / "vars.fd"
    shutil.copyfile(_OVMF_VARS, variables)
    return [
        *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={_OVMF_CODE}"),
        *("-drive", f"if=pflash,format=raw,unit=1,file={variables}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Boot a disk image and show its console.")
    parser.add_argument("disk", type=Path)
    parser.add_argument("--firmware", choices=("bios", "uefi"), default="bios")
    parser.add_argument("--bus", choices=sorted(_DEVICES), default="virtio")
    parser.add_argument(
        "--last-lines", type=int, default=0, help="show the end, without kernel messages"
    )
    options = parser.parse_args()
    start = time.monotonic()
    try:
        log = boot_disk(options.disk, firmware=options.firmware, bus=options.bus)
    except BootFailed as error:
        sys.exit(f"qemu: {error}")
    lines = log.splitlines()
    if options.last_lines:
        lines = [line for line in lines if not _KERNEL_LINE.match(line)][-options.last_lines :]
    print("\n".join(lines))
    print(f"qemu: up in {time.monotonic() - start:.0f} s ({options.firmware}, {options.bus})")


if __name__ == "__main__":
    main()
