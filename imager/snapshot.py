"""LVM snapshots: logical volumes as they were at one moment, while they are written on.

A disk with physical volumes is read through the snapshots where a mounted logical volume lies, and
LVM's own metadata is what it was before: the image has the volume group without the snapshots.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from imager.blocksource import BlockSource, FileSource
from imager.deviceuse import SYS_ROOT, LiveFilesystem, device_numbers
from imager.errors import ImagerError, ToolError
from imager.extents import Extents
from imager.process import find_tool, run
from imager.sysfs import entries, read_number, read_text

# Sectors of sysfs and of device-mapper's tables, whatever the disk has.
_SECTOR = 512

_PREFIX = "imager-snapshot-"


class _Reads(Protocol):
    def read_into(self, offset: int, buffer: memoryview) -> None: ...

    def pread(self, offset: int, length: int) -> bytes: ...


class _Kept:
    """Bytes that were read before."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._content[offset : offset + len(buffer)]

    def pread(self, offset: int, length: int) -> bytes:
        return self._content[offset : offset + length]


class _Patch(NamedTuple):
    """A range of the disk, in bytes, and where its content comes from instead."""

    offset: int
    length: int
    source: _Reads
    at: int


class PatchedSource:
    """A source with ranges that are read from elsewhere. Does not own any of them."""

    def __init__(self, base: BlockSource, patches: Iterable[_Patch]) -> None:
        """Patches must not overlap."""
        self._base = base
        self._patches = sorted(patches, key=lambda patch: patch.offset)
        self.path, self.size = base.path, base.size
        self.logical_sector, self.physical_sector = base.logical_sector, base.physical_sector
        self.is_device = base.is_device

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for source, at, start, length in self._parts(offset, len(buffer)):
            source.read_into(at, buffer[start : start + length])

    def pread(self, offset: int, length: int) -> bytes:
        return b"".join(
            source.pread(at, size) for source, at, _, size in self._parts(offset, length)
        )

    def data_extents(self) -> Extents:
        return Extents.whole(self.size)

    def _parts(self, offset: int, length: int) -> Iterator[tuple[_Reads, int, int, int]]:
        """Source, where in it, where in the result, and how many bytes."""
        at, end = offset, offset + length
        for patch in self._patches:
            stop = patch.offset + patch.length
            if stop <= at or patch.offset >= end:
                continue
            if patch.offset > at:
                yield self._base, at, at - offset, patch.offset - at
                at = patch.offset
            size = min(stop, end) - at
            yield patch.source, patch.at + at - patch.offset, at - offset, size
            at += size
        if at < end or length == 0:
            yield self._base, at, at - offset, end - at


class _Run(NamedTuple):
    """A piece of a logical volume on a device that is no part of anything: offsets in bytes."""

    volume_offset: int
    length: int
    disk: str
    """``major:minor`` of the whole disk."""
    disk_offset: int


class _Volume(NamedTuple):
    number: str
    group: str
    name: str
    extents: int
    runs: tuple[_Run, ...]

    @property
    def path(self) -> str:
        return f"{self.group}/{self.name}"


class _Unfit(ImagerError):
    """Why no snapshot can be used."""


def is_volume(filesystem: LiveFilesystem) -> bool:
    """Whether it is on a logical volume."""
    uuid = read_text(SYS_ROOT / "dev/block" / filesystem.number / "dm/uuid")
    return uuid is not None and uuid.startswith("LVM-")


def why_no_snapshot(live: Sequence[LiveFilesystem]) -> list[str]:
    """Why these filesystems can't be captured by snapshots; empty when they can. One that is on
    no logical volume is no reason as long as another is."""
    volumes = [each for each in live if is_volume(each)]
    if not volumes:
        return ["no filesystem of it is on a logical volume of LVM"]
    if find_tool("lvm") is None or find_tool("dmsetup") is None:
        return ["lvm2 is not installed"]
    try:
        found = _volumes(volumes)
        for group in {volume.group for volume in found}:
            _share(group, [volume for volume in found if volume.group == group])
    except ImagerError as error:
        return [error.message]
    return []


# --- what LVM says ------------------------------------------------------------------------------


def _volumes(live: Sequence[LiveFilesystem]) -> list[_Volume]:
    """Raises _Unfit for one that is not simply pieces of disks."""
    rows = {
        f"{row['lv_kernel_major']}:{row['lv_kernel_minor']}": row
        for row in _report("lvs", "vg_name,lv_name,lv_size,vg_extent_size", kernel=True)
    }
    found = []
    for each in live:
        row = rows.get(each.number)
        if row is None:
            raise _Unfit(f"LVM does not know {each.device}")
        extents = int(row["lv_size"]) // int(row["vg_extent_size"])
        name = f"{row['vg_name']}/{row['lv_name']}"
        runs = tuple(_runs(each.number, name))
        found.append(_Volume(each.number, row["vg_name"], row["lv_name"], extents, runs))
    return found


def _report(command: str, columns: str, *, kernel: bool = False) -> list[dict[str, str]]:
    """A report of LVM, sizes in bytes. Raises ToolError."""
    more = ",lv_kernel_major,lv_kernel_minor" if kernel else ""
    options = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", columns + more]
    said: dict[str, Any] = json.loads(run([command, *options]).stdout)
    (rows,) = said["report"][0].values()
    return list(rows)


def _runs(number: str, name: str) -> Iterator[_Run]:
    """From the table of device-mapper: start, length, "linear", device, offset; in sectors."""
    major, minor = number.split(":")
    table = run(["dmsetup", "table", "--major", major, "--minor", minor]).stdout.decode()
    for line in table.splitlines():
        start, length, kind, *rest = line.split()
        if kind != "linear":
            raise _Unfit(f"the logical volume {name} is of the kind {kind}, not linear")
        disk, offset = _on_disk(rest[0], name)
        yield _Run(
            int(start) * _SECTOR,
            int(length) * _SECTOR,
            disk,
            offset + int(rest[1]) * _SECTOR,
        )


def _on_disk(number: str, what: str) -> tuple[str, int]:
    """The disk of a device and where on it that begins. Raises _Unfit for one that is stacked."""
    folder = (SYS_ROOT / "dev/block" / number).resolve()
    if entries(folder / "slaves"):
        raise _Unfit(f"{what} lies on {folder.name}, which itself lies on others")
    if not (folder / "partition").exists():
        return number, 0
    disk = read_text(folder.parent / "dev")
    start = read_number(folder / "start")
    assert disk is not None and start is not None
    return disk, start * _SECTOR


def _share(group: str, volumes: Sequence[_Volume]) -> int:
    """How many free extents of the group each of its snapshots may have. Raises _Unfit."""
    rows = _report("vgs", "vg_name,vg_free_count")
    free = next(int(row["vg_free_count"]) for row in rows if row["vg_name"] == group)
    share = free // len(volumes)
    if share < 1:
        raise _Unfit(f"the volume group {group} has no free space for a snapshot")
    return share


# --- taking them --------------------------------------------------------------------------------


class Snapshots:
    """Snapshots as long as they are there, and the disks read through them."""

    def __init__(self, sources: Sequence[BlockSource], names: Sequence[str], made: dict[str, str]):
        self.sources = list(sources)
        self.names = list(names)
        """Of the logical volumes: group/name."""
        self._made = made

    def check(self) -> None:
        """Raises ImagerError when one has overflowed: what was read through it is worth nothing."""
        rows = _report("lvs", "vg_name,lv_name,lv_snapshot_invalid")
        for row in rows:
            path = f"{row['vg_name']}/{row['lv_name']}"
            if path in self._made and row["lv_snapshot_invalid"] not in ("", "0"):
                raise ImagerError(
                    f"the snapshot of {self._made[path]} overflowed: there is no image",
                    hint="leave more free space in the volume group, or capture at a quieter time",
                )


@contextmanager
def taken(live: Sequence[LiveFilesystem], sources: Sequence[BlockSource]) -> Iterator[Snapshots]:
    """Snapshots of the logical volumes among these; they are removed in the end.

    LVM freezes each filesystem for the moment of its snapshot. Raises ImagerError.
    """
    volumes = _volumes([each for each in live if is_volume(each)])
    groups = sorted({volume.group for volume in volumes})
    _remove_left(groups)
    kept = [_kept(source, groups) for source in sources]
    with ExitStack() as stack:
        made, opened = {}, {}
        for group in groups:
            members = [volume for volume in volumes if volume.group == group]
            share = _share(group, members)
            for volume in members:
                snapshot = _take(volume, min(share, volume.extents + 1), stack)
                made[snapshot] = volume.path
                opened[volume.number] = stack.enter_context(FileSource(f"/dev/{snapshot}"))
        found = [list(_patches(source, volumes, opened)) for source in sources]
        used = {id(patch.source) for patches in found for patch in patches}
        for volume in volumes:
            if id(opened[volume.number]) not in used:
                raise ImagerError(f"{volume.path} lies on none of the disks that are captured")
        patched = [
            PatchedSource(source, [*metadata, *patches])
            for source, metadata, patches in zip(sources, kept, found, strict=True)
        ]
        yield Snapshots(patched, [volume.path for volume in volumes], made)


def _take(volume: _Volume, extents: int, stack: ExitStack) -> str:
    snapshot = f"{_PREFIX}{os.getpid()}-{volume.number.replace(':', '-')}"
    stack.callback(_remove, f"{volume.group}/{snapshot}")
    run(["lvcreate", "-q", "-y", "-s", "-n", snapshot, "-l", str(extents), volume.path])
    return f"{volume.group}/{snapshot}"


def _remove(snapshot: str) -> None:
    """Nothing if it is not there."""
    try:
        run(["lvremove", "-q", "-f", snapshot])
    except ToolError as error:
        known = [f"{row['vg_name']}/{row['lv_name']}" for row in _report("lvs", "vg_name,lv_name")]
        if snapshot in known:
            raise ImagerError(
                f"the snapshot {snapshot} could not be removed: {error.message}",
                hint=f"it slows writing down until it is gone: lvremove {snapshot}",
            ) from None


def _remove_left(groups: Sequence[str]) -> None:
    """Of captures that were killed."""
    for row in _report("lvs", "vg_name,lv_name"):
        name = row["lv_name"]
        if row["vg_name"] in groups and name.startswith(_PREFIX):
            pid = name.removeprefix(_PREFIX).split("-")[0]
            if not Path("/proc", pid).exists():
                _remove(f"{row['vg_name']}/{name}")


def _kept(source: BlockSource, groups: Sequence[str]) -> list[_Patch]:
    """What lies before and behind the extents of the groups' physical volumes: label and metadata,
    as they are now, without the snapshots that are to come."""
    columns = "pv_name,vg_name,pe_start,pv_pe_count,dev_size,vg_extent_size"
    found = []
    for row in _report("pvs", columns):
        if row["vg_name"] not in groups:
            continue
        begin = _place_in(source, *_on_disk(_number(row["pv_name"]), row["pv_name"]))
        if begin is None:
            continue
        start, extent_size = int(row["pe_start"]), int(row["vg_extent_size"])
        end = start + int(row["pv_pe_count"]) * extent_size
        for offset, length in ((0, start), (end, int(row["dev_size"]) - end)):
            if length > 0:
                content = source.pread(begin + offset, length)
                found.append(_Patch(begin + offset, length, _Kept(content), 0))
    return found


def _patches(
    source: BlockSource, volumes: Sequence[_Volume], opened: dict[str, FileSource]
) -> Iterator[_Patch]:
    number = _number(source.path) if source.is_device else None
    for volume in volumes:
        if volume.number == number:
            yield _Patch(0, source.size, opened[volume.number], 0)
        for piece in volume.runs:
            begin = _place_in(source, piece.disk, piece.disk_offset)
            if begin is not None:
                reading = opened[volume.number]
                yield _Patch(begin, piece.length, reading, piece.volume_offset)


def _place_in(source: BlockSource, disk: str, offset: int) -> int | None:
    """Where a byte of a disk is in a source, which may be that disk, a partition of it, or the
    file behind it; None when it is not there."""
    if not source.is_device:
        return offset if disk in device_numbers(source.path) else None
    try:
        source_disk, start = _on_disk(_number(source.path), source.path)
    except _Unfit:
        return None
    within = offset - start
    return within if source_disk == disk and 0 <= within < source.size else None


def _number(device: str) -> str:
    status = Path(device).stat()
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
