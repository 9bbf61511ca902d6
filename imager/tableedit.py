"""Editing the partition table of a restore target, with every id kept or renewed on purpose.

The work is done by sfdisk and libparted, each where it keeps what it should: libparted resizes
plain GPT; it would write boot code and a new signature into an MBR without boot code, and drop
the records of a hybrid MBR, so those are resized by sfdisk. A GPT that no tool accepts (a copy
on a smaller disk, a damaged primary copy) gets its two headers rewritten here, byte for byte the
same but for the places. Every edit is proved by reading the table again.
"""

from __future__ import annotations

import os
import secrets
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from imager.blocksource import FileSource
from imager.errors import IntegrityError, RefusedError, ToolError
from imager.gpt import GptCopy, GptSearch, find_gpt, moved
from imager.loopdevice import loop_device
from imager.mbr import (
    BOOT_CODE_BYTES,
    SECTOR_BYTES,
    BootSector,
    parse_boot_sector,
    set_record_length,
)
from imager.partitions import (
    GPT_SCHEMES,
    Partition,
    PartitionTable,
    read_partition_table,
    smallest_disk,
)
from imager.process import run

# Partitions start and end at multiples of this, like those of all current partitioning tools.
_ALIGNMENT = 1 << 20

_MBR_MAX_SECTORS = 1 << 32

# The caller tells the kernel once, when all is written; foreign bytes in a partition stay.
_SFDISK = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel"]
_SFDISK_EDIT = [*_SFDISK, "--wipe=never", "--wipe-partitions=never"]


@dataclass(frozen=True)
class _Target:
    """What a target has before or after an edit."""

    size: int
    table: PartitionTable
    boot_sector: bytes
    search: GptSearch

    @property
    def boot(self) -> BootSector:
        return parse_boot_sector(self.boot_sector)


def move_backup_gpt(target: str, *, sector_size: int = 512) -> PartitionTable:
    """Put the backup GPT where the target's end is, and make all space up to it usable.

    For a table that was copied from a bigger or smaller disk; ids, attributes, boot code and
    hybrid records stay. Does nothing without a GPT. ``sector_size`` in bytes is that of the
    imaged disk and counts for files; devices have their own.

    Returns the new table. Raises RefusedError when a partition doesn't fit, ToolError, and
    IntegrityError when the result is not as meant.
    """
    before = _read(target, sector_size)
    if before.table.scheme not in GPT_SCHEMES or before.search.copy is None:
        return before.table
    least = smallest_disk(before.table, before.size)
    if least > before.size:
        raise RefusedError(
            [f"{target} has {before.size} bytes, its partitions and the backup GPT need {least}"]
        )
    if not _in_place(before):
        if _sfdisk_accepts(before):
            with _editable(target, before.table.sector_size) as device:
                run([*_SFDISK, "--relocate", "gpt-bak-std", device])
        else:
            _write_copies(target, before, before.search.copy)
    after = _prove(target, sector_size, before, before.table, "moving the backup GPT")
    if not _in_place(after):
        raise IntegrityError(f"the backup GPT of {target} did not move to the end of the disk")
    return after.table


def grow_last_partition(target: str, *, sector_size: int = 512) -> Partition | None:
    """Grow the partition that lies last into the free space behind it, to a full MiB.

    A last logical partition takes its extended partition along. Returns the partition as it is
    then (unchanged without free space), or None when there is none. Errors and ``sector_size``
    as in ``move_backup_gpt``.
    """
    move_backup_gpt(target, sector_size=sector_size)
    before = _read(target, sector_size)
    last = _last(before.table)
    if last is None:
        return None
    if before.table.beyond:
        numbers = ", ".join(str(part.number) for part in before.table.beyond)
        raise RefusedError([f"partition {numbers} reaches beyond the end of {target}"])
    end = _room_end(before, last) // _ALIGNMENT * _ALIGNMENT
    if end <= last.end:
        return last
    grown = _resized(before.table, last, end)
    with _editable(target, before.table.sector_size) as device:
        for old, new in zip(before.table.partitions, grown.partitions, strict=True):
            if old != new:
                _resize(device, before.table, new)
    if before.table.scheme == "hybrid":
        _grow_hybrid_record(target, before, last, end)
    after = _prove(target, sector_size, before, grown, f"growing partition {last.number}")
    return after.table.partition(last.number)


def renew_ids(target: str, *, sector_size: int = 512) -> dict[str, str]:
    """Give the disk and its partitions new random ids, for a copy beside the original.

    Returns old to new: disk GUID and partition GUIDs, or MBR signature and the PARTUUIDs made
    of it. Errors and ``sector_size`` as in ``move_backup_gpt``.
    """
    before = _read(target, sector_size)
    renewed = _with_new_ids(before.table)
    if renewed.disk_id is None or before.table.disk_id is None:
        return {}
    pairs = list(zip(before.table.partitions, renewed.partitions, strict=True))
    with _editable(target, before.table.sector_size) as device:
        run([*_SFDISK, "--disk-id", device, renewed.disk_id])
        for old, new in pairs if before.table.scheme in GPT_SCHEMES else []:
            run([*_SFDISK, "--part-uuid", device, str(old.number), str(new.uuid)])
    _prove(target, sector_size, before, renewed, "renewing ids")
    ids = {str(old.uuid): str(new.uuid) for old, new in pairs}
    return {before.table.disk_id: renewed.disk_id, **ids}


def tell_kernel(target: str) -> None:
    """Have the kernel read the table of a device again; nothing to do for a file.

    Raises ToolError when partitions that changed are in use.
    """
    if not _is_device(target):
        return
    if _read(target, 0).table.partitions:
        run(["partx", "--update", target])
    else:
        run(["partx", "--delete", target], accept=(0, 1))  # 1: it knew of none


def _read(target: str, sector_size: int) -> _Target:
    with FileSource(target, logical_sector=None if _is_device(target) else sector_size) as source:
        table = read_partition_table(source)
        boot_sector = source.pread(0, min(SECTOR_BYTES, source.size))
        last_lba = parse_boot_sector(boot_sector).protective_last_lba
        return _Target(
            size=source.size,
            table=table,
            boot_sector=boot_sector,
            search=find_gpt(source, table.sector_size, last_lba),
        )


def _in_place(state: _Target) -> bool:
    """Whether both copies are sound and say the same, with the backup at the end of the disk."""
    primary, backup = state.search.primary, state.search.backup
    if not (primary and backup and primary.same_table(backup)):
        return False
    last_lba = state.size // primary.sector_size - 1
    return (
        primary.header.other_lba == backup.header.own_lba == last_lba
        and primary.header.last_usable < backup.header.entries_lba
    )


def _sfdisk_accepts(state: _Target) -> bool:
    """sfdisk wants a protective record and a sound primary copy that fits on the disk."""
    usable_end = state.table.last_usable or 0
    return bool(state.search.primary and state.boot.protective and usable_end <= state.size)


def _write_copies(target: str, before: _Target, copy: GptCopy) -> None:
    """Both copies at their places: the backup first, so that there is always a sound one."""
    primary, backup = moved(copy, before.size)
    unit = copy.sector_size
    writes = [
        (at, data)
        for new in (backup, primary)
        for at, data in (
            (new.header.entries_lba * unit, new.entries),
            (new.header.own_lba * unit, new.header.pack(unit)),
        )
    ]
    protective = before.boot.protective
    if protective:
        room = before.size // unit - protective.first
        # A hybrid's protective record ends before the first real one: only cut it.
        count = min(protective.count, room) if before.boot.others else min(room, 0xFFFFFFFF)
        writes.append((0, set_record_length(before.boot_sector, protective.index, count)))
    _write(target, writes)


def _write(target: str, writes: list[tuple[int, bytes]]) -> None:
    fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for offset, data in writes:
            if os.pwrite(fd, data, offset) != len(data):
                raise ToolError(f"short write of {len(data)} bytes at byte {offset} of {target}")
            os.fsync(fd)
    finally:
        os.close(fd)


def _last(table: PartitionTable) -> Partition | None:
    real = [part for part in table.partitions if part.kind != "extended"]
    return max(real, key=lambda part: part.end, default=None)


def _room_end(state: _Target, last: Partition) -> int:
    """Where the free space behind the last partition ends, in bytes."""
    table = state.table
    ends = [state.size, *(part.offset for part in table.partitions if part.offset >= last.end)]
    if table.last_usable is not None:
        ends.append(table.last_usable)
    else:
        ends.append(_MBR_MAX_SECTORS * table.sector_size)
    return min(ends)


def _resized(table: PartitionTable, last: Partition, end: int) -> PartitionTable:
    """The table with that partition, and the extended one around it, ending at ``end``."""

    def resize(part: Partition) -> Partition:
        around = last.kind == "logical" and part.kind == "extended"
        if part == last or (around and part.offset < last.offset and part.end < end):
            return replace(part, size=end - part.offset)
        return part

    return replace(table, partitions=tuple(resize(part) for part in table.partitions))


def _resize(device: str, table: PartitionTable, part: Partition) -> None:
    """Set one partition's size; the start stays. Extended ones come before their logical ones,
    because their numbers are lower."""
    if table.scheme == "gpt":
        _resize_with_parted(device, table, part)
    else:
        sectors = part.size // table.sector_size
        run([*_SFDISK_EDIT, "-N", str(part.number), device], input_bytes=f", {sectors}\n".encode())


def _resize_with_parted(device: str, table: PartitionTable, part: Partition) -> None:
    try:
        import parted
    except ImportError as error:
        raise ToolError(
            f"pyparted is missing, it resizes partitions: {error}", hint="pip install pyparted"
        ) from None
    faults = (  # libparted's errors have no base of their own
        parted.ConstraintException,
        parted.DeviceException,
        parted.DiskException,
        parted.DiskLabelException,
        parted.GeometryException,
        parted.IOException,
        parted.PartedException,
        parted.PartitionException,
    )
    start, end = part.offset // table.sector_size, part.end // table.sector_size - 1
    try:
        parted.getDevice(device).removeFromCache()  # libparted keeps the sizes it has once seen
        disk = parted.newDisk(parted.getDevice(device))
        found = next(p for p in disk.partitions if p.number == part.number)
        area = parted.Geometry(device=disk.device, start=start, end=end)
        disk.setPartitionGeometry(found, parted.Constraint(exactGeom=area), start, end)
        disk.commitToDevice()
        disk.device.removeFromCache()
    except faults as error:
        raise ToolError(f"libparted cannot resize partition {part.number}: {error}") from None


def _grow_hybrid_record(target: str, before: _Target, last: Partition, end: int) -> None:
    """The MBR record of the same partition follows, else systems that read it see the old end."""
    unit = before.table.sector_size
    for record in before.boot.others:
        if record.first * unit == last.offset:
            count = min((end - last.offset) // unit, 0xFFFFFFFF)
            _write(target, [(0, set_record_length(before.boot_sector, record.index, count))])


def _with_new_ids(table: PartitionTable) -> PartitionTable:
    if table.scheme in GPT_SCHEMES:
        parts = tuple(replace(part, uuid=str(uuid.uuid4())) for part in table.partitions)
        return replace(table, disk_id=str(uuid.uuid4()), partitions=parts)
    if table.scheme == "mbr":
        signature = f"{secrets.randbelow(0xFFFFFFFF) + 1:08x}"
        parts = tuple(
            replace(part, uuid=f"{signature}-{part.number:02x}") for part in table.partitions
        )
        return replace(table, disk_id=f"0x{signature}", partitions=parts)
    return table


def _prove(
    target: str, sector_size: int, before: _Target, wanted: PartitionTable, edit: str
) -> _Target:
    """Read again; everything must be as ``wanted``, and the boot code as before."""
    after = _read(target, sector_size)
    faults = [
        f"{name} is {found!r}, not {expected!r}"
        for name in ("scheme", "disk_id", "sector_size", "partitions", "beyond")
        if (found := getattr(after.table, name)) != (expected := getattr(wanted, name))
    ]
    if after.boot_sector[:BOOT_CODE_BYTES] != before.boot_sector[:BOOT_CODE_BYTES]:
        faults.append("the boot code changed")
    if _starts(after) != _starts(before):
        faults.append("the records of the MBR changed")
    faults += [note for note in after.table.notes if note not in before.table.notes]
    if faults:
        raise IntegrityError(f"after {edit}, the table of {target} is wrong: " + "; ".join(faults))
    return after


def _starts(state: _Target) -> list[tuple[int, int, int, int]]:
    """What stays of the MBR's records in every edit: all but their lengths."""
    return [(r.index, r.status, r.type, r.first) for r in state.boot.records]


@contextmanager
def _editable(target: str, sector_size: int) -> Iterator[str]:
    """A path where tools see the table's sector size: files always count as 512 for them."""
    if _is_device(target) or sector_size == 512:
        yield target
    else:
        with loop_device(target, sector_size=sector_size) as device:
            yield device


def _is_device(target: str) -> bool:
    return stat.S_ISBLK(Path(target).stat().st_mode)
