"""Virtual machines for images: the imaged machine's devices, or what its system has drivers for."""

from __future__ import annotations

from typing import Any

import pytest

from imager.bootdrivers import BootDrivers
from imager.fingerprint import Device, Fingerprint, NetworkCard
from imager.manifest import Manifest
from imager.virtualhardware import choose_firmware, choose_hardware

ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def manifest(
    *types: str, machine: Fingerprint | None = None, sector: int = 512, disks: int = 1
) -> Manifest:
    parts = [
        {"number": n, "offset": n << 20, "size": 1 << 20, "type": kind, "kind": "primary"}
        for n, kind in enumerate(types, 1)
    ]
    table = {"scheme": "gpt", "sector_size": sector, "partitions": parts}
    disk: dict[str, Any] = {
        "size": 64 << 20,
        "height": 0,
        "root": "00" * 32,
        "top": {"pack": "00" * 16, "ordinal": 0},
        "logical_sector": sector,
        "table": table,
    }
    document = {
        "kind": "image",
        "id": "20261125t000000z-00000000",
        "block_size": 65536,
        "disks": [{**disk, "name": f"sd{n}"} for n in range(disks)],
        "hardware": (machine or Fingerprint()).to_json(),
    }
    return Manifest.from_document(document, "a test")


def machine(driver: str = "", card: str = "", **more: Any) -> Fingerprint:
    return Fingerprint(
        storage=(Device(bus="pci", driver=driver),) if driver else (),
        network=(NetworkCard(devices=(Device(driver=card),)),) if card else (),
        **more,
    )


def drivers(*initramfs: str, installed: tuple[str, ...] = ()) -> BootDrivers:
    return BootDrivers("6.1", frozenset(initramfs), frozenset(installed), frozenset({"sd_mod"}))


@pytest.mark.parametrize(
    ("image", "firmware"),
    [
        (manifest(BIOS_BOOT, ESP, LINUX), "bios"),
        (manifest(ESP, LINUX), "uefi"),
        (manifest(LINUX), "bios"),
        (manifest(BIOS_BOOT, ESP, machine=Fingerprint(firmware="uefi")), "uefi"),
        (manifest(ESP, machine=Fingerprint(firmware="uefi", secure_boot=True)), "secureboot"),
        (manifest(ESP, machine=Fingerprint(firmware="bios")), "bios"),
        (manifest(LINUX, machine=Fingerprint(firmware="uefi")), "bios"),
    ],
)
def test_firmware(image: Manifest, firmware: str) -> None:
    assert choose_firmware(image) == firmware


ALL = ("virtio_pci", "virtio_blk", "ahci", "nvme", "megaraid_sas")


@pytest.mark.parametrize(
    ("imaged", "found", "bus"),
    [
        ("nvme", drivers(*ALL), "nvme"),
        ("megaraid_sas", drivers(*ALL), "megaraid"),
        ("mpt3sas", drivers(*ALL), "virtio"),  # QEMU has none
        ("nvme", drivers("ahci"), "sata"),  # restored to another machine meanwhile
        ("", drivers(*ALL), "virtio"),
        ("", drivers("virtio_pci", "nvme"), "nvme"),
        ("", drivers(), "virtio"),  # it won't boot, whatever it gets
        ("virtio_blk", None, "virtio"),
        ("nvme", None, "nvme"),
        ("", None, "sata"),
    ],
)
def test_bus(imaged: str, found: BootDrivers | None, bus: str) -> None:
    assert choose_hardware(manifest(machine=machine(imaged)), found).bus == bus


def test_what_emulated_sata_cannot_hold() -> None:
    assert choose_hardware(manifest(sector=4096), None).bus == "virtio"
    assert choose_hardware(manifest(disks=7), None).bus == "virtio"
    assert choose_hardware(manifest(disks=6), None).bus == "sata"


@pytest.mark.parametrize(
    ("imaged", "installed", "card"),
    [
        ("e1000e", ("e1000e", "virtio_net"), "e1000e"),
        ("igb", ("igb", "vmxnet3"), "vmxnet3"),
        ("virtio_net", ("virtio_net",), "virtio-net-pci"),
        ("", (), "virtio-net-pci"),
    ],
)
def test_card(imaged: str, installed: tuple[str, ...], card: str) -> None:
    image = manifest(machine=machine(card=imaged))
    assert choose_hardware(image, drivers(installed=installed)).card == card


def test_hardware_that_says_nothing() -> None:
    image = manifest(ESP)
    image.document["hardware"] = {"storage": 7}
    assert choose_hardware(image, None).firmware == "uefi"
