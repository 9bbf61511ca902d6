"""A served file mounted by the kernel, so that plain umount(8) takes down all that is below it.

The loop device detaches itself with the mount, and the server of the file ends when it is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from imager.coverage.files import DRIVERS, require_source
from imager.errors import ImagerError, ToolError
from imager.process import run

# linux/loop.h
_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_AUTOCLEAR = 4
_TRIES = 50

_OTHERWISE = "imager files reads many kinds without the kernel"
_MOUNTED_BTRFS = Path("/sys/fs/btrfs")


def mount_read_only(
    file: Path, kind: str, uuid: str | None, sector_size: int, folder: Path
) -> None:
    """Raises ImagerError when the kernel does not mount it: it may not know the kind."""
    driver = DRIVERS.get(kind)
    if driver is None:
        raise ImagerError(f"{kind} can't be mounted")
    if kind == "btrfs" and uuid is not None and (_MOUNTED_BTRFS / uuid).exists():
        raise ImagerError(
            f"the Btrfs {uuid} is mounted on this machine, and the kernel takes another with the "
            "same id for a part of it",
            hint=f"unmount that one, or mount the image elsewhere; {_OTHERWISE}",
        )
    device = nullcontext(str(file)) if driver.takes_files else _passing_loop(file, sector_size)
    with device as path:
        try:
            run([*driver.mount, path, str(folder)])
            require_source(folder, path)
        except ToolError as error:
            raise ImagerError(_explained(kind, error.message), hint=_OTHERWISE) from None


@contextmanager
def _passing_loop(file: Path, sector_size: int) -> Iterator[str]:
    """A loop device that goes when the block ends or this process is killed, unless it is mounted
    then, and else with the mount. losetup(8) can't do that in one step."""
    with _opened(file, os.O_RDWR) as backing:
        for _ in range(_TRIES):
            with _opened(Path("/dev/loop-control"), os.O_RDWR) as control:
                path = Path(f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}")
            with _opened(path, os.O_RDWR) as device:
                try:
                    fcntl.ioctl(device, _CONFIGURE, _configuration(backing, sector_size, file))
                except OSError as error:
                    if error.errno == errno.EBUSY:  # somebody else took it first
                        continue
                    raise
                yield str(path)
                return
    raise ToolError("there is no free loop device")


def _configuration(backing: int, sector_size: int, file: Path) -> bytes:
    """struct loop_config of linux/loop.h."""
    name = os.fsencode(file)[:63]
    info = struct.pack("=5Q4I64s64s32s2Q", 0, 0, 0, 0, 0, 0, 0, 0, _AUTOCLEAR, name, b"", b"", 0, 0)
    return struct.pack("=II232s64x", backing, sector_size, info)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _explained(kind: str, said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith(("mount", "ntfs"))]
    return f"the kernel did not mount the {kind}: {lines[-1] if lines else said.strip()}"
