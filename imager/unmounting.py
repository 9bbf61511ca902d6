"""``imager umount``: takes down a mount of ``mounting`` and all that is below it.

What there is, is read from the kernel: also of processes that were killed nothing is left.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from imager.errors import ImagerError, ToolError, UsageError
from imager.mounting import SOURCE_PREFIX
from imager.mounttable import Mount, mount_at, mounts
from imager.process import run
from imager.sysfs import read_text

# udev and blkid look at what is new for a moment, and the last writes of a loop device take one.
_PATIENCE_SECONDS = 10.0
_STEP_SECONDS = 0.05


class _Below(NamedTuple):
    """What a kernel's mount of ours stands on."""

    device: str | None
    """Of a loop device."""
    server: Mount


def unmount(folder: Path, *, lazy: bool = False) -> None:
    """Take down what ``imager mount`` put at ``folder``, and wait for its processes to end.

    ``lazy``: out of sight at once; the rest goes when its last user does. Raises UsageError when
    nothing of ours is mounted there, ImagerError naming the users when it is busy.
    """
    point = Path(os.path.realpath(folder))
    mount = mount_at(point)
    if mount is None:
        raise UsageError(f"nothing is mounted at {folder}")
    if _pid(mount) is not None:
        _take_down(point, lazy=lazy)
        _finish(mount, lazy)
        return
    below = _below(mount)
    if below is None:
        raise UsageError(
            f"{folder} was not mounted by imager ({mount.source}, {mount.kind})",
            hint=f"umount {folder}",
        )
    with _held(below.device):
        _take_down(point, lazy=lazy)
        if mount.kind == "btrfs" and not lazy:
            _forget(below.device)
    if lazy:
        return
    _finish(below.server, lazy)


def _below(mount: Mount) -> _Below | None:
    """By the loop device's file, or the source of a mount that takes files."""
    is_loop = mount.source.startswith("/dev/loop")
    file = _backing(mount.source) if is_loop else mount.source
    if file is None:
        return None
    parent = Path(file).parent
    for other in mounts():
        if other.point == parent and _pid(other) is not None:
            return _Below(mount.source if is_loop else None, other)
    return None


def _backing(device: str) -> str | None:
    """The file behind a loop device, None when it is detached."""
    text = read_text(Path("/sys/block", Path(device).name, "loop/backing_file"))
    return text.removesuffix(" (deleted)") if text else None


def _pid(mount: Mount) -> int | None:
    """The server's, of a mount that is one of ours."""
    if not mount.kind.startswith("fuse") or not mount.source.startswith(SOURCE_PREFIX):
        return None
    number = mount.source.removeprefix(SOURCE_PREFIX)
    return int(number) if number.isdecimal() else None


# --- steps --------------------------------------------------------------------------------------


def _take_down(point: Path, *, lazy: bool) -> None:
    """umount(8), again while it is busy with nobody to be seen. Raises ImagerError."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            run(_command(point, lazy))
            return
        except ToolError as error:
            if mount_at(point) is None:
                return  # somebody else was quicker
            if "busy" not in error.message:
                raise
            users = _users(point)
            if users or time.monotonic() > deadline:
                who = ", ".join(users) or "nobody that can be seen"
                raise ImagerError(
                    f"{point} is in use by {who}",
                    hint="end that first, or: imager umount --lazy",
                ) from None
        time.sleep(_STEP_SECONDS)


def _command(point: Path, lazy: bool) -> list[str]:
    if os.geteuid() != 0:
        return ["fusermount3", "-u", *(["-z"] if lazy else []), str(point)]
    return ["umount", *(["--lazy"] if lazy else []), str(point)]


def _finish(server: Mount, lazy: bool) -> None:
    """The server ends with its mount; one that doesn't is ended, and a dead one's mount removed."""
    if lazy:
        return
    pid = _pid(server)
    assert pid is not None
    if not _wait_for(
        lambda: mount_at(server.point) is None, _PATIENCE_SECONDS if _runs(pid) else 0
    ):
        _take_down(server.point, lazy=True)
    for how in (signal.SIGTERM, signal.SIGKILL):
        if _wait_for(lambda: not _runs(pid), _PATIENCE_SECONDS):
            break
        with suppress(ProcessLookupError):
            os.kill(pid, how)
    if server.point.parent == Path("/run/imager"):
        with suppress(OSError):
            server.point.rmdir()


def _runs(pid: int) -> bool:
    """Whether that process is still our server, and no other that got its number."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"imager" in words and b"mount" in words


@contextmanager
def _held(device: str | None) -> Iterator[None]:
    """Keeps a loop device, which would detach itself with its mount."""
    held = None
    if device is not None:
        with suppress(OSError):
            held = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _forget(device: str | None) -> None:
    """Else the kernel goes on taking this device for the one with the filesystem's id."""
    if device is not None:
        run(["btrfs", "device", "scan", "--forget", device], accept=range(256))


def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP_SECONDS)
    return True


def _users(point: Path) -> list[str]:
    """Processes with something of the mount open, or their folder in it: "bash (4711)"."""
    users = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and process.name != str(os.getpid()):
            with suppress(OSError):
                if any(_is_inside(link, point) for link in _links(process)):
                    users.append(f"{read_text(process / 'comm')} ({process.name})")
    return sorted(users)


def _links(process: Path) -> Iterator[Path]:
    yield from (process / name for name in ("cwd", "root", "exe"))
    with suppress(OSError):
        yield from (process / "fd").iterdir()
    with suppress(OSError):
        yield from (process / "map_files").iterdir()


def _is_inside(link: Path, point: Path) -> bool:
    try:
        target = link.readlink()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES):
            return False
        raise
    return target == point or point in target.parents
