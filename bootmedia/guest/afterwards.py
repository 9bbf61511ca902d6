"""What makes a restored disk boot in this machine, and what its owner has to know."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bootmedia.guest.attached import Volume, mounted
from bootmedia.guest.bootentry import (
    EFIVARS,
    HardDrive,
    LoadOption,
    Variables,
    mount_variables,
    put_first,
)
from bootmedia.guest.fallback import Loader, fill_fallback, find_loader
from bootmedia.guest.networkcards import absent_cards
from imager.allocation import identify
from imager.blocksource import FileSource, PartSource
from imager.data.model import backups_of
from imager.errors import ImagerError
from imager.fingerprint import read_fingerprint
from imager.loopdevice import loop_device
from imager.manifest import Disk, Manifest
from imager.partitions import GPT_SCHEMES, Partition, PartitionTable, read_partition_table
from imager.plan import RestorePlan
from imager.sysfs import read_number
from imager.tableedit import tell_kernel

# UEFI Specification 2.10, table 5.7 and 5.2.2 (MBR)
_ESP_TYPES = frozenset({"C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "0xef"})

_ROOT_KINDS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs"})

# Nodes appear by devtmpfs soon after the kernel has read the table.
_NODE_SECONDS = 3

Say = Callable[[str], object]


def finish(
    manifest: Manifest,
    disk: Disk,
    plan: RestorePlan,
    target: str,
    *,
    fill_fallback: bool,
    boot_entry: bool,
    log: Say,
) -> tuple[str, ...]:
    """After the restore of a disk to the device ``target``; each line that people have to read,
    which ``log`` gets too. Nothing here fails the restore: what can't be done is a line.
    """
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        log(text)

    if plan.whole_disk:
        steps: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
            ("the kernel's partition table", lambda: _tell_kernel(target)),
            (
                "what the firmware needs",
                lambda: _boot_by_uefi(
                    manifest, target, disk.logical_sector, fallback=fill_fallback, entry=boot_entry
                ),
            ),
            ("network cards", lambda: _network_cards(target, disk.logical_sector)),
        )
        for what, step in steps:
            try:
                for text in step():
                    say(text)
            except (ImagerError, OSError) as error:
                say(f"{what}: {error}")
    for text in data_backups(manifest):
        say(text)
    return tuple(lines)


def data_backups(manifest: Manifest) -> Iterator[str]:
    """The data backups that were taken with the image, and the command that brings each back."""
    try:
        backups = backups_of(manifest)
    except ImagerError as error:
        yield f"data backups: {error.message}"
        return
    for backup in backups:
        named = f"data backup {backup.name}, {backup.engine}, {backup.finished}"
        if backup.snapshot is None:
            yield f"{named}: it FAILED when the image was made: {backup.error}"
        else:
            partly = ", NOT WHOLE" if backup.warnings else ""
            yield f"{named}{partly}; by hand: {shlex.join(backup.restore)}"


def _tell_kernel(target: str) -> Iterator[str]:
    tell_kernel(target)
    yield from ()


# --- booting ------------------------------------------------------------------------------------


def _boot_by_uefi(
    manifest: Manifest, target: str, sector: int, *, fallback: bool, entry: bool
) -> Iterator[str]:
    table = _table(target, sector)
    esp = next((part for part in table.partitions if part.type in _ESP_TYPES), None)
    if esp is None:
        return
    loader: Loader | None = None
    try:
        with _mounted(target, esp, "vfat", writable=fallback) as folder:
            loader = find_loader(folder)
            if fallback:
                yield from _fill(folder)
    except ImagerError as error:
        yield f"the EFI system partition can't be mounted here: {error.message}"
    if entry:
        yield from _write_entry(manifest, table, esp, loader)


def _fill(folder: Path) -> Iterator[str]:
    try:
        added = fill_fallback(folder)
    except ImagerError as error:
        yield error.message
        return
    if added:
        yield (
            f"added to the EFI system partition, which differs from the image now: "
            f"{', '.join(added)} (firmware without a boot entry starts it)"
        )


def _write_entry(
    manifest: Manifest, table: PartitionTable, esp: Partition, loader: Loader | None
) -> Iterator[str]:
    if not EFIVARS.parent.is_dir():
        yield "no UEFI boot entry was written: this system was started by BIOS"
        return
    if loader is None:
        yield "no UEFI boot entry was written: the EFI system partition has no known boot loader"
        return
    mount_variables()
    drive = HardDrive.of(esp, table.sector_size, is_gpt=table.scheme in GPT_SCHEMES)
    title = manifest.name if loader.system.lower() == "boot" else loader.system
    option = LoadOption(title or "Linux", drive, loader.path)
    try:
        number, is_new = put_first(option, Variables())
    except ImagerError as error:
        hint = f" ({error.hint})" if error.hint else ""
        yield f"no UEFI boot entry was written: {error.message}{hint}"
        return
    what = "a new UEFI boot entry" if is_new else "the UEFI boot entry that was there"
    yield f"{what}, Boot{number:04X} “{option.description}”, starts {loader.path} first"


# --- network cards ------------------------------------------------------------------------------


def _network_cards(target: str, sector: int) -> Iterator[str]:
    here = read_fingerprint()
    if not here.network:
        return
    table = _table(target, sector)
    for part in table.partitions:
        kind = _kind(target, part, sector)
        if kind not in _ROOT_KINDS:
            continue
        try:
            with _mounted(target, part, kind) as folder:
                for root in (folder, folder / "@", folder / "root", folder / "@rootfs"):
                    if (root / "etc/fstab").is_file() or (root / "etc/os-release").exists():
                        yield from absent_cards(root, here)
                        return
        except ImagerError as error:
            yield f"partition {part.number} can't be looked into for network settings: {error}"


# --- the target ---------------------------------------------------------------------------------


def _table(target: str, sector: int) -> PartitionTable:
    with FileSource(target, logical_sector=sector) as source:
        return read_partition_table(source)


def _kind(target: str, part: Partition, sector: int) -> str:
    with FileSource(target, logical_sector=sector) as source:
        return identify(PartSource(source, part.offset, part.size)).kind


@contextmanager
def _mounted(target: str, part: Partition, kind: str, *, writable: bool = False) -> Iterator[Path]:
    """A partition of the target; without a node of the kernel's through a loop device."""
    with ExitStack() as stack:
        device = _node(target, part) or stack.enter_context(
            loop_device(target, part.offset, part.size, read_only=not writable)
        )
        volume = Volume(device, kind, None, part.size)
        yield stack.enter_context(mounted(volume, writable=writable))


def _node(target: str, part: Partition) -> str | None:
    """The kernel's node of a partition, when it has it at the same place."""
    folder = Path("/sys/class/block") / Path(target).resolve().name
    if not folder.is_dir():
        return None
    for _ in range(_NODE_SECONDS * 10):
        for entry in folder.glob("*/partition"):
            is_it = read_number(entry) == part.number
            start = read_number(entry.parent / "start")
            node = Path("/dev") / entry.parent.name.replace("!", "/")
            if is_it and start is not None and start * 512 == part.offset and node.exists():
                return str(node)
        if not any(folder.glob("*/partition")) and folder.name.startswith("loop"):
            return None
        time.sleep(0.1)
    return None
