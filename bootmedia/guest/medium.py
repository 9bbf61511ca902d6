"""The medium that the machine was booted from, and its further volumes.

A medium is known by the marker file on it, never by the name of a device: a stick may be sda in one
boot and sdb in the next, and the target disk the other way round.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from bootmedia.medium import RECORD_PATH, marker_path
from bootmedia.medium import Medium as Record
from imager.errors import ImagerError, ObjectMissing
from imager.process import run
from imager.sysfs import entries

MOUNT_POINT = Path("/run/imager/medium")

# USB devices settle late, hubs behind hubs later still.
SETTLE_SECONDS = 30.0
_LOOK_AGAIN_SECONDS = 0.3

# ECMA-119: the first volume descriptor is in sector 16, its identifier after one byte.
_DESCRIPTOR_AT, _IDENTIFIER = 16 * 2048 + 1, b"CD001"

_CDROMEJECT = 0x5309  # linux/cdrom.h
_NO_MEDIA = ("loop", "ram", "zram", "dm-", "md", "nbd")


@dataclass(frozen=True)
class Medium:
    """A mounted medium; ``device`` is its node."""

    folder: Path
    device: str | None


def find_medium(
    medium_id: str,
    seconds: float = SETTLE_SECONDS,
    *,
    volume: int | None = None,
) -> Medium:
    """Wait for the medium with this id (and volume number) and mount it read-only.

    Raises ObjectMissing when it does not come in time.
    """
    deadline = monotonic() + seconds
    while True:
        for device in _devices():
            if _is_iso(device) and (found := _mounted(device, medium_id, volume)):
                return found
        if monotonic() >= deadline:
            break
        sleep(_LOOK_AGAIN_SECONDS)
    which = f"volume {volume} of the medium" if volume else "the medium"
    raise ObjectMissing(
        f"{which} {medium_id} was not found on any disk or drive",
        hint="put it in (another port may help), then try again",
    )


def eject(medium: Medium) -> None:
    """Unmount a disc and open its drive, for another one to be put in; a stick can stay.

    Raises ToolError while something on it is in use.
    """
    if medium.device is None or not medium.device.startswith("/dev/sr"):
        return
    run(["umount", str(medium.folder)])
    with suppress(OSError):  # some drives have nothing that opens
        fd = os.open(medium.device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _CDROMEJECT)
        finally:
            os.close(fd)


def _devices() -> Iterator[str]:
    """Whole disks and drives, then partitions."""
    names = [
        entry.name
        for entry in entries(Path("/sys/class/block"))
        if not entry.name.startswith(_NO_MEDIA)
    ]
    partitions = {name for name in names if Path("/sys/class/block", name, "partition").exists()}
    for name in sorted(names, key=lambda name: (name in partitions, name)):
        yield f"/dev/{name.replace('!', '/')}"


def _is_iso(device: str) -> bool:
    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # an empty drive
    try:
        return os.pread(fd, len(_IDENTIFIER), _DESCRIPTOR_AT) == _IDENTIFIER
    except OSError:
        return False
    finally:
        os.close(fd)


def _mounted(device: str, medium_id: str, volume: int | None) -> Medium | None:
    """Mount it if it is the one that is looked for."""
    folder = MOUNT_POINT if volume is None else MOUNT_POINT.with_name(f"volume-{volume}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run(["mount", "-t", "iso9660", "-o", "ro", device, str(folder)])
    except ImagerError:
        return None
    with suppress(ImagerError, OSError):
        if (folder / marker_path(medium_id)).exists():
            record = Record.from_bytes((folder / RECORD_PATH).read_bytes(), RECORD_PATH)
            if volume in (None, record.volume):
                return Medium(folder, device)
    run(["umount", str(folder)])
    return None
