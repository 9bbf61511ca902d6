"""Filesystems of attached disks: mounted read-only to look for repositories, or to write one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from imager.allocation import identify
from imager.blocksource import FileSource
from imager.deviceuse import uses_of
from imager.diskidentity import disks
from imager.errors import ImagerError
from imager.process import run
from imager.sysfs import entries

MOUNT_POINTS = Path("/run/imager/disks")

# mount(8) options that keep the kernel from writing, replaying a journal included.
_READ_ONLY = {
    "ext2": "ro",
    "ext3": "ro,noload",
    "ext4": "ro,noload",
    "xfs": "ro,norecovery",
    "btrfs": "ro,rescue=nologreplay",
    "vfat": "ro",
    "exfat": "ro",
    "ntfs": "ro",
    "iso9660": "ro",
    "udf": "ro",
}
_KERNEL_NAMES = {"ntfs": "ntfs3"}

# A repository lies near the top of a backup disk; looking through all of it would take long.
_SEARCH_DEPTH = 3
_MOST_FOLDERS = 2000


class Volume(NamedTuple):
    """A filesystem that could be mounted: a partition, or a disk without partitions."""

    device: str
    kind: str
    label: str | None
    size: int


def volumes() -> list[Volume]:
    """Those on attached disks that nobody uses."""
    return [found for path in disks() for device in _parts(path) for found in _look_at(device)]


def mounted_repositories(
    mounts: ExitStack, note: Callable[[str], object]
) -> Iterator[tuple[str, Path]]:
    """Each repository on an attached disk as (device, folder). Where there is one, the filesystem
    stays mounted until ``mounts`` is closed; ``note`` is told what could not be mounted."""
    for volume in volumes():
        with ExitStack() as stack:
            try:
                point = stack.enter_context(mounted(volume))
            except ImagerError as error:
                note(error.message)
                continue
            folders = list(find_repositories(point))
            if folders:
                mounts.push(stack.pop_all())
            for folder in folders:
                yield volume.device, folder


@contextmanager
def mounted(volume: Volume, *, writable: bool = False) -> Iterator[Path]:
    """Mount a filesystem for the time of the block. Raises ToolError when the kernel won't."""
    point = MOUNT_POINTS / Path(volume.device).name
    point.mkdir(parents=True, exist_ok=True)
    kind = _KERNEL_NAMES.get(volume.kind, volume.kind)
    options = "rw" if writable else _READ_ONLY[volume.kind]
    run(["mount", "-t", kind, "-o", options, volume.device, str(point)])
    try:
        yield point
    finally:
        run(["umount", str(point)])


def find_repositories(folder: Path, depth: int = _SEARCH_DEPTH) -> Iterator[Path]:
    """Folders with a ``repository.json``, nearest first."""
    todo, looked_into = [(folder, 0)], 0
    while todo and looked_into < _MOST_FOLDERS:
        at, level = todo.pop(0)
        looked_into += 1
        if (at / "repository.json").is_file():
            yield at
        elif level < depth:
            todo += [
                (below, level + 1)
                for below in entries(at)
                if below.is_dir() and not below.is_symlink()
            ]


def _parts(path: str) -> list[str]:
    """A disk's partitions, or the disk itself."""
    folder = Path("/sys/class/block") / path.removeprefix("/dev/").replace("/", "!")
    parts = [entry.name for entry in entries(folder) if (entry / "partition").exists()]
    return [f"/dev/{name.replace('!', '/')}" for name in parts] or [path]


def _look_at(device: str) -> Iterator[Volume]:
    try:
        if uses_of(device):
            return
        with FileSource(device) as source:
            found = identify(source)
            if found.kind in _READ_ONLY:
                yield Volume(device, found.kind, found.label, source.size)
    except (ImagerError, OSError):
        return  # an empty drive, or a disk that cannot be read: no repository there
