"""Every file of a view, read through the kernel or a filesystem driver."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from imager.checkers import Surplus
from imager.errors import ToolError
from imager.loopdevice import loop_device
from imager.process import run

_CHUNK = 1 << 20


@dataclass
class Reading:
    """What was read, and what could not be."""

    files: int = 0
    complaints: set[str] = field(default_factory=set)
    """``path: reason``, with paths from the top of the filesystem."""


@dataclass(frozen=True)
class Driver:
    """How a kind is mounted: ``mount`` is followed by device (or file) and folder."""

    mount: tuple[str, ...]
    takes_files: bool = False
    """A program, which would see a device through the kernel's pages, larger than blocks."""
    after: tuple[str, ...] = ()
    """To run with the device when it is unmounted."""
    surplus: Surplus = "nothing"


# Read-only mounts still replay a journal when the device is writable: here, into the view.
# errors=continue: a superblock may ask for a panic. nouuid: the source may be mounted.
# forget: else the kernel goes on taking the view for the source's device.
_EXT = Driver(("mount", "-t", "ext4", "-o", "ro,errors=continue"))
DRIVERS: Mapping[str, Driver] = {
    "ext2": _EXT,
    "ext3": _EXT,
    "ext4": _EXT,
    "xfs": Driver(("mount", "-t", "xfs", "-o", "ro,nouuid"), surplus="last block"),
    "btrfs": Driver(
        ("mount", "-t", "btrfs", "-o", "ro,subvolid=5"),
        after=("btrfs", "device", "scan", "--forget"),
    ),
    "ntfs": Driver(("ntfs-3g", "-o", "ro"), takes_files=True),
    "vfat": Driver(("mount", "-t", "vfat", "-o", "ro")),
    "exfat": Driver(("mount", "-t", "exfat", "-o", "ro")),
    "f2fs": Driver(("mount", "-t", "f2fs", "-o", "ro")),
}


def surplus(kind: str) -> Surplus:
    """What mounting reads without need."""
    return DRIVERS[kind].surplus


@contextlib.contextmanager
def mounted(view: Path, kind: str, sector_size: int) -> Iterator[Path]:
    """The folder where the view is mounted read-only; a journal is replayed into the view.

    Raises ToolError when it can't be mounted: not root, or the kernel doesn't know the kind.
    """
    driver = DRIVERS[kind]
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="imager-files-"))
        stack.callback(folder.rmdir)
        device = str(view)
        if not driver.takes_files:
            device = stack.enter_context(loop_device(device, sector_size=sector_size))
        if driver.after:
            stack.callback(run, [*driver.after, device], accept=range(256))
        stack.callback(_unmount, folder)
        run([*driver.mount, device, str(folder)])
        require_source(folder, device)
        yield folder


def read_all(folder: Path, token: bytes) -> Reading:
    """Read names, attributes and content of everything below a folder.

    A file in which ``token`` stands holds an unused block.
    """
    reading = Reading()
    todo = [folder]
    while todo:
        current = todo.pop()
        found: list[Path] = []
        with _noted(reading, folder, current):
            found = list(current.iterdir())
        for path in found:
            reading.files += 1
            with _noted(reading, folder, path):
                if _read(path, token):
                    todo.append(path)
    return reading


@contextlib.contextmanager
def _noted(reading: Reading, top: Path, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = os.fsencode(path.relative_to(top)).decode(errors="replace")
        reading.complaints.add(f"/{name}: {error.strerror}")


def _read(path: Path, token: bytes) -> bool:
    """Read one entry; whether it is a folder. Raises OSError."""
    mode = path.lstat().st_mode
    _read_attributes(path)
    if stat.S_ISLNK(mode):
        path.readlink()
    elif stat.S_ISREG(mode):
        _read_content(path, token)
    return stat.S_ISDIR(mode)


def _read_attributes(path: Path) -> None:
    try:
        for name in os.listxattr(path, follow_symlinks=False):
            os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENODATA):
            raise


def _read_content(path: Path, token: bytes) -> None:
    """All data segments; holes cost nothing. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(fd, at, os.SEEK_HOLE)
            while at < end:
                content = os.pread(fd, min(_CHUNK, end - at), at)
                if not content:
                    return
                if token in content:
                    raise OSError(errno.EIO, f"an unused block at byte {at} or after")
                at += len(content)
    finally:
        os.close(fd)


def require_source(folder: Path, device: str) -> None:
    """Raises ToolError for another device below a mount.

    Btrfs goes by ids: of two devices with the same, the kernel could have taken the other."""
    found = run(["findmnt", "--noheadings", "--output", "SOURCE", str(folder)]).stdout.decode()
    if found.strip().partition("[")[0] != device:
        raise ToolError(f"the kernel mounted {found.strip()} for {device}")


def _unmount(folder: Path) -> None:
    if not folder.is_mount():
        return
    try:
        run(["umount", str(folder)])
    except ToolError:
        run(["umount", "--lazy", str(folder)])
