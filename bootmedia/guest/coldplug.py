"""Drivers for the hardware that is there, and for what is plugged in later: no udev needed.

The kernel gives each device a modalias (sysfs), and ``modules.alias`` says which modules serve it.
Loading a driver makes new devices appear, so it goes on until nothing new is there. Events of the
kernel (netlink, NETLINK_KOBJECT_UEVENT, see linux/netlink.h) tell of devices that come later.
"""

from __future__ import annotations

import ctypes
import errno
import lzma
import os
import platform
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

from bootmedia.moduleindex import ModuleIndex, normal_name
from imager.errors import ImagerError
from imager.sysfs import entries, read_text

# linux/netlink.h; group 1 is what the kernel itself sends, udev's messages have another.
_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_EVENTS = 1
_LARGEST_EVENT = 64 << 10

# Processor features are nothing that a restore needs: loading them all takes seconds.
_NOT_WANTED = ("cpu:",)

# What has no hardware of its own: a medium's filesystem, files as disks, filesystems in user space.
FIRST_MODULES = ("loop", "isofs", "fuse")

# bInterfaceClass of a disk or stick (USB Mass Storage Class Specification Overview).
_MASS_STORAGE = "08"

_LOOK_AGAIN_SECONDS = 0.1

_MAGICS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\xfd7zXZ\0", lzma.decompress),
    (b"\x1f\x8b", lambda content: zlib.decompress(content, wbits=31)),
    (b"\x28\xb5\x2f\xfd", lambda content: _unzstd(content)),
)


class Drivers:
    """Loads modules of the running kernel. May be used by any thread."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: of the kernel's modules, by default /lib/modules/RELEASE."""
        self._folder = folder or Path("/lib/modules") / platform.release()
        self._index = ModuleIndex.read(self._folder)
        self._tried: set[str] = set()
        self._aliases: set[str] = set()
        self._lock = threading.Lock()
        self.failures: list[str] = []

    def load(self, name: str) -> bool:
        """Load a module and what it needs; one that is built in or loaded counts as well."""
        with self._lock:
            if self._index.is_builtin(name):
                return True
            # One that fails stops none: soft dependencies may, and the kernel knows real ones.
            loaded = {path: self._insert(path) for path in self._index.load_order(name)}
            own = self._index.paths.get(normal_name(name))
            return own is not None and loaded[own]

    def load_for(self, modalias: str) -> None:
        """Load what serves a device."""
        if modalias in self._aliases:
            return
        self._aliases.add(modalias)
        if modalias.startswith(_NOT_WANTED):
            return
        for name in self._index.modules_for(modalias):
            self.load(name)

    def coldplug(self) -> int:
        """Load drivers until no device is new. Returns how many modules were inserted."""
        before = len(self._tried)
        while new := set(_modaliases()) - self._aliases:
            for modalias in sorted(new):
                self.load_for(modalias)
        return len(self._tried) - before

    def watch(self) -> threading.Thread:
        """From now on load drivers for what is plugged in, in a thread that ends with the program.

        Start it before ``coldplug``, so that nothing is missed between.
        """
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_KOBJECT_UEVENT)
        events.bind((0, _KERNEL_EVENTS))
        thread = threading.Thread(target=self._follow, args=(events,), daemon=True, name="hotplug")
        thread.start()
        return thread

    def _follow(self, events: socket.socket) -> None:
        with events:
            while True:
                try:
                    message = events.recv(_LARGEST_EVENT)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    self.coldplug()  # the kernel dropped events: look at everything
                    continue
                if modalias := added_modalias(message):
                    self.load_for(modalias)

    def _insert(self, path: Path) -> bool:
        name = path.name
        if name in self._tried:
            return not any(text.startswith(f"{name}:") for text in self.failures)
        self._tried.add(name)
        try:
            insert_module(self._folder / path)
        except (OSError, ImagerError, lzma.LZMAError, zlib.error) as error:
            self.failures.append(f"{name}: {error}")
            return False
        return True


def wait_for_disks(quiet: float, longest: float, sys_root: Path = Path("/")) -> bool:
    """Until each USB disk has its node, and none of any kind has come for ``quiet`` seconds.

    The kernel looks at a USB disk a second after it has found it (usb-storage's delay_use), and
    other disks come late as well: who asks too early misses some. Returns False when ``longest``
    seconds were not enough.
    """
    begun = changed = monotonic()
    known: set[str] = set()
    while (now := monotonic()) - begun < longest:
        present = {entry.name for entry in entries(sys_root / "sys/class/block")}
        if present != known:
            known, changed = present, now
        if now - changed >= quiet and not _awaits_usb_disk(sys_root):
            return True
        sleep(_LOOK_AGAIN_SECONDS)
    return False


def _awaits_usb_disk(sys_root: Path) -> bool:
    return any(
        read_text(interface / "bInterfaceClass") == _MASS_STORAGE
        and not any(interface.glob("host*/target*/*/block/*"))
        for interface in entries(sys_root / "sys/bus/usb/devices")
    )


def added_modalias(message: bytes) -> str | None:
    """The modalias of a device that a kernel event says was added.

    An event is ``ACTION@DEVPATH`` and then ``KEY=VALUE`` strings, each ended by a zero byte
    (lib/kobject_uevent.c).
    """
    texts = message.decode(errors="replace").split("\0")
    values = dict(text.split("=", 1) for text in texts[1:] if "=" in text)
    return values.get("MODALIAS") if values.get("ACTION") == "add" else None


def insert_module(file: Path) -> None:
    """Give a module to the kernel; that it is there already is no error. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if file.suffix == ".ko":
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            failed = libc.syscall(_numbers().finit_module, fd, b"", 0)
        finally:
            os.close(fd)
    else:
        content = _unpacked(file.read_bytes())
        failed = libc.syscall(_numbers().init_module, content, ctypes.c_ulong(len(content)), b"")
    number = ctypes.get_errno() if failed else 0
    if number not in (0, errno.EEXIST):
        raise OSError(number, os.strerror(number))


class _Numbers:
    """System calls that the C library has no function for (arch/*/entry/syscalls)."""

    def __init__(self, init_module: int, finit_module: int) -> None:
        self.init_module = init_module
        self.finit_module = finit_module


def _numbers() -> _Numbers:
    machine = platform.machine()
    if machine == "x86_64":
        return _Numbers(175, 313)
    if machine in ("aarch64", "riscv64"):
        return _Numbers(105, 273)
    raise OSError(errno.ENOSYS, f"modules of {machine} cannot be loaded")


def _unpacked(content: bytes) -> bytes:
    for magic, unpack in _MAGICS:
        if content.startswith(magic):
            return unpack(content)
    return content


def _unzstd(content: bytes) -> bytes:
    import zstandard

    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(content)
    except zstandard.ZstdError as error:
        raise ImagerError(str(error)) from None


def _modaliases() -> Iterator[str]:
    """Of all devices that there are now."""
    for folder, folders, files in os.walk("/sys/devices"):
        folders[:] = [name for name in folders if name not in ("power", "msi_irqs")]
        if "modalias" in files:
            try:
                text = Path(folder, "modalias").read_text().strip()
            except OSError:
                continue  # it was unplugged
            if text:
                yield text
