"""What a disk is known by, whatever its device node is called today.

Everything comes from sysfs (Linux Documentation/ABI/stable/sysfs-block and testing/sysfs-*), so
that a rescue system without udev sees the same values as the server did; udev's links fill in
what the kernel does not tell.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imager.jsonrecord import JsonRecord
from imager.sysfs import entries, read_bytes, read_flag, read_number, read_text

# No disks of the machine: memory, loops, layers over disks, optical and floppy drives, network
# blocks, raw flash, and the small boot and replay-protected areas of eMMC.
_NOT_DISKS = re.compile(
    r"(loop|ram|zram|dm-|md|sr|scd|fd|nbd|rbd|drbd|mtdblock|zd)_?\d|mmcblk\d+(boot\d|rpmb|gp\d)"
)

# How a disk is attached, by what its sysfs path goes through; the first that fits.
_TRANSPORTS = (
    ("/usb", "usb"),
    ("/nvme", "nvme"),
    ("/virtio", "virtio"),
    ("/mmc_host", "mmc"),
    ("/rport-", "fc"),
    ("/session", "iscsi"),
    ("/end_device-", "sas"),
    ("/ata", "ata"),
    ("/vbd-", "xen"),
    ("/VMBUS:", "vmbus"),
    ("/host", "scsi"),
)

# sysfs counts sectors of 512 bytes, whatever the device's own.
_SYSFS_SECTOR = 512

# SCSI Primary Commands 4, 7.8.15: the unit serial number page has a header of four bytes.
_SERIAL_PAGE_HEADER = 4


@dataclass(frozen=True)
class DiskIdentity(JsonRecord):
    """Sizes in bytes; every field can be None.

    ``path`` is the disk's device node of the moment: it is no identity. ``wwn`` is like
    "0x5000c500a1b2c3d4" (SCSI, SATA) or "eui.0025385b71b0c1d2" (NVMe). ``transport`` is one of
    nvme, virtio, ata, sas, scsi, usb, fc, iscsi, mmc, xen, vmbus.
    """

    path: str | None = None
    model: str | None = None
    serial: str | None = None
    wwn: str | None = None
    size: int | None = None
    logical_sector: int | None = None
    physical_sector: int | None = None
    rotational: bool | None = None
    removable: bool | None = None
    transport: str | None = None


def disks(sys_root: Path = Path("/")) -> list[str]:
    """Device paths of the machine's disks, in natural order; removable ones are among them."""
    return [
        _node(folder)
        for folder in entries(sys_root / "sys/block")
        if not _NOT_DISKS.match(folder.name)
        and read_number(folder / "size")
        and not read_flag(folder / "hidden")  # one path of a multipath NVMe
    ]


def disk_identity(path: str, sys_root: Path = Path("/")) -> DiskIdentity:
    """The identity of a disk, or of the disk that a partition is on; a file has only a size.

    Never raises: what cannot be read is None.
    """
    folder = _sysfs_folder(path, sys_root)
    if folder is None:
        return DiskIdentity(size=_file_size(path))
    sectors = read_number(folder / "size")
    links = list(_udev_links(folder, sys_root))
    return DiskIdentity(
        path=_node(folder),
        model=_model(folder),
        serial=_serial(folder),
        wwn=_wwn(folder, links),
        size=None if sectors is None else sectors * _SYSFS_SECTOR,
        logical_sector=read_number(folder / "queue/logical_block_size"),
        physical_sector=read_number(folder / "queue/physical_block_size"),
        rotational=read_flag(folder / "queue/rotational"),
        removable=read_flag(folder / "removable"),
        transport=_transport(folder),
    )


def _sysfs_folder(path: str, sys_root: Path) -> Path | None:
    """The disk's folder below sys/devices, or None when the path is no block device.

    Below another root there are no device nodes: the name counts.
    """
    if sys_root == Path("/"):
        number = _device_number(path)
        link = sys_root / "sys/dev/block" / number if number else None
    else:
        name = path.removeprefix("/dev/").replace("/", "!")
        link = sys_root / "sys/class/block" / name
        link = link if link.exists() else sys_root / "sys/block" / name
    if link is None or not link.exists():
        return None
    folder = link.resolve()
    return folder.parent if (folder / "partition").exists() else folder


def _device_number(path: str) -> str | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    if not stat.S_ISBLK(found.st_mode):
        return None
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def _file_size(path: str) -> int | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _node(folder: Path) -> str:
    """sysfs has an exclamation mark where the name of a node has a slash (cciss/c0d0)."""
    return "/dev/" + folder.name.replace("!", "/")


def _model(folder: Path) -> str | None:
    """SCSI and NVMe call it model, MMC name; "ATA" is what SCSI says for every SATA disk."""
    model = read_text(folder / "device/model") or read_text(folder / "device/name")
    vendor = read_text(folder / "device/vendor")
    if model and vendor and vendor != "ATA" and not vendor.startswith("0x"):
        return f"{vendor} {model}"
    return model


def _serial(folder: Path) -> str | None:
    """virtio has it beside the disk, NVMe and MMC below the device, SCSI in a page of its own."""
    page = read_bytes(folder / "device/vpd_pg80")
    from_page = page[_SERIAL_PAGE_HEADER:].decode(errors="replace") if page else ""
    return (
        read_text(folder / "serial")
        or read_text(folder / "device/serial")
        or from_page.strip("\0 ")
        or None
    )


def _wwn(folder: Path, links: list[str]) -> str | None:
    """One spelling for what the kernel and udev write differently."""
    told = read_text(folder / "wwid") or read_text(folder / "device/wwid") or ""
    for name in (told, *links):
        if found := re.match(r"(?:naa\.|wwn-0x)([0-9a-fA-F]{16,32})$", name):
            return "0x" + found[1].lower()
        if found := re.match(r"(?:nvme-)?((?:eui|uuid)\.[0-9a-fA-F-]{16,36})$", name):
            return found[1].lower()
    return None


def _udev_links(folder: Path, sys_root: Path) -> Iterator[str]:
    """Names of the disk's links in /dev/disk/by-id."""
    for link in entries(sys_root / "dev/disk/by-id"):
        try:
            if link.readlink().name == folder.name:
                yield link.name
        except OSError:
            continue


def _transport(folder: Path) -> str | None:
    way = "/" + str(folder).partition("/devices/")[2]
    return next((name for mark, name in _TRANSPORTS if mark in way), None)
