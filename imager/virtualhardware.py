"""A virtual machine for an image: like the imaged one as far as QEMU has its devices, and with what
the system in the image has drivers for.
"""

from __future__ import annotations

from imager.bootdrivers import BootDrivers, module_name
from imager.errors import FormatError
from imager.fingerprint import Fingerprint
from imager.manifest import Disk, Manifest
from imager.partitions import PartitionTable
from imager.qemu import Hardware

# UEFI Specification 2.10, table 5.7; GRUB's own type for where its core lies on a GPT disk.
_ESP = frozenset({"C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "0xef"})
_BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"

# What it takes to reach a disk on each of QEMU's buses; the fastest to emulate first.
_BUS_MODULES = {
    "virtio": ("virtio_pci", "virtio_blk"),
    "sata": ("ahci", "sd_mod"),
    "virtio-scsi": ("virtio_pci", "virtio_scsi", "sd_mod"),
    "nvme": ("nvme",),
    "megaraid": ("megaraid_sas", "sd_mod"),
    "pvscsi": ("vmw_pvscsi", "sd_mod"),
    "usb": ("xhci_pci", "usb_storage", "sd_mod"),
}
# The bus that is like what a driver was for.
_BUS_OF_DRIVER = {
    "virtio_blk": "virtio",
    "virtio_scsi": "virtio-scsi",
    "ahci": "sata",
    "ata_piix": "sata",
    "nvme": "nvme",
    "megaraid_sas": "megaraid",
    "vmw_pvscsi": "pvscsi",
}
_CARD_MODULES = {
    "virtio-net-pci": "virtio_net",
    "e1000e": "e1000e",
    "e1000": "e1000",
    "vmxnet3": "vmxnet3",
    "rtl8139": "8139cp",
}
_SATA_PORTS = 6


def choose_hardware(manifest: Manifest, drivers: BootDrivers | None) -> Hardware:
    """``drivers`` is what the image's own system says; without it, what the imaged machine had."""
    imaged = imaged_machine(manifest)
    return Hardware(
        firmware=choose_firmware(manifest),
        bus=_choose_bus(manifest, imaged, drivers),
        card=_choose_card(imaged, drivers),
    )


def imaged_machine(manifest: Manifest) -> Fingerprint:
    """Nothing is known when the manifest says nothing that can be read."""
    try:
        return Fingerprint.from_json(manifest.document.get("hardware") or {})
    except FormatError:
        return Fingerprint()


def choose_firmware(manifest: Manifest) -> str:
    """What the imaged machine had, where the disks allow it; else what the disks are made for."""
    imaged = imaged_machine(manifest)
    tables = [_table(disk) for disk in manifest.disks]
    kinds = {part.type for table in tables for part in table.partitions}
    for_uefi = bool(kinds & _ESP)
    for_bios = _BIOS_BOOT in kinds or any(p.bootable for t in tables for p in t.partitions)
    if for_uefi and (imaged.firmware == "uefi" or (imaged.firmware is None and not for_bios)):
        return "secureboot" if imaged.secure_boot else "uefi"
    return "bios"


def _table(disk: Disk) -> PartitionTable:
    try:
        return disk.table
    except FormatError:
        return PartitionTable("none", disk.logical_sector)


def _choose_bus(manifest: Manifest, imaged: Fingerprint, drivers: BootDrivers | None) -> str:
    had = [_BUS_OF_DRIVER[name] for name in _drivers_of(imaged) if name in _BUS_OF_DRIVER]
    possible = [bus for bus in dict.fromkeys([*had, *_BUS_MODULES]) if _can_hold(manifest, bus)]
    if drivers is None:
        return possible[0] if had else next(bus for bus in ("sata", "virtio") if bus in possible)
    for sure in (True, None):
        for bus in possible:
            found = {drivers.at_boot(module) for module in _BUS_MODULES[bus]}
            if found <= {True, sure}:
                return bus
    return possible[0]


def _drivers_of(imaged: Fingerprint) -> list[str]:
    return [module_name(device.driver) for device in imaged.storage if device.driver]


def _can_hold(manifest: Manifest, bus: str) -> bool:
    """Emulated SATA has few ports, and sectors of 512 bytes only."""
    sectors = {disk.logical_sector for disk in manifest.disks}
    return bus != "sata" or (sectors <= {512} and len(manifest.disks) <= _SATA_PORTS)


def _choose_card(imaged: Fingerprint, drivers: BootDrivers | None) -> str:
    had = {d.driver and module_name(d.driver) for card in imaged.network for d in card.devices}
    cards = sorted(_CARD_MODULES, key=lambda card: _CARD_MODULES[card] not in had)
    if drivers is None:
        return cards[0]
    return next((card for card in cards if drivers.installed(_CARD_MODULES[card])), cards[0])
