"""Loop devices: a part of a file or of a disk as a block device of its own, by losetup(8)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imager.process import run
from imager.sysfs import read_number


def is_without_partitions(path: str) -> bool:
    """Whether this is a loop device that was set up without partitions, and has none.

    Partitions that such a device is given outlive it, and show on the next file behind it.
    """
    folder = Path("/sys/class/block") / Path(path).resolve().name
    return read_number(folder / "loop/partscan") == 0 and not any(folder.glob("*/partition"))


@contextmanager
def loop_device(
    path: str,
    offset: int = 0,
    size: int | None = None,
    *,
    sector_size: int = 512,
    read_only: bool = False,
) -> Iterator[str]:
    """The path of a loop device over ``size`` bytes at ``offset`` (to the end by default).

    What was written through it is on stable storage when the block ends. Raises ToolError when
    losetup fails (not root, no free device).
    """
    command = ["losetup", "--find", "--show", f"--offset={offset}", f"--sector-size={sector_size}"]
    if size is not None:
        command.append(f"--sizelimit={size}")
    if read_only:
        command.append("--read-only")
    device = run([*command, path]).stdout.decode().strip()
    try:
        yield device
    finally:
        run(["losetup", "--detach", device])
        if not read_only:
            _flush(path)


def _flush(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
