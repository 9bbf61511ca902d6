"""Whether an image's disk will boot in a machine: a judgement from what is known, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from imager.bootdrivers import BootDrivers, module_name
from imager.diskidentity import DiskIdentity
from imager.errors import FormatError
from imager.fingerprint import Device, Fingerprint
from imager.manifest import Disk, Manifest
from imager.partitions import PartitionTable, smallest_disk

Verdict = Literal["identical", "will work", "needs attention", "will not boot"]
Severity = Literal["note", "attention", "blocker"]
Aliases = Callable[[str], list[str]]

# UEFI Specification 2.10, table 5.7; GRUB's own type for where its core lies on a GPT disk.
_ESP = frozenset({"C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "0xef"})
_BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"

# Of these a 64-bit x86 machine runs the others.
_X86_32 = frozenset({"i386", "i486", "i586", "i686"})

# Drivers that are not called like their module.
_MODULE_OF_DRIVER = {"sd": "sd_mod", "sr": "sr_mod", "xhci_hcd": "xhci_pci"}

# Always in the kernel, or no driver that a disk needs.
_CORE_DRIVERS = frozenset({"usb", "hub", "pcieport", "pci"})

# PCI Code and ID Assignment Specification: subclasses of mass storage (class 01), by how a disk
# is attached to them; "04" is RAID, which SATA controllers and hardware RAID call themselves.
_SUBCLASSES = {
    "nvme": ("08",),
    "ata": ("01", "04", "05", "06"),
    "sas": ("00", "04", "07"),
    "scsi": ("00", "04", "07"),
    "fc": ("00", "07"),
    "usb": (),
    "virtio": (),
    "vmbus": (),
    "xen": (),
}
_USB_CONTROLLER = "bc0Csc03"
_VIRTIO_VENDOR = "v00001AF4"


@dataclass(frozen=True)
class Reason:
    severity: Severity
    subject: str
    """What it is about: firmware, architecture, sector size, disk size, Secure Boot, storage,
    network, machine."""
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"


@dataclass(frozen=True)
class Comparison:
    verdict: Verdict
    reasons: tuple[Reason, ...]

    def of(self, severity: Severity) -> tuple[Reason, ...]:
        """The reasons of one severity."""
        return tuple(reason for reason in self.reasons if reason.severity == severity)


def compare(
    manifest: Manifest,
    disk: Disk,
    here: Fingerprint,
    target: DiskIdentity | None = None,
    drivers: BootDrivers | None = None,
    aliases: Aliases | None = None,
) -> Comparison:
    """Whether ``disk`` will boot in the machine ``here``, from ``target`` if that is given.

    ``drivers`` and ``aliases`` are what the image's own filesystem says (``bootdrivers``);
    without them, drivers are judged by what the imaged machine had.
    """
    imaged = _imaged(manifest)
    reasons = (
        *_architecture(imaged, here),
        *_firmware(manifest, disk, imaged, here),
        *_secure_boot(imaged, here),
        *_sectors(disk, target),
        *_size(disk, target),
        *_storage(imaged, here, target, drivers, aliases),
        *_network(imaged, here, drivers, aliases),
        *_notes(drivers),
    )
    severities = {reason.severity for reason in reasons}
    if "blocker" in severities:
        return Comparison("will not boot", reasons)
    if "attention" in severities:
        return Comparison("needs attention", reasons)
    if _is_same_machine(imaged, here, disk, target):
        return Comparison("identical", reasons)
    return Comparison("will work", reasons)


def _imaged(manifest: Manifest) -> Fingerprint:
    """The imaged machine; nothing known when the manifest says nothing that can be read."""
    try:
        return Fingerprint.from_json(manifest.document.get("hardware") or {})
    except FormatError:
        return Fingerprint()


def _is_same_machine(
    imaged: Fingerprint, here: Fingerprint, disk: Disk, target: DiskIdentity | None
) -> bool:
    """The same model with the same devices, and a disk of the same size."""
    if target is not None and target.size is not None and target.size != disk.size:
        return False
    return imaged.architecture is not None and _model(imaged) == _model(here)


def _model(machine: Fingerprint) -> tuple[object, ...]:
    return (
        machine.architecture,
        machine.firmware,
        machine.system_vendor,
        machine.system_product,
        sorted(_ids(device) for device in machine.storage if device.bus == "pci"),
        sorted(_ids(device) for card in machine.network for device in card.devices),
    )


def _ids(device: Device) -> tuple[str, str, str]:
    return device.bus or "", device.vendor or "", device.device or ""


# --- the machine --------------------------------------------------------------------------------


def _architecture(imaged: Fingerprint, here: Fingerprint) -> Iterator[Reason]:
    was, has = imaged.architecture, here.architecture
    if not was or not has or was == has:
        return
    if has == "x86_64" and was in _X86_32:
        yield Reason("note", "architecture", f"the image is of {was}, which {has} runs")
        return
    yield Reason(
        "blocker", "architecture", f"the imaged machine was {was}, this one is {has}: it can't run"
    )


def _firmware(
    manifest: Manifest, disk: Disk, imaged: Fingerprint, here: Fingerprint
) -> Iterator[Reason]:
    if here.firmware not in ("uefi", "bios") or not _boots(manifest, disk):
        return
    table = _table(disk)
    if here.firmware == "uefi":
        if not _has_esp(table):
            lacks = "it has no EFI system partition: this machine boots by UEFI"
            if imaged.firmware == "bios":
                lacks += ", the imaged one by BIOS"
            hint = "; switch the firmware to legacy (CSM) mode if it has that"
            yield Reason("blocker", "firmware", lacks + hint)
        elif imaged.firmware == "bios":
            yield _booted_otherwise("BIOS", "UEFI", "an EFI system partition")
        return
    if table.scheme in ("gpt", "hybrid") and any(p.type == _BIOS_BOOT for p in table.partitions):
        if imaged.firmware == "uefi":
            yield _booted_otherwise("UEFI", "BIOS", "a BIOS boot partition")
    elif imaged.firmware == "uefi":
        yield Reason(
            "blocker",
            "firmware",
            "the imaged machine booted by UEFI, and the disk has no boot code for BIOS; switch "
            "this machine's firmware to UEFI mode",
        )
    elif imaged.firmware is None and table.scheme in ("gpt", "hybrid"):
        yield Reason(
            "attention",
            "firmware",
            "this machine boots by BIOS, and the disk has no BIOS boot partition",
        )


def _booted_otherwise(was: str, now: str, partition: str) -> Reason:
    return Reason(
        "attention",
        "firmware",
        f"the imaged machine booted by {was}, this one boots by {now}: there is {partition}, but "
        "it was not what it booted from",
    )


def _boots(manifest: Manifest, disk: Disk) -> bool:
    """Whether a machine boots from this disk: others of an image may be the ones it boots from."""
    marked = [item.name for item in manifest.disks if _has_boot_partition(_table(item))]
    return disk.name in marked if marked else disk.name == manifest.disks[0].name


def _table(disk: Disk) -> PartitionTable:
    try:
        return disk.table
    except FormatError:
        return PartitionTable("none", disk.logical_sector)


def _has_esp(table: PartitionTable) -> bool:
    return any(part.type in _ESP for part in table.partitions)


def _has_boot_partition(table: PartitionTable) -> bool:
    return _has_esp(table) or any(p.type == _BIOS_BOOT or p.bootable for p in table.partitions)


def _secure_boot(imaged: Fingerprint, here: Fingerprint) -> Iterator[Reason]:
    if not here.secure_boot or imaged.secure_boot:
        return
    was = "booted without it" if imaged.secure_boot is False else "does not say whether it used it"
    yield Reason(
        "attention",
        "Secure Boot",
        f"it is on here, and the imaged machine {was}: loaders or kernels that are not signed "
        "won't start; turn it off in the firmware if so",
    )


# --- the disk -----------------------------------------------------------------------------------


def _sectors(disk: Disk, target: DiskIdentity | None) -> Iterator[Reason]:
    has = target.logical_sector if target else None
    if has and has != disk.logical_sector and _table(disk).scheme != "none":
        yield Reason(
            "blocker",
            "sector size",
            f"the target has sectors of {has} bytes, the imaged disk had {disk.logical_sector}: "
            "its partition table would not be understood",
        )


def _size(disk: Disk, target: DiskIdentity | None) -> Iterator[Reason]:
    has = target.size if target else None
    if has is None or has == disk.size:
        return
    least = smallest_disk(_table(disk), disk.size)
    if has < least:
        yield Reason(
            "blocker", "disk size", f"the target has {has} bytes; the partitions need {least}"
        )
    else:
        which = "larger" if has > disk.size else "smaller, but its partitions fit"
        yield Reason("note", "disk size", f"the target is {which}")


# --- drivers ------------------------------------------------------------------------------------


def _storage(
    imaged: Fingerprint,
    here: Fingerprint,
    target: DiskIdentity | None,
    drivers: BootDrivers | None,
    aliases: Aliases | None,
) -> Iterator[Reason]:
    transport = target.transport if target else None
    known = {device.driver for device in imaged.storage if device.driver}
    had = set(_modules_of(known))
    for names, words in _needed(here.storage, transport, aliases, drivers).items():
        sure = transport in _SUBCLASSES
        if drivers is None:
            if had and not had & set(names):
                yield Reason(
                    "attention",
                    "storage",
                    f"{words} was not in the imaged machine, and the image's own drivers were not "
                    "looked at",
                )
            continue
        yield from _judge_storage(names, words, drivers, sure=sure)


def _judge_storage(
    names: tuple[str, ...], words: str, drivers: BootDrivers, *, sure: bool
) -> Iterator[Reason]:
    found = [drivers.at_boot(name) for name in names]
    listed = " or ".join(names) or "unknown"
    if True in found:
        yield Reason("note", "storage", f"{words}: its driver {listed} is there at boot")
    elif None in found:
        if not any(drivers.installed(name) for name in names):
            yield Reason(
                "attention", "storage", f"{words}: its driver {listed} is not in the image"
            )
        else:
            yield Reason(
                "attention",
                "storage",
                f"{words}: whether its driver {listed} is in the initramfs is not known",
            )
    else:
        there = any(drivers.installed(name) for name in names)
        what = "installed, but not in the initramfs" if there else "not in the image"
        cure = "; make the initramfs of the restored system again with it" if there else ""
        yield Reason(
            "blocker" if sure else "attention",
            "storage",
            f"{words}: its driver {listed} is {what} of kernel {drivers.kernel}{cure}",
        )


def _needed(
    devices: tuple[Device, ...],
    transport: str | None,
    aliases: Aliases | None,
    drivers: BootDrivers | None,
) -> dict[tuple[str, ...], str]:
    """Modules (any of each) and words for what needs them, of all on the way to the target."""
    found: dict[tuple[str, ...], str] = {}
    for device in devices:
        if device.driver in _CORE_DRIVERS or not _is_on_the_way(device, transport):
            continue
        names = _candidates(device, aliases, drivers)
        if names or device.bus == "pci":  # others without a driver are handled by their parents
            found.setdefault(names, _words(device))
    return found


def _candidates(
    device: Device, aliases: Aliases | None, drivers: BootDrivers | None
) -> tuple[str, ...]:
    """The driver that is bound here, if the image knows a module of that name; else what the
    image's own aliases say."""
    bound = list(_modules_of({device.driver})) if device.driver else []
    if drivers is not None and any(drivers.knows(name) for name in bound):
        return tuple(bound)
    asked = aliases(device.modalias) if aliases and device.modalias else []
    return tuple(dict.fromkeys(map(module_name, asked or bound)))


def _modules_of(drivers: set[str] | set[str | None]) -> Iterator[str]:
    for driver in sorted(filter(None, drivers)):
        yield module_name(_MODULE_OF_DRIVER.get(driver, driver))


def _is_on_the_way(device: Device, transport: str | None) -> bool:
    """Whether disks that are attached so need this device's driver; unknown counts as yes."""
    if transport is None or transport not in _SUBCLASSES:
        return True
    modalias = device.modalias or ""
    if device.bus == "pci":
        if transport == "virtio":
            return _VIRTIO_VENDOR in modalias
        if transport == "usb":
            return _USB_CONTROLLER in modalias
        virtio_scsi = transport in ("scsi", "sas") and _VIRTIO_VENDOR in modalias
        classes = tuple(f"bc01sc{subclass}" for subclass in _SUBCLASSES[transport])
        return virtio_scsi or any(found in modalias for found in classes)
    if device.bus == "virtio":
        return transport in ("virtio", "scsi", "sas")
    if device.bus == "usb":
        return transport == "usb"
    if device.bus == "scsi":
        return transport in ("ata", "sas", "scsi", "fc", "usb", "vmbus")
    return transport == device.bus


def _network(
    imaged: Fingerprint, here: Fingerprint, drivers: BootDrivers | None, aliases: Aliases | None
) -> Iterator[Reason]:
    had = set(_modules_of({d.driver for card in imaged.network for d in card.devices}))
    for card in here.network:
        for device in card.devices[:1]:
            names = _candidates(device, aliases, drivers)
            name = f"{card.name or 'a network card'}, {_words(device)}"
            if drivers is not None:
                if not any(drivers.installed(module) for module in names):
                    listed = " or ".join(names) or "unknown"
                    yield Reason(
                        "attention", "network", f"{name}: its driver {listed} is not in the image"
                    )
            elif had and not had & set(names):
                yield Reason(
                    "attention",
                    "network",
                    f"{name} was not in the imaged machine, and the image's own drivers were not "
                    "looked at",
                )
    if imaged.network and here.network and _macs(imaged).isdisjoint(_macs(here)):
        yield Reason(
            "note", "network", "all cards are others than the imaged machine's: names may change"
        )


def _macs(machine: Fingerprint) -> set[str]:
    return {card.mac for card in machine.network if card.mac}


def _notes(drivers: BootDrivers | None) -> Iterator[Reason]:
    for text in drivers.notes if drivers else ():
        yield Reason("note", "drivers", text)


def _words(device: Device) -> str:
    ids = f"{device.vendor}:{device.device}" if device.vendor else device.address or ""
    return f"{device.bus or 'a'} device {ids}".strip()
