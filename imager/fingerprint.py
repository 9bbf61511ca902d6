"""What hardware a machine has: whether an image fits it, and which drivers it needs.

Everything comes from sysfs and procfs (Linux Documentation/ABI/testing/sysfs-*). Every field can
be None: virtual machines and small boards tell little, and some values are for root only.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imager.diskidentity import DiskIdentity, disk_identity, disks
from imager.jsonrecord import JsonRecord
from imager.sysfs import entries, read_bytes, read_number, read_text

# PCI Code and ID Assignment Specification: the top byte of the class code
_PCI_STORAGE = 0x01
_PCI_BRIDGE = 0x06

# UEFI Specification 2.10, chapter 3.3: a variable of EFI_GLOBAL_VARIABLE
_SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_EFI_ATTRIBUTES_BYTES = 4  # what efivarfs puts before a variable's value

_X86 = frozenset({"x86_64", "i386", "i486", "i586", "i686"})

# What board makers leave in DMI fields that they did not fill in.
_PLACEHOLDERS = frozenset(
    {
        "0",
        "0123456789",
        "default string",
        "n/a",
        "none",
        "not applicable",
        "not available",
        "not specified",
        "o.e.m.",
        "system manufacturer",
        "system product name",
        "system serial number",
        "to be filled by o.e.m.",
        "unknown",
    }
)


@dataclass(frozen=True)
class Device(JsonRecord):
    """A device on a bus, with what decides about its driver.

    ``bus`` is "pci", "virtio", "usb", …; ids are as the bus writes them, like "0x8086".
    """

    bus: str | None = None
    address: str | None = None
    vendor: str | None = None
    device: str | None = None
    driver: str | None = None
    modalias: str | None = None


@dataclass(frozen=True)
class NetworkCard(JsonRecord):
    """A network interface with hardware; ``devices`` from the card itself up to its buses."""

    name: str | None = None
    mac: str | None = None
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True)
class Fingerprint(JsonRecord):
    """A machine. ``firmware`` is "uefi" or "bios"; ``memory`` in bytes.

    ``storage`` has the storage controllers and every other device on the way to a disk: it
    takes the drivers of all of them to reach the disks.
    """

    architecture: str | None = None
    firmware: str | None = None
    secure_boot: bool | None = None
    cpu_model: str | None = None
    memory: int | None = None
    system_vendor: str | None = None
    system_product: str | None = None
    system_serial: str | None = None
    board_vendor: str | None = None
    board_product: str | None = None
    board_serial: str | None = None
    storage: tuple[Device, ...] = ()
    network: tuple[NetworkCard, ...] = ()
    disks: tuple[DiskIdentity, ...] = ()


def read_fingerprint(sys_root: Path = Path("/")) -> Fingerprint:
    """This machine, or the one whose proc/ and sys/ lie in ``sys_root``. Never raises."""
    dmi = sys_root / "sys/class/dmi/id"
    architecture = platform.machine() or None
    paths = disks(sys_root)
    return Fingerprint(
        architecture=architecture,
        firmware=_firmware(sys_root, architecture),
        secure_boot=_secure_boot(sys_root),
        cpu_model=_cpu_model(sys_root),
        memory=_memory(sys_root),
        system_vendor=_dmi(dmi / "sys_vendor"),
        system_product=_dmi(dmi / "product_name") or _device_tree_model(sys_root),
        system_serial=_dmi(dmi / "product_serial"),
        board_vendor=_dmi(dmi / "board_vendor"),
        board_product=_dmi(dmi / "board_name"),
        board_serial=_dmi(dmi / "board_serial"),
        storage=tuple(dict.fromkeys(_storage(sys_root, paths))),
        network=tuple(_network(sys_root)),
        disks=tuple(disk_identity(path, sys_root) for path in paths),
    )


def is_secure_boot_on(sys_root: Path = Path("/")) -> bool:
    """Whether the firmware says so; efivarfs has to be mounted."""
    return bool(_secure_boot(sys_root))


def _firmware(root: Path, architecture: str | None) -> str | None:
    if (root / "sys/firmware/efi").is_dir():
        return "uefi"
    return "bios" if architecture in _X86 and (root / "sys/firmware").is_dir() else None


def _secure_boot(root: Path) -> bool | None:
    raw = read_bytes(root / _SECURE_BOOT) or b""
    return bool(raw[-1]) if len(raw) > _EFI_ATTRIBUTES_BYTES else None


def _cpu_model(root: Path) -> str | None:
    """x86, MIPS, POWER and ARM name it differently."""
    text = read_text(root / "proc/cpuinfo") or ""
    found = re.search(r"^(?:model name|cpu model|cpu|Model|Hardware)\s*:\s*(\S.*)$", text, re.M)
    return " ".join(found[1].split()) if found else None


def _memory(root: Path) -> int | None:
    text = read_text(root / "proc/meminfo") or ""
    found = re.search(r"^MemTotal:\s*(\d{1,18}) kB", text, re.M)
    return int(found[1]) * 1024 if found else None


def _dmi(file: Path) -> str | None:
    text = read_text(file)
    return None if text is None or text.lower() in _PLACEHOLDERS else text


def _device_tree_model(root: Path) -> str | None:
    """The machine's name where there is no DMI."""
    return read_text(root / "sys/firmware/devicetree/base/model")


def _storage(root: Path, paths: list[str]) -> Iterator[Device]:
    """Controllers with or without disks, then what else is on the way to the disks."""
    for folder in entries(root / "sys/bus/pci/devices"):
        if _pci_class(folder) == _PCI_STORAGE:
            yield _device(folder.resolve())
    for path in paths:
        yield from _chain(root / "sys/block" / path.removeprefix("/dev/").replace("/", "!"))


def _network(root: Path) -> Iterator[NetworkCard]:
    for folder in entries(root / "sys/class/net"):
        if (folder / "device").exists():  # else it is a bridge, a tunnel, the loopback
            yield NetworkCard(
                name=folder.name,
                mac=read_text(folder / "bonding_slave/perm_hwaddr")
                or read_text(folder / "address"),
                devices=tuple(_chain(folder)),
            )


def _chain(link: Path) -> Iterator[Device]:
    """The bus devices above a disk or interface, upwards; bridges need no driver of their own."""
    folder = link.resolve()
    for above in folder.parents:
        if above.name == "devices":
            return
        if (above / "modalias").exists() and _pci_class(above) != _PCI_BRIDGE:
            yield _device(above)


def _device(folder: Path) -> Device:
    usb_vendor, usb_product = read_text(folder / "idVendor"), read_text(folder / "idProduct")
    return Device(
        bus=_target_name(folder / "subsystem"),
        address=folder.name,
        vendor=read_text(folder / "vendor") or usb_vendor,
        device=read_text(folder / "device") or usb_product,
        driver=_target_name(folder / "driver"),
        modalias=read_text(folder / "modalias"),
    )


def _pci_class(folder: Path) -> int | None:
    number = read_number(folder / "class")
    return None if number is None else number >> 16


def _target_name(link: Path) -> str | None:
    return link.resolve().name if link.exists() else None
