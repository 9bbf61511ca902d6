"""Rollback: an image goes back to the very disk that it was made of.

A restore may go to any disk; a rollback knows its own, and refuses every other one. That is known
by serial number or WWN; a disk that tells neither (an image file, a virtual disk) must have the
size and the partition table's id of the image, or an unfinished restore of just this image.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from imager.blocksource import FileSource
from imager.diskidentity import DiskIdentity, disk_identity, disks
from imager.errors import RefusedError, SourceError
from imager.manifest import Disk, Manifest
from imager.marker import MARKER_SIZE, Marker
from imager.partitions import read_partition_table

_KEYS = ("serial", "wwn")


def find_own_disk(manifest: Manifest, disk: Disk, paths: Iterable[str] | None = None) -> str:
    """The device of this machine that a disk of an image was made of, by serial number or WWN.

    Raises RefusedError when there is none, or several.
    """
    found = [
        path
        for path in (disks() if paths is None else paths)
        if _same_by_name(disk.identity, disk_identity(path))
    ]
    if len(found) == 1:
        return found[0]
    what = f"{manifest.id}/{disk.name}"
    if found:
        raise RefusedError([f"several disks call themselves that of {what}: {', '.join(found)}"])
    known = " ".join(f"{key}={disk.identity[key]}" for key in _KEYS if disk.identity.get(key))
    reason = f"no disk here has {known}" if known else "it had neither serial number nor WWN"
    raise RefusedError(
        [f"the disk that {what} was made of is not found: {reason}"],
        hint="name the disk; to put the image onto another one: imager restore IMAGE DISK --delta",
    )


def why_not_own(manifest: Manifest, disk: Disk, path: str) -> str | None:
    """Why this is not the disk that an image was made of; None when it is."""
    try:
        return _difference(manifest, disk, path)
    except (SourceError, OSError):
        return None  # the plan of the restore says what is wrong with it


def _difference(manifest: Manifest, disk: Disk, path: str) -> str | None:
    identity = disk_identity(path)
    same = _same_by_name(disk.identity, identity)
    if same is not None:
        return None if same else f"{path} is another disk than {manifest.id} was made of"
    with FileSource(path, logical_sector=disk.logical_sector) as source:
        if source.size != disk.size:
            return (
                f"{path} has {source.size} bytes, the disk that {manifest.id} was made of "
                f"had {disk.size}"
            )
        marker = Marker.decode(source.pread(0, min(MARKER_SIZE, source.size)))
        if marker is not None:
            known = marker.root == disk.root
            return None if known else f"{path} has an unfinished restore of {marker.image} on it"
        here, then = read_partition_table(source).disk_id, disk.table.disk_id
    if then and here != then:
        return f"{path} has the partition table {here}, {manifest.id} has {then}"
    return None


def _same_by_name(then: dict[str, Any], now: DiskIdentity) -> bool | None:
    """None when nothing that both tell can decide it."""
    both = [
        (_plain(then.get(key)), _plain(getattr(now, key)))
        for key in _KEYS
        if _plain(then.get(key)) and _plain(getattr(now, key))
    ]
    return all(old == new for old, new in both) if both else None


def _plain(value: object) -> str:
    return str(value or "").strip().lower()
