"""A medium onto a stick: with a restore's care for the target, and read back.

The first piece, with the partition table and the boot sector, is written last: a stick that was
not finished does not boot. The stick begins with the very bytes of the ISO. Its backup GPT stays
where the ISO ends, which firmware and kernel accept, so that the stick can be compared to the ISO.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bootmedia.iso import read_iso_file
from bootmedia.medium import RECORD_PATH, Medium
from imager.blocksource import FileSource, aligned_buffer
from imager.contents import what_is_on
from imager.deviceuse import device_numbers, disk_numbers_below, uses_of
from imager.diskidentity import DiskIdentity, disk_identity
from imager.errors import ImagerError, IntegrityError, RefusedError
from imager.process import run
from imager.progress import Progress
from imager.target import Target
from imager.units import show_bytes

# Sticks write whole erase blocks, of some MiB.
_PIECE = 4 << 20
# The medium's partition table counts sectors of this size.
_SECTOR = 512
# UEFI Specification 2.10, 5.3: the header and at least 16 KiB of entries
_BACKUP_GPT = _SECTOR + 16384


@dataclass(frozen=True)
class WritePlan:
    """A medium on its way to a stick; sizes in bytes. Not to be carried out with ``refusals``."""

    iso: str
    medium: Medium
    size: int
    target: str
    target_size: int
    identity: DiskIdentity
    overwrites: tuple[str, ...]
    refusals: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "medium": {"id": self.medium.id, "volume": self.medium.volume},
            "identity": self.identity.to_json(),
        }


def plan_write(iso: str, target: str) -> WritePlan:
    """All that is known before the first write. Writes nothing.

    Raises ImagerError when ``iso`` is no rescue medium, SourceError when the target can't be read.
    """
    medium = read_medium(Path(iso))
    size = Path(iso).stat().st_size
    with FileSource(target) as stick:
        return WritePlan(
            iso=iso,
            medium=medium,
            size=size,
            target=target,
            target_size=stick.size,
            identity=disk_identity(target),
            overwrites=tuple(what_is_on(stick)),
            refusals=tuple(_reasons_against(stick, iso, size)),
        )


def write_medium(plan: WritePlan, progress: Progress) -> None:
    """Write the ISO, and compare what the device then reads as.

    Raises RefusedError for a plan with refusals, IntegrityError with the first byte that reads
    back differently, ImagerError when the device fails.
    """
    if plan.refusals:
        raise RefusedError(list(plan.refusals))
    with ExitStack() as stack:
        source = stack.enter_context(Path(plan.iso).open("rb"))
        target = stack.enter_context(Target(plan.target))
        piece = stack.enter_context(aligned_buffer(_PIECE))
        try:
            _write(source, target, piece, plan.size, progress)
            _compare(source, target, piece, plan.size, progress)
        except IntegrityError:
            raise
        except ImagerError as error:  # the hint is a restore's
            hint = "the stick does not boot now: write it again, or use another one"
            raise ImagerError(error.message, hint=hint) from None
    # Without it the kernel keeps the partitions that were there before.
    run(["blockdev", "--rereadpt", plan.target], accept=range(256))


def read_medium(iso: Path) -> Medium:
    """The record of a medium's ISO. Raises ImagerError when it is not a rescue medium."""
    return Medium.from_bytes(read_iso_file(iso, RECORD_PATH), RECORD_PATH)


def _reasons_against(stick: FileSource, iso: str, size: int) -> Iterator[str]:
    path = stick.path
    if not stick.is_device:
        yield f"{path} is not a disk"
        return
    if disk_identity(path).path != os.path.realpath(path) and _is_partition(path):
        yield f"{path} is a partition: a medium boots from a whole disk only"
    for use in uses_of(path):
        yield f"{path}: {use.device} is {use.description}"
    if device_numbers(path) & disk_numbers_below(Path(iso)):
        yield f"{path} holds {iso} itself"
    if stick.size < size:
        yield f"{path} has {stick.size} bytes; the medium needs {size} ({show_bytes(size)})"
    if stick.logical_sector != _SECTOR:
        yield (
            f"{path} has sectors of {stick.logical_sector} bytes: firmware would not understand "
            f"the medium's partition table, which counts {_SECTOR}"
        )


def _is_partition(path: str) -> bool:
    return Path("/sys/class/block", Path(path).resolve().name, "partition").exists()


def _write(
    source: BinaryIO, target: Target, piece: memoryview, size: int, progress: Progress
) -> None:
    progress.start(f"write {target.path}", size)
    # An older table would make an unfinished stick look usable.
    target.zero(0, min(_PIECE, size))
    _remove_stale_gpt(target, size)
    target.sync()
    for offset in [*range(_PIECE, size, _PIECE), 0]:
        if offset == 0:
            target.sync()
        length = _fill(source, piece, offset, size)
        target.write(offset, piece[:length])
        progress.advance(length)
    target.sync()


def _remove_stale_gpt(target: Target, size: int) -> None:
    """What a former table left at the end: tools would find it and offer to bring it back."""
    with aligned_buffer(_SECTOR) as sector:
        target.read_into(target.size - _SECTOR, sector)
        if bytes(sector[:8]) == b"EFI PART" and target.size - _BACKUP_GPT >= size:
            target.zero(target.size - _BACKUP_GPT, _BACKUP_GPT)


def _compare(
    source: BinaryIO, target: Target, piece: memoryview, size: int, progress: Progress
) -> None:
    progress.start(f"read back {target.path}", size)
    target.drop_cache()
    with aligned_buffer(_PIECE) as found:
        for offset in range(0, size, _PIECE):
            length = _fill(source, piece, offset, size)
            target.read_into(offset, found[:length])
            if found[:length] != piece[:length]:
                first = next(n for n in range(length) if found[n] != piece[n])
                raise IntegrityError(
                    f"{target.path} does not hold what was written: byte {offset + first} differs",
                    hint="the stick is broken, or smaller than it says: use another one",
                )
            progress.advance(length)


def _fill(source: BinaryIO, piece: memoryview, offset: int, size: int) -> int:
    """Bytes read into the piece: all of it, or up to the file's end."""
    length = min(_PIECE, size - offset)
    source.seek(offset)
    if source.readinto(piece[:length]) != length:  # type: ignore[attr-defined]
        raise ImagerError(f"{source.name} became shorter while it was read")
    return length
