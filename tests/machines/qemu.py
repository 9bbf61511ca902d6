"""Boot a disk image in QEMU and talk with it over the serial line.

Software emulation only, so that it works on any machine. Disks are opened with a throw-away
overlay and never changed, unless one is a ``Disk`` that says ``keep``.

    python -m tests.machines.qemu DISK.img [--firmware bios|uefi] [--bus virtio|sata|scsi|nvme|usb]
    python -m tests.machines.qemu --cdrom RESCUE.iso --until 'imager-rescue: ready'
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from tests.machines.debian_disk import BOOT_MARKER, ROOT_PASSWORD

Firmware = Literal["bios", "uefi", "secure-boot"]
Bus = Literal["virtio", "sata", "scsi", "nvme", "usb"]

BOOT_SECONDS = 300
"""A boot takes about 30 s emulated on an idle machine, several times that on a loaded one."""

SYSTEM_UP = re.escape(BOOT_MARKER) + r"(?s:.*)login: "
"""The installed system's marker and its login prompt."""

_OVMF = Path("/usr/share/OVMF")
# Code, and the template of the variables; Secure Boot has Microsoft's keys enrolled.
_OVMF_FILES: dict[Firmware, tuple[Path, Path]] = {
    "uefi": (_OVMF / "OVMF_CODE_4M.fd", _OVMF / "OVMF_VARS_4M.fd"),
    "secure-boot": (_OVMF / "OVMF_CODE_4M.secboot.fd", _OVMF / "OVMF_VARS_4M.ms.fd"),
}

# The machine's AHCI controller has six ports; disks count up from the first.
_CDROM_PORT = 5

_QMP_SECONDS = 30
_EVENTS_REMEMBERED = 1000


@dataclass(frozen=True)
class Disk:
    """A disk of the machine: an image file, and how it is attached."""

    image: Path
    bus: Bus = "virtio"
    serial: str = "imager"
    keep: bool = False
    """Whether what the machine writes reaches the image file."""
    sector_size: int = 512
    """Logical and physical, in bytes (SATA disks have 512 only)."""


@dataclass(frozen=True)
class Network:
    """User-mode network: the machine gets an address by DHCP and finds the host's 127.0.0.1 as
    10.0.2.2."""

    card: str = "virtio-net-pci"
    tftp: Path | None = None
    """The folder that the TFTP server on 10.0.2.2 gives out."""
    bootfile: str | None = None
    """In that folder; makes the network what the machine boots from first."""
    rom: bool = True
    """Whether the card has its iPXE; without it UEFI's own network boot is used."""
    ports: tuple[tuple[int, int], ...] = ()
    """(port on the host's 127.0.0.1, port in the machine), TCP."""


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
    """A running virtual machine. Leaving the ``with`` block kills it.

    It boots from the network when that has a boot file, else from ``cdrom``, ``usb`` (an image on
    a stick), or the disks, in this order. ``disk`` is the short form of one disk.
    ``variables`` is a file that keeps the UEFI variables beyond this machine (made when missing).
    ``log`` is everything it said on the serial line so far, without terminal codes.
    """

    def __init__(
        self,
        disk: Path | None = None,
        *,
        firmware: Firmware = "bios",
        bus: Bus = "virtio",
        disks: Sequence[Disk] = (),
        cdrom: Path | None = None,
        usb: Path | None = None,
        network: Network | None = None,
        screen: bool = False,
        variables: Path | None = None,
        memory_mib: int = 1024,
        cpus: int = 2,
        extra: tuple[str, ...] = (),
    ) -> None:
        disks = [*([Disk(disk, bus)] if disk else []), *disks]
        self._command = [
            # The kernel kills QEMU when this process dies, however it dies.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-machine", _machine_type(firmware, screen), "-smp", str(cpus)),
            *("-m", str(memory_mib), "-nodefaults", "-display", "none", "-serial", "stdio"),
            *("-no-reboot",),
            *(("-device", "VGA") if screen else ()),
            *_controllers(disks, usb),
            *_boot_media(cdrom, usb),
            *(option for number, disk in enumerate(disks) for option in _disk(disk, number)),
            *(_network(network) if network else ()),
            *extra,
        ]
        self._firmware = firmware
        self._variables = variables
        self._raw = bytearray()
        self._news = threading.Condition()
        self._ended = False
        self._monitor: Monitor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imager-vm-")))
            self._socket = scratch / "qmp"
            command = [
                *self._command,
                *_firmware_options(self._firmware, self._variables or scratch / "variables.fd"),
                *("-qmp", f"unix:{self._socket},server=on,wait=off"),
            ]
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

    def send_key(self, *keys: str) -> None:
        """Press keys of the machine's keyboard together, by QEMU's names ("ctrl", "a", "ret")."""
        pressed = [{"type": "qcode", "data": key} for key in keys]
        self.monitor.execute("send-key", keys=pressed)

    def wait_for_end(self, *, timeout_seconds: float) -> str:
        """Wait until the machine has powered off or asked for a reboot, and return its log.
        Raises BootFailed when the time is over."""
        with self._news:
            if not self._news.wait_for(lambda: self._ended, timeout_seconds):
                raise BootFailed(self._report(f"no end in {timeout_seconds:.0f} s", "the end"))
        return self.log

    def cut_power(self) -> None:
        """End the machine at once."""
        self._process.kill()
        self._process.wait()

    def screenshot(self, picture: Path) -> None:
        """Write the screen as PNG (a machine with ``screen``)."""
        self.monitor.execute("screendump", filename=str(picture), format="png")

    def change_cdrom(self, image: Path | None) -> None:
        """Put another disc into the drive, or take it out, whatever the system thinks of it."""
        self.monitor.execute("eject", id="cdrom", force=True)
        if image is not None:
            file = {"filename": str(image), "format": "raw", "read-only-mode": "read-only"}
            self.monitor.execute("blockdev-change-medium", id="cdrom", **file)

    def unplug_usb(self) -> None:
        """Pull the stick that the machine booted from."""
        self.monitor.execute("device_del", id="stick")

    @property
    def monitor(self) -> Monitor:
        """QEMU's own control line."""
        if self._monitor is None:
            self._monitor = self._stack.enter_context(Monitor(self._socket))
        return self._monitor

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


class Monitor:
    """QEMU's control line (QMP: one JSON document per line)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_QMP_SECONDS)
        try:
            self._socket.connect(str(path))
            self._lines = self._socket.makefile("rb")
            self._next()  # the greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run one command and return its result. Raises RuntimeError with QEMU's reason."""
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        for _ in range(_EVENTS_REMEMBERED):
            answer = self._next()
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise RuntimeError(f"{command}: no answer")

    def _next(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._lines.readline())
        return answer


def _machine_type(firmware: Firmware, screen: bool) -> str:
    options = ["q35"]
    if not screen:
        options.append("graphics=off")  # SeaBIOS then talks on the serial line
    if firmware == "secure-boot":
        options.append("smm=on")  # which alone may write the firmware's variables
    return ",".join(options)


def _controllers(disks: Sequence[Disk], usb: Path | None) -> Iterator[str]:
    buses = {disk.bus for disk in disks}
    if usb or "usb" in buses:
        yield from ("-device", "qemu-xhci")
    if "scsi" in buses:
        yield from ("-device", "virtio-scsi-pci")


def _boot_media(cdrom: Path | None, usb: Path | None) -> Iterator[str]:
    if cdrom:
        yield from ("-drive", f"if=none,id=disc,format=raw,readonly=on,media=cdrom,file={cdrom}")
        yield from ("-device", f"ide-cd,id=cdrom,bus=ide.{_CDROM_PORT},drive=disc,bootindex=1")
    if usb:
        yield from ("-drive", f"if=none,id=stick-image,format=raw,snapshot=on,file={usb}")
        stick = "usb-storage,id=stick,serial=stick,removable=on,drive=stick-image,bootindex=2"
        yield from ("-device", stick)


def _disk(disk: Disk, number: int) -> Iterator[str]:
    keep = "off" if disk.keep else "on"
    drive = f"if=none,id=disk{number},format=raw,cache=unsafe,snapshot={keep},file={disk.image}"
    yield from ("-drive", drive)
    device = {
        "virtio": "virtio-blk-pci",
        "sata": f"ide-hd,bus=ide.{number}",
        "scsi": "scsi-hd",
        "nvme": "nvme",
        "usb": "usb-storage",
    }[disk.bus]
    attached = f"serial={disk.serial},drive=disk{number},bootindex={10 + number}"
    sectors = f"logical_block_size={disk.sector_size},physical_block_size={disk.sector_size}"
    yield from ("-device", f"{device},{attached},{sectors}")


def _network(network: Network) -> Iterator[str]:
    host = ["user,id=net"]
    if network.tftp:
        host.append(f"tftp={network.tftp}")
    if network.bootfile:
        host.append(f"bootfile={network.bootfile}")
    host += [f"hostfwd=tcp:127.0.0.1:{here}-:{there}" for here, there in network.ports]
    yield from ("-netdev", ",".join(host))
    card = [network.card, "netdev=net"]
    if network.bootfile:
        card.append("bootindex=0")
    if not network.rom:
        card.append("romfile=")
    yield from ("-device", ",".join(card))


def boot_disk(
    disk: Path | None,
    *,
    firmware: Firmware = "bios",
    bus: Bus = "virtio",
    cdrom: Path | None = None,
    usb: Path | None = None,
    until: str = SYSTEM_UP,
    timeout_seconds: float = BOOT_SECONDS,
) -> str:
    """Boot until a regular expression has been on the console, and return the console's log.
    Raises BootFailed."""
    with Machine(disk, firmware=firmware, bus=bus, cdrom=cdrom, usb=usb) as machine:
        machine.expect(until, timeout_seconds=timeout_seconds)
        return machine.log


def _firmware_options(firmware: Firmware, variables: Path) -> Iterator[str]:
    if firmware == "bios":
        return
    code, template = _OVMF_FILES[firmware]
    if not variables.exists():
        shutil.copyfile(template, variables)
    yield from ("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}")
    yield from ("-drive", f"if=pflash,format=raw,unit=1,file={variables}")
    if firmware == "secure-boot":
        yield from ("-global", "driver=cfi.pflash01,property=secure,value=on")


def main() -> None:
    parser = argparse.ArgumentParser(description="Boot a disk or medium and show its console.")
    parser.add_argument("disk", type=Path, nargs="?")
    parser.add_argument("--cdrom", type=Path, help="a disc image to boot from")
    parser.add_argument("--usb", type=Path, help="an image on a USB stick to boot from")
    parser.add_argument("--firmware", choices=("bios", *_OVMF_FILES), default="bios")
    parser.add_argument(
        "--bus", choices=("virtio", "sata", "scsi", "nvme", "usb"), default="virtio"
    )
    parser.add_argument("--until", default=SYSTEM_UP, help="regular expression to wait for")
    parser.add_argument(
        "--last-lines", type=int, default=0, help="show the end, without kernel messages"
    )
    options = parser.parse_args()
    start = time.monotonic()
    try:
        log = boot_disk(
            options.disk,
            firmware=options.firmware,
            bus=options.bus,
            cdrom=options.cdrom,
            usb=options.usb,
            until=options.until,
        )
    except BootFailed as error:
        sys.exit(f"qemu: {error}")
    lines = log.splitlines()
    if options.last_lines:
        lines = [line for line in lines if not _KERNEL_LINE.match(line)][-options.last_lines :]
    print("\n".join(lines))
    print(f"qemu: up in {time.monotonic() - start:.0f} s ({options.firmware}, {options.bus})")


if __name__ == "__main__":
    main()
