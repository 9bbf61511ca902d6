"""A served file mounted by the kernel, so that plain umount(8) takes down all that is below it.

The loop device detaches itself with the mount, and the server of the file ends when it is closed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from imager.coverage.files import DRIVERS, require_source
from imager.errors import ImagerError, ToolError
from imager.process import run

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
    """A loop device that goes when the block ends, unless it is mounted then, and else with the
    mount: to detach one that is open only marks it (LO_FLAGS_AUTOCLEAR, drivers/block/loop.c)."""
    made = run(["losetup", "--find", "--show", f"--sector-size={sector_size}", str(file)])
    device = made.stdout.decode().strip()
    try:
        held = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        run(["losetup", "--detach", device])
        raise
    try:
        run(["losetup", "--detach", device])
        yield device
    finally:
        os.close(held)


def _explained(kind: str, said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith(("mount", "ntfs"))]
    return f"the kernel did not mount the {kind}: {lines[-1] if lines else said.strip()}"
