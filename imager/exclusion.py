"""Partitions that are left out of an image, since a data backup has what is on them.

The map calls their blocks unused, the manifest says that they are left out, and a restore never
writes there: on the same disk the partition stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from imager.allocation import Filesystem
from imager.capture import SourceDisk
from imager.deviceuse import SYS_ROOT, device_numbers
from imager.errors import UsageError
from imager.layout import Volume
from imager.manifest import Disk, Manifest
from imager.sysfs import read_number, read_text

BY_NAME = ("UUID=", "LABEL=", "PARTUUID=", "PARTLABEL=", "/dev/")
"""How imager.toml names a partition: by number it could be one of another disk."""


class _Covering(Protocol):
    """A data backup that has what is on partitions."""

    @property
    def name(self) -> str: ...

    @property
    def exclude_partitions(self) -> tuple[str, ...]: ...


def leave_out(
    disks: Sequence[SourceDisk], asked: Iterable[str], backups: Iterable[_Covering]
) -> list[SourceDisk]:
    """Without the partitions that are asked for, and those that these data backups cover."""
    found = exclude_partitions(disks, asked, "left out as it was asked for")
    for backup in backups:
        reason = f"the data backup {backup.name} has what is on it"
        found = exclude_partitions(found, backup.exclude_partitions, reason, strict=False)
    return found


def leave_out_as(base: Manifest, disks: Sequence[SourceDisk]) -> list[SourceDisk]:
    """Without what ``base`` lacks, when these are its own disks: nothing can be read there, and
    zeros in a new image would be written at a restore."""
    return [_as_in(base.disks[n], disk) for n, disk in enumerate(disks)]


def _as_in(base: Disk, disk: SourceDisk) -> SourceDisk:
    for item in base.partitions:
        for volume in disk.layout.volumes:
            if item.get("excluded") and volume.offset == item.get("offset"):
                known = replace(volume, filesystem=Filesystem.from_json(item["filesystem"]))
                disk = _without(disk, volume, str(item["excluded"]), known)
    return disk


def exclude_partitions(
    disks: Sequence[SourceDisk], wanted: Iterable[str], reason: str, *, strict: bool = True
) -> list[SourceDisk]:
    """The disks with these partitions left out.

    Each is named by number (``3``, or ``sda:3`` with several disks) or as in ``BY_NAME``. Raises
    UsageError for one that no disk has (not ``strict``: it is another disk's), that several have,
    or that is a whole disk.
    """
    found = list(disks)
    for text in wanted:
        matches = [
            (n, volume)
            for n, disk in enumerate(found)
            for volume in disk.layout.volumes
            if volume.partition is not None and _is_meant(text, disk, volume, len(found))
        ]
        if len(matches) > 1:
            raise UsageError(
                f"{text} is more than one partition: it can't be left out by that name"
            )
        if not matches and strict:
            raise UsageError(f"{text}: there is no such partition to leave out")
        for n, volume in matches:
            found[n] = _without(found[n], volume, reason)
    return found


def check_names(names: Iterable[str], where: str) -> None:
    """Raises UsageError for a partition that imager.toml names by its number."""
    for text in names:
        if not text.startswith(BY_NAME):
            raise UsageError(
                f"{where}: exclude-partitions: {text} may be another disk's",
                hint=f"write it as {', '.join(f'{start}…' for start in BY_NAME)}",
            )


def _is_meant(text: str, disk: SourceDisk, volume: Volume, count: int) -> bool:
    part, inside = volume.partition, volume.filesystem
    assert part is not None
    key, _, value = text.partition("=")
    match key:
        case "UUID":
            return (inside.uuid or "").lower() == value.lower() != ""
        case "LABEL":
            return inside.label == value != ""
        case "PARTUUID":
            return (part.uuid or "").lower() == value.lower() != ""
        case "PARTLABEL":
            return part.name == value != ""
    if text.startswith("/dev/"):
        return _is_node(text, disk, part.number)
    name, _, number = text.rpartition(":")
    return number == str(part.number) and (name == disk.name or (not name and count == 1))


def _is_node(path: str, disk: SourceDisk, number: int) -> bool:
    """Whether a device node is that partition of the disk."""
    node = Path(path).resolve().name
    folder = SYS_ROOT / "class/block" / node
    own = read_text(folder / "dev")
    try:
        numbers = device_numbers(disk.source.path) if disk.source.is_device else set()
    except OSError:
        return False
    return own in numbers and read_number(folder / "partition") == number


def _without(
    disk: SourceDisk, volume: Volume, reason: str, known: Volume | None = None
) -> SourceDisk:
    """``known``: the volume as the manifest is to have it, unless it is as it was read."""
    left_out = replace(known or volume, excluded=reason)
    volumes = tuple(left_out if each is volume else each for each in disk.layout.volumes)
    return replace(disk, layout=replace(disk.layout, volumes=volumes))
