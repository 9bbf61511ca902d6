"""Who uses a disk or a file: mounts, swap, and devices stacked on it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from imager.sysfs import entries, read_text

SYS_ROOT = Path("/sys")
PROC_ROOT = Path("/proc")


class Use(NamedTuple):
    """One use: ``device`` (for instance sda2), what for, and whether it may write."""

    device: str
    description: str
    writable: bool


def uses_of(path: str) -> list[Use]:
    """Every use of a block device, its partitions, and what is stacked on them (RAID, LVM, LUKS,
    loop devices), or of a regular file through loop devices."""
    mounts, swaps = _mounts(), _swaps()
    uses = []
    for number in sorted(_stack(path)):
        name = _device_name(number)
        uses += [Use(name, f"mounted at {at}", writable) for at, writable in mounts.get(number, [])]
        if number in swaps:
            uses.append(Use(name, "in use as swap", True))
    return uses


def device_numbers(path: str) -> set[str]:
    """``major:minor`` of a device, its parent disk, its partitions, and of all that is stacked on
    it; for a regular file of the loop devices that it backs."""
    return _stack(path)


def disk_numbers_below(path: Path) -> set[str]:
    """``major:minor`` of all devices that the filesystem of ``path`` lies on, down to the disks."""
    status = _status_of_nearest(path)
    if status is None:
        return set()
    found: set[str] = set()
    todo = [_number(status.st_dev)]
    while todo:
        number = todo.pop()
        if number in found:
            continue
        found.add(number)
        folder = SYS_ROOT / "dev/block" / number
        todo += [text for slave in entries(folder / "slaves") if (text := read_text(slave / "dev"))]
        if (folder / "partition").exists() and (text := read_text(folder.resolve().parent / "dev")):
            todo.append(text)
        if backing := read_text(folder / "loop/backing_file"):
            below = _status_of_nearest(Path(backing))
            if below is not None:
                todo.append(_number(below.st_dev))
    return found


def _stack(path: str) -> set[str]:
    status = Path(path).stat()
    is_device = stat.S_ISBLK(status.st_mode)
    todo = [_number(status.st_rdev)] if is_device else _loops_of(path)
    found: set[str] = set()
    while todo:
        number = todo.pop()
        if number in found:
            continue
        found.add(number)
        folder = SYS_ROOT / "dev/block" / number
        partitions = [entry for entry in entries(folder) if (entry / "partition").exists()]
        for entry in [*partitions, *entries(folder / "holders")]:
            if text := read_text(entry / "dev"):
                todo.append(text)
        todo += _loops_of(f"/dev/{_device_name(number)}")
    return found


def _loops_of(path: str) -> list[str]:
    """Loop devices that the file or device backs."""
    real = os.path.realpath(path)
    return [
        number
        for device in entries(SYS_ROOT / "block")
        if device.name.startswith("loop") and read_text(device / "loop/backing_file") == real
        if (number := read_text(device / "dev"))
    ]


def _mounts() -> dict[str, list[tuple[str, bool]]]:
    """``major:minor`` to (mount point, writable), from proc(5) mountinfo.

    Btrfs shows an anonymous number there: its source path tells the device.
    """
    mounts: dict[str, list[tuple[str, bool]]] = {}
    for line in _lines(PROC_ROOT / "self/mountinfo"):
        fields = line.split(" ")
        if "-" not in fields:
            continue
        number, point, options = fields[2], _unescape(fields[4]), fields[5]
        source = _unescape(fields[fields.index("-") + 2])
        if number.startswith("0:"):
            number = _number_of_device(source) or number
        mounts.setdefault(number, []).append((point, "rw" in options.split(",")))
    return mounts


def _swaps() -> set[str]:
    paths = [_unescape(line.split()[0]) for line in _lines(PROC_ROOT / "swaps")[1:] if line.split()]
    return {number for path in paths if (number := _number_of_device(path))}


def _number_of_device(path: str) -> str | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return _number(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def _status_of_nearest(path: Path) -> os.stat_result | None:
    """Status of a path, or of its nearest existing parent."""
    for candidate in (path.absolute(), *path.absolute().parents):
        try:
            return candidate.stat()
        except OSError:
            continue
    return None


def _device_name(number: str) -> str:
    return (SYS_ROOT / "dev/block" / number).resolve().name


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _lines(path: Path) -> list[str]:
    return (read_text(path) or "").splitlines()


def _unescape(text: str) -> str:
    """mountinfo and swaps write blanks as ``\\040``."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
