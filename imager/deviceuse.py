"""Who uses a disk or a file: mounts, swap, and devices stacked on it; and what a path lies on."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
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


class LiveFilesystem(NamedTuple):
    """A filesystem that is mounted for writing. ``number``: ``major:minor`` of its device."""

    number: str
    device: str
    kind: str
    points: tuple[str, ...]
    """Where it is mounted; another mount may lie on top there."""


class _Mount(NamedTuple):
    id: str
    number: str
    point: str
    kind: str
    writable: bool


def uses_of(path: str) -> list[Use]:
    """Every use of a block device, its partitions, and what is stacked on them (RAID, LVM, LUKS,
    loop devices), or of a regular file through loop devices."""
    mounts, swaps = _mounts(), _swaps()
    uses = []
    for number in sorted(_stack(path)):
        name = _device_name(number)
        uses += [
            Use(name, f"mounted at {mount.point}", mount.writable)
            for mount in mounts
            if mount.number == number
        ]
        if number in swaps:
            uses.append(Use(name, "in use as swap", True))
    return uses


def live_filesystems(paths: Iterable[str]) -> list[LiveFilesystem]:
    """Filesystems that are mounted for writing and lie on these disks or files, by way of whatever
    is stacked on them. What lies on another one of them (a file of it, through a loop device)
    comes before that."""
    ours = {number for path in paths for number in _stack(path)}
    by_number: dict[str, list[_Mount]] = {}
    for mount in _mounts():
        if mount.writable and not mount.number.startswith("0:"):
            by_number.setdefault(mount.number, []).append(mount)
    below = {number: _numbers_below(number) for number in by_number}
    found = [number for number in by_number if below[number] & ours]
    return [
        LiveFilesystem(
            number,
            _device_name(number),
            by_number[number][0].kind,
            tuple(mount.point for mount in by_number[number]),
        )
        for number in sorted(found, key=lambda number: (-len(below[number]), number))
    ]


def filesystem_of(fd: int) -> str | None:
    """``major:minor`` of the device that an open file's filesystem is on; of Btrfs, whose files
    show an anonymous number, the one that it is mounted by. None when it has none."""
    mount = next((m for m in _mounts() if m.id == _mount_id(fd)), None)
    return None if mount is None or mount.number.startswith("0:") else mount.number


def device_numbers(path: str) -> set[str]:
    """``major:minor`` of a device, its parent disk, its partitions, and of all that is stacked on
    it; for a regular file of the loop devices that it backs."""
    return _stack(path)


def disk_numbers_below(path: Path) -> set[str]:
    """``major:minor`` of all devices that the filesystem of ``path`` lies on, down to the disks."""
    number = _filesystem_of_nearest(path)
    return _numbers_below(number) if number else set()


def _numbers_below(number: str) -> set[str]:
    found: set[str] = set()
    todo = [number]
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
            lower = _number_of_device(backing) or _filesystem_of_nearest(Path(backing))
            if lower is not None:
                todo.append(lower)
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


def _mounts() -> list[_Mount]:
    """From proc(5) mountinfo. Btrfs shows an anonymous number there: its source path tells the
    device."""
    mounts = []
    for line in _lines(PROC_ROOT / "self/mountinfo"):
        fields = line.split(" ")
        if "-" not in fields:
            continue
        number, point, options = fields[2], _unescape(fields[4]), fields[5]
        kind, source = fields[fields.index("-") + 1], _unescape(fields[fields.index("-") + 2])
        if number.startswith("0:"):
            number = _number_of_device(source) or number
        mounts.append(_Mount(fields[0], number, point, kind, "rw" in options.split(",")))
    return mounts


def _mount_id(fd: int) -> str | None:
    """proc(5) fdinfo: the mount that an open file was reached by."""
    lines = _lines(PROC_ROOT / "self/fdinfo" / str(fd))
    return next((line.split()[1] for line in lines if line.startswith("mnt_id:")), None)


def _swaps() -> set[str]:
    paths = [_unescape(line.split()[0]) for line in _lines(PROC_ROOT / "swaps")[1:] if line.split()]
    return {number for path in paths if (number := _number_of_device(path))}


def _number_of_device(path: str) -> str | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return _number(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def _filesystem_of_nearest(path: Path) -> str | None:
    """Of a path, or of its nearest existing parent; ``major:minor``."""
    for candidate in (path.absolute(), *path.absolute().parents):
        try:
            fd = os.open(candidate, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            return filesystem_of(fd) or _number(os.fstat(fd).st_dev)
        finally:
            os.close(fd)
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
