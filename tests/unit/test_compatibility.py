"""The verdict about a machine, one row a case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from imager.bootdrivers import BootDrivers
from imager.compatibility import Comparison, Severity, Verdict, compare
from imager.diskidentity import DiskIdentity
from imager.fingerprint import Device, Fingerprint, NetworkCard
from imager.format import Place
from imager.manifest import Disk, Manifest
from imager.partitions import Partition, PartitionTable

GIB, MIB = 1 << 30, 1 << 20
SIZE = 8 * GIB
ESP = Partition(1, MIB, 100 * MIB, "C12A7328-F81F-11D2-BA4B-00A0C93EC93B")
BIOS_BOOT = Partition(2, 101 * MIB, MIB, "21686148-6449-6E6F-744E-656564454649")
ROOT = Partition(3, 102 * MIB, 4 * GIB, "0FC63DAF-8483-4772-8E79-3D69D8477DE4")
MBR_ROOT = Partition(1, MIB, 4 * GIB, "0x83", bootable=True)

AHCI = Device("pci", "0000:00:1f.2", "0x8086", "0x2922", "ahci", "pci:v00008086bc01sc06i01")
NVME = Device("pci", "0000:01:00.0", "0x1b36", "0x0010", "nvme", "pci:v00001B36bc01sc08i02")
RAID = Device("pci", "0000:02:00.0", "0x1000", "0x005b", "megaraid_sas", "pci:v00001000bc01sc04")
UNBOUND = replace(RAID, driver=None)
E1000 = NetworkCard(
    "enp0s3", "52:54:00:00:00:01", (Device("pci", "0000:00:03.0", "0x8086", "0x10d3", "e1000e"),)
)
IXGBE = NetworkCard(
    "enp0s4", "52:54:00:00:00:02", (Device("pci", "0000:00:04.0", "0x8086", "0x10fb", "ixgbe"),)
)

SERVER = Fingerprint(
    architecture="x86_64",
    firmware="uefi",
    secure_boot=False,
    system_vendor="Maker",
    system_product="Server 1",
    storage=(AHCI,),
    network=(E1000,),
)
BIOS = replace(SERVER, firmware="bios", secure_boot=None)
SATA = DiskIdentity(size=SIZE, logical_sector=512, transport="ata")
DRIVERS = BootDrivers(
    kernel="6.1.0",
    initramfs_modules=frozenset({"ahci", "sd_mod"}),
    installed_modules=frozenset({"ahci", "sd_mod", "megaraid_sas", "e1000e"}),
    builtin=frozenset({"virtio_blk"}),
)
GPT = (ESP, ROOT)
BOTH = (ESP, BIOS_BOOT, ROOT)


def image(
    parts: tuple[Partition, ...] = BOTH, hardware: Fingerprint = SERVER, **facts: Any
) -> tuple[Manifest, Disk]:
    scheme = "mbr" if parts and parts[0].type.startswith("0x") else "gpt" if parts else "none"
    table = PartitionTable(scheme, 512, backup_size=16896, partitions=parts)
    document = {"table": table.to_json(), "logical_sector": 512, **facts}
    disk = Disk("sda", SIZE, 1 << 18, 2, Place(bytes(16), 0), "", document)
    return Manifest("i", 1 << 18, (disk,), {"hardware": hardware.to_json()}), disk


def judged(
    here: Fingerprint = SERVER,
    target: DiskIdentity | None = SATA,
    drivers: BootDrivers | None = DRIVERS,
    *,
    parts: tuple[Partition, ...] = BOTH,
    hardware: Fingerprint = SERVER,
    aliases: dict[str, list[str]] | None = None,
) -> Comparison:
    manifest, disk = image(parts, hardware)
    known = aliases or {}
    return compare(manifest, disk, here, target, drivers, lambda text: known.get(text, []))


CASES: list[tuple[str, dict[str, Any], Verdict, Severity | None, str]] = [
    ("the same", {}, "identical", None, ""),
    ("the same without a look inside", {"drivers": None}, "identical", None, ""),
    (
        "another product",
        {"here": replace(SERVER, system_product="Server 2")},
        "will work",
        None,
        "",
    ),
    ("larger", {"target": replace(SATA, size=2 * SIZE)}, "will work", "note", "disk size"),
    ("fits", {"target": replace(SATA, size=5 * GIB)}, "will work", "note", "disk size"),
    ("too small", {"target": replace(SATA, size=GIB)}, "will not boot", "blocker", "disk size"),
    (
        "4Kn",
        {"target": replace(SATA, logical_sector=4096)},
        "will not boot",
        "blocker",
        "sector size",
    ),
    (
        "ARM",
        {"here": replace(SERVER, architecture="aarch64")},
        "will not boot",
        "blocker",
        "architecture",
    ),
    (
        "32 bits on 64",
        {"hardware": replace(SERVER, architecture="i686")},
        "will work",
        "note",
        "architecture",
    ),
    (
        "UEFI image on BIOS",
        {"here": BIOS, "parts": GPT},
        "will not boot",
        "blocker",
        "firmware",
    ),
    (
        "UEFI image with BIOS boot partition on BIOS",
        {"here": BIOS},
        "needs attention",
        "attention",
        "firmware",
    ),
    (
        "BIOS image on UEFI",
        {"hardware": BIOS, "parts": (MBR_ROOT,)},
        "will not boot",
        "blocker",
        "firmware",
    ),
    (
        "BIOS image with ESP on UEFI",
        {"hardware": BIOS},
        "needs attention",
        "attention",
        "firmware",
    ),
    (
        "BIOS image on BIOS",
        {"here": BIOS, "hardware": BIOS, "parts": (MBR_ROOT,)},
        "identical",
        None,
        "",
    ),
    (
        "Secure Boot",
        {"here": replace(SERVER, secure_boot=True)},
        "needs attention",
        "attention",
        "Secure Boot",
    ),
    (
        "Secure Boot on both",
        {
            "here": replace(SERVER, secure_boot=True),
            "hardware": replace(SERVER, secure_boot=True),
        },
        "identical",
        None,
        "",
    ),
    (
        "controller not in the initramfs",
        {"here": replace(SERVER, storage=(RAID,)), "target": replace(SATA, transport="sas")},
        "will not boot",
        "blocker",
        "storage",
    ),
    (
        "controller not in the image",
        {"here": replace(SERVER, storage=(NVME,)), "target": replace(SATA, transport="nvme")},
        "will not boot",
        "blocker",
        "storage",
    ),
    (
        "another controller beside the target's",
        {"here": replace(SERVER, storage=(AHCI, NVME))},
        "will work",
        "note",
        "storage",
    ),
    (
        "unknown way to the target",
        {"here": replace(SERVER, storage=(NVME,)), "target": None},
        "needs attention",
        "attention",
        "storage",
    ),
    (
        "unbound controller, by aliases",
        {
            "here": replace(SERVER, storage=(UNBOUND,)),
            "target": replace(SATA, transport="sas"),
            "aliases": {UNBOUND.modalias: ["megaraid-sas"]},
        },
        "will not boot",
        "blocker",
        "storage",
    ),
    (
        "unreadable initramfs",
        {"drivers": replace(DRIVERS, initramfs_modules=None, notes=("compressed with lz4",))},
        "needs attention",
        "attention",
        "storage",
    ),
    (
        "other controller, not looked inside",
        {
            "here": replace(SERVER, storage=(NVME,)),
            "target": replace(SATA, transport="nvme"),
            "drivers": None,
        },
        "needs attention",
        "attention",
        "storage",
    ),
    (
        "network card without driver",
        {"here": replace(SERVER, network=(IXGBE,))},
        "needs attention",
        "attention",
        "network",
    ),
    (
        "no facts",
        {"here": Fingerprint(), "hardware": Fingerprint(), "target": None, "drivers": None},
        "will work",
        None,
        "",
    ),
]


@pytest.mark.parametrize(
    ("options", "verdict", "severity", "subject"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_verdict(
    options: dict[str, Any], verdict: Verdict, severity: Severity | None, subject: str
) -> None:
    found = judged(**options)
    assert found.verdict == verdict, found.reasons
    if severity is not None:
        assert subject in [reason.subject for reason in found.of(severity)]
        assert all(reason.text for reason in found.reasons)


def test_built_in_drivers_count_as_being_there() -> None:
    virtio = Device("virtio", "virtio0", driver="virtio_blk", modalias="virtio:d00000002v00001AF4")
    here = replace(SERVER, storage=(virtio,))
    found = judged(here, replace(SATA, transport="virtio"))
    assert found.verdict == "will work", found.reasons


def test_damaged_hardware_is_no_hardware() -> None:
    manifest, disk = image()
    manifest.document["hardware"] = {"architecture": 5}
    assert compare(manifest, disk, SERVER, SATA, DRIVERS).verdict == "will work"
