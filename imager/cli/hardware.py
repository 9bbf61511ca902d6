"""A machine in a few lines."""

from __future__ import annotations

from imager.fingerprint import Device, Fingerprint
from imager.units import show_bytes


def print_hardware(hardware: Fingerprint) -> None:
    print("\nmachine:")
    facts = {
        "vendor": hardware.system_vendor,
        "product": hardware.system_product,
        "cpu": " ".join(filter(None, [hardware.cpu_model, hardware.architecture])),
        "memory": show_bytes(hardware.memory) if hardware.memory else None,
        "firmware": hardware.firmware,
        "secure boot": {True: "on", False: "off", None: None}[hardware.secure_boot],
    }
    for name, fact in facts.items():
        if fact:
            print(f"  {name:<12} {fact}")
    for device in hardware.storage:
        print(f"  storage      {_device_words(device)}")
    for card in hardware.network:
        chain = ", ".join(_device_words(device) for device in card.devices)
        print(f"  network      {card.name} {card.mac or ''} {chain}".rstrip())
    for disk in hardware.disks:
        words = [disk.path, show_bytes(disk.size or 0), disk.model, disk.serial, disk.transport]
        print(f"  disk         {' '.join(filter(None, words))}")


def _device_words(device: Device) -> str:
    return f"{device.driver or 'no driver'} ({device.bus} {device.vendor}:{device.device})"
