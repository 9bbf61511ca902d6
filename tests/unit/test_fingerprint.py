"""Machines made of small sysfs trees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imager.diskidentity import DiskIdentity, disk_identity, disks
from imager.errors import FormatError
from imager.fingerprint import Fingerprint, read_fingerprint

SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"

AHCI = "sys/devices/pci0000:00/0000:00:17.0"
SATA = f"{AHCI}/ata1/host0/target0:0:0/0:0:0:0"
NVME = "sys/devices/pci0000:00/0000:00:1d.0/0000:01:00.0"
VIRTIO = "sys/devices/pci0000:00/0000:00:02.0"
USB = "sys/devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2:1.0"


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, value in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(value if isinstance(value, bytes) else value.encode() + b"\n")


def link(root: Path, name: str, target: str) -> None:
    place = root / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(root / target)


def add_device(root: Path, folder: str, bus: str, driver: str, **files: str) -> None:
    write(root, {f"{folder}/{name}": value for name, value in files.items()})
    link(root, f"{folder}/subsystem", f"sys/bus/{bus}")
    driver_folder = f"sys/bus/{bus}/drivers/{driver}"
    (root / driver_folder).mkdir(parents=True, exist_ok=True)
    link(root, f"{folder}/driver", driver_folder)
    link(root, f"sys/bus/{bus}/devices/{Path(folder).name}", folder)


def add_disk(root: Path, folder: str, device: str, files: dict[str, str | bytes]) -> None:
    common: dict[str, str | bytes] = {
        "size": "2048",
        "removable": "0",
        "queue/logical_block_size": "512",
        "queue/physical_block_size": "4096",
        "queue/rotational": "0",
    }
    write(root, {f"{folder}/{name}": value for name, value in {**common, **files}.items()})
    if device:
        link(root, f"{folder}/device", device)
    for place in ("sys/block", "sys/class/block"):
        link(root, f"{place}/{Path(folder).name}", folder)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A UEFI server with a SATA, an NVMe and a virtio disk, a USB stick and two cards."""
    root = tmp_path
    write(
        root,
        {
            SECURE_BOOT: b"\x06\0\0\0\x01",
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R)  Xeon(R) E-2288G\n",
            "proc/meminfo": "MemTotal:       32768 kB\nMemFree: 1 kB\n",
            "sys/class/dmi/id/sys_vendor": "Dell Inc.",
            "sys/class/dmi/id/product_name": "PowerEdge R340",
            "sys/class/dmi/id/product_serial": "ABC1234",
            "sys/class/dmi/id/board_vendor": "To Be Filled By O.E.M.",
            "sys/class/dmi/id/board_name": "0XYZ",
        },
    )
    add_device(root, AHCI, "pci", "ahci", **{"class": "0x010601"}, modalias="pci:v8086dA352",
               vendor="0x8086", device="0xa352")  # fmt: skip
    add_device(root, SATA, "scsi", "sd", modalias="scsi:t-0x00", model="WDC WD40EFRX-68N",
               vendor="ATA     ", wwid="naa.50014EE2B1C2D3E4")  # fmt: skip
    write(root, {f"{SATA}/vpd_pg80": b"\0\x80\0\x14     WD-WCC7K0ABCDEF "})
    add_disk(root, f"{SATA}/block/sda", SATA, {"queue/rotational": "1"})
    write(root, {f"{SATA}/block/sda/sda1/partition": "1", f"{SATA}/block/sda/sda1/size": "100"})
    link(root, "sys/class/block/sda1", f"{SATA}/block/sda/sda1")

    add_device(root, str(Path(NVME).parent), "pci", "pcieport", **{"class": "0x060400"},
               modalias="pci:bridge")  # fmt: skip
    add_device(root, NVME, "pci", "nvme", **{"class": "0x010802"}, modalias="pci:v144dA808")
    write(
        root,
        {f"{NVME}/nvme/nvme0/model": "Samsung SSD 970", f"{NVME}/nvme/nvme0/serial": "S466NX0"},
    )
    add_disk(
        root,
        f"{NVME}/nvme/nvme0/nvme0n1",
        f"{NVME}/nvme/nvme0",
        {"wwid": "eui.0025385B71B0C1D2"},
    )
    add_device(root, VIRTIO, "pci", "virtio-pci", **{"class": "0x018000"}, modalias="pci:v1AF4")
    add_device(root, f"{VIRTIO}/virtio0", "virtio", "virtio_blk", modalias="virtio:d2",
               vendor="0x1af4", device="0x0002")  # fmt: skip
    add_disk(root, f"{VIRTIO}/virtio0/block/vda", f"{VIRTIO}/virtio0", {"serial": "prod-db-1"})
    add_device(root, USB, "usb", "usb-storage", modalias="usb:v0781p5583")
    stick = f"{USB}/host1/target1:0:0/1:0:0:0"
    write(root, {f"{stick}/model": "Ultra Fit", f"{stick}/vendor": "SanDisk "})
    add_disk(root, f"{stick}/block/sdb", stick, {"removable": "1"})
    for name in ("loop0", "ram1", "zram0", "dm-0", "md127", "sr0", "nbd3", "mmcblk0boot1"):
        add_disk(root, f"sys/devices/virtual/block/{name}", "", {})
    add_disk(root, "sys/devices/virtual/block/sdc", "", {"size": "0"})
    add_disk(root, "sys/devices/virtual/block/nvme0c0n1", "", {"hidden": "1"})

    card = "sys/devices/pci0000:00/0000:00:1f.6"
    add_device(root, card, "pci", "e1000e", **{"class": "0x020000"}, modalias="pci:v8086d15BB")
    write(root, {f"{card}/net/eno1/address": "aa:bb:cc:00:00:01"})
    write(root, {f"{card}/net/eno1/bonding_slave/perm_hwaddr": "aa:bb:cc:00:00:02"})
    link(root, f"{card}/net/eno1/device", card)
    link(root, "sys/class/net/eno1", f"{card}/net/eno1")
    write(root, {"sys/devices/virtual/net/lo/address": "00:00:00:00:00:00"})
    link(root, "sys/class/net/lo", "sys/devices/virtual/net/lo")
    return root


def test_machine(server: Path) -> None:
    found = read_fingerprint(server)
    assert (found.firmware, found.secure_boot) == ("uefi", True)
    assert found.cpu_model == "Intel(R) Xeon(R) E-2288G"
    assert found.memory == 32 << 20
    assert (found.system_vendor, found.system_product) == ("Dell Inc.", "PowerEdge R340")
    assert found.system_serial == "ABC1234"
    assert (found.board_vendor, found.board_product, found.board_serial) == (None, "0XYZ", None)


def test_drivers_to_reach_the_disks(server: Path) -> None:
    found = read_fingerprint(server)
    drivers = [device.driver for device in found.storage]
    assert sorted(map(str, drivers)) == [
        "ahci", "nvme", "sd", "usb-storage", "virtio-pci", "virtio_blk",
    ]  # fmt: skip
    ahci = next(device for device in found.storage if device.driver == "ahci")
    assert (ahci.bus, ahci.address, ahci.vendor, ahci.device, ahci.modalias) == (
        "pci", "0000:00:17.0", "0x8086", "0xa352", "pci:v8086dA352",
    )  # fmt: skip


def test_network_cards(server: Path) -> None:
    (card,) = read_fingerprint(server).network
    assert (card.name, card.mac) == ("eno1", "aa:bb:cc:00:00:02")
    assert [(d.bus, d.driver, d.modalias) for d in card.devices] == [
        ("pci", "e1000e", "pci:v8086d15BB")
    ]


def test_disks_of_the_machine(server: Path) -> None:
    assert disks(server) == ["/dev/nvme0n1", "/dev/sda", "/dev/sdb", "/dev/vda"]


def test_natural_order(tmp_path: Path) -> None:
    for name in ("sdb", "sda", "nvme10n1", "nvme2n1", "cciss!c0d0"):
        add_disk(tmp_path, f"sys/devices/{name}", "", {})
    assert disks(tmp_path) == [
        "/dev/cciss/c0d0",
        "/dev/nvme2n1",
        "/dev/nvme10n1",
        "/dev/sda",
        "/dev/sdb",
    ]


def test_disk_identities(server: Path) -> None:
    sata = DiskIdentity(
        path="/dev/sda",
        model="WDC WD40EFRX-68N",
        serial="WD-WCC7K0ABCDEF",
        wwn="0x50014ee2b1c2d3e4",
        size=2048 * 512,
        logical_sector=512,
        physical_sector=4096,
        rotational=True,
        removable=False,
        transport="ata",
    )
    assert disk_identity("/dev/sda", server) == sata
    assert disk_identity("/dev/sda1", server) == sata
    nvme = disk_identity("/dev/nvme0n1", server)
    assert (nvme.model, nvme.serial, nvme.wwn) == (
        "Samsung SSD 970", "S466NX0", "eui.0025385b71b0c1d2",
    )  # fmt: skip
    assert (nvme.transport, nvme.rotational) == ("nvme", False)
    virtio = disk_identity("/dev/vda", server)
    assert (virtio.model, virtio.serial, virtio.transport) == (None, "prod-db-1", "virtio")
    stick = disk_identity("/dev/sdb", server)
    assert (stick.model, stick.removable, stick.transport) == ("SanDisk Ultra Fit", True, "usb")


def test_wwn_from_udev_where_the_kernel_has_none(server: Path) -> None:
    (server / SATA / "wwid").unlink()
    for name, target in (("ata-WDC", "sda"), ("wwn-0x50014ee2b1c2d3e4", "sda"), ("wwn-0x1", "sdb")):
        place = server / "dev/disk/by-id" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(f"../../{target}")
    assert disk_identity("/dev/sda", server).wwn == "0x50014ee2b1c2d3e4"
    assert disk_identity("/dev/sdb", server).wwn is None


def test_files_have_only_a_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(12345))
    assert disk_identity(str(path)) == DiskIdentity(size=12345)
    assert disk_identity(str(tmp_path / "absent")) == DiskIdentity()


def test_nothing_to_read(tmp_path: Path) -> None:
    found = read_fingerprint(tmp_path)
    assert found == Fingerprint(architecture=found.architecture)


def test_legacy_firmware_and_odd_values(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "sys/firmware/memmap/0/type": "x",
            "sys/class/dmi/id/product_serial": b"\xff\xfe\n",
            "proc/meminfo": "MemTotal: many kB\n",
            "sys/block/sda/size": "-5",
            "sys/block/sdb/size": "9" * 50,
        },
    )
    found = read_fingerprint(tmp_path)
    assert found.firmware in ("bios", None)
    assert (found.memory, found.disks) == (None, ())


def test_this_machine() -> None:
    found = read_fingerprint()
    assert found.memory and found.cpu_model
    assert len(found.disks) == len(disks())


def test_json_round_trip(server: Path) -> None:
    found = read_fingerprint(server)
    assert Fingerprint.from_json({**json.loads(json.dumps(found.to_json())), "new": {}}) == found
    assert Fingerprint.from_json({}) == Fingerprint()
    wrongs: tuple[object, ...] = (
        None,
        [],
        {"memory": "1"},
        {"secure_boot": 1},
        {"disks": [{"size": -1}]},
    )
    for wrong in wrongs:
        with pytest.raises(FormatError):
            Fingerprint.from_json(wrong)
