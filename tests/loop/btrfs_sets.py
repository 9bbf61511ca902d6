"""Btrfs over several devices, attached and made known to the kernel together.

The kernel's list of devices is one for all processes: nothing here forgets devices of others,
which may be about to be mounted by a test at the same time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from imager.errors import ToolError
from imager.loopdevice import loop_device
from imager.process import run
from tests.support.disks import unmount

_MOUNT_ATTEMPTS = 5
_SCAN = ["btrfs", "device", "scan"]


@contextlib.contextmanager
def mounted_set(paths: Sequence[Path], options: str = "noatime") -> Iterator[Path]:
    folder = paths[0].with_name("set.mnt")
    folder.mkdir(exist_ok=True)
    with attached_set(paths) as devices:
        _mount(devices, folder, options)
        try:
            yield folder
        finally:
            unmount(folder)


def check_set(paths: Sequence[Path]) -> int:
    """``btrfs check``'s verdict, of data checksums too."""
    with attached_set(paths) as devices:
        run([*_SCAN, *devices])
        command = ["btrfs", "check", "--check-data-csum", devices[0]]
        return run(command, accept=range(256)).returncode


@contextlib.contextmanager
def attached_set(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Loop devices over the images, which the kernel forgets at the end."""
    with contextlib.ExitStack() as stack:
        devices = []
        for path in paths:
            devices.append(stack.enter_context(loop_device(str(path))))
            # One by one, and while it is attached: a device that it never knew is an error.
            stack.callback(run, [*_SCAN, "--forget", devices[-1]], accept=range(256))
        yield devices


def _mount(devices: Sequence[str], folder: Path, options: str) -> None:
    """Between the scan of the devices and their opening, both within the mount, the kernel drops
    what another process makes it forget; then the mount is tried again."""
    named = ",".join(f"device={device}" for device in devices)
    command = ["mount", "-t", "btrfs", "-o", f"{options},{named}", devices[0], str(folder)]
    for _ in range(_MOUNT_ATTEMPTS - 1):
        with contextlib.suppress(ToolError):
            run(command)
            return
        time.sleep(0.2)
    run(command)
