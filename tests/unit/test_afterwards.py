"""The fallback path, the names of network cards, and data backups."""

from __future__ import annotations

from pathlib import Path

import pytest

from bootmedia.guest.afterwards import data_backups
from bootmedia.guest.fallback import fill_fallback, find_loader
from bootmedia.guest.networkcards import absent_cards
from imager.errors import ImagerError
from imager.fingerprint import Device, Fingerprint, NetworkCard
from imager.manifest import Manifest
from imager.rootfolder import RootFolder


def put(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- the fallback path ---


def test_shim_and_what_it_starts(tmp_path: Path) -> None:
    for name in ("shimx64.efi", "grubx64.efi", "mmx64.efi", "BOOTX64.CSV"):
        put(tmp_path, f"EFI/debian/{name}", name)
    put(tmp_path, "EFI/Microsoft/Boot/bootmgfw.efi", "windows")
    found = find_loader(tmp_path, "x64")
    assert found is not None
    assert (found.path, found.system) == ("\\EFI\\debian\\shimx64.efi", "debian")
    added = fill_fallback(tmp_path, "x64")
    assert added[0] == "\\EFI\\BOOT\\BOOTX64.EFI"
    assert (tmp_path / "EFI/BOOT/BOOTX64.EFI").read_text() == "shimx64.efi"
    assert (tmp_path / "EFI/BOOT/grubx64.efi").read_text() == "grubx64.efi"
    assert (tmp_path / "EFI/BOOT/mmx64.efi").read_text() == "mmx64.efi"
    assert fill_fallback(tmp_path, "x64") == ()


def test_grub_alone(tmp_path: Path) -> None:
    put(tmp_path, "efi/FEDORA/GRUBX64.EFI", "grub")
    assert fill_fallback(tmp_path, "x64") == ("\\efi\\BOOT\\BOOTX64.EFI",)
    assert (tmp_path / "efi/BOOT/BOOTX64.EFI").read_text() == "grub"


def test_what_is_there_stays(tmp_path: Path) -> None:
    put(tmp_path, "EFI/boot/bootx64.efi", "mine")
    put(tmp_path, "EFI/debian/shimx64.efi", "shim")
    assert fill_fallback(tmp_path, "x64") == ()
    assert (tmp_path / "EFI/boot/bootx64.efi").read_text() == "mine"


def test_only_the_fallback_is_the_loader(tmp_path: Path) -> None:
    put(tmp_path, "EFI/BOOT/BOOTX64.EFI", "grub")
    found = find_loader(tmp_path, "x64")
    assert found is not None and found.path == "\\EFI\\BOOT\\BOOTX64.EFI"


def test_no_loader(tmp_path: Path) -> None:
    with pytest.raises(ImagerError, match="no boot loader"):
        fill_fallback(tmp_path, "x64")


# --- network cards ---

HERE = Fingerprint(
    network=(
        NetworkCard("eth0", "52:54:00:aa:bb:cc", (Device("pci", "0000:01:00.0", driver="e1000e"),)),
    )
)

CONFIGURATIONS = [
    ("etc/network/interfaces", "auto lo enp1s0\niface enp1s0 inet dhcp\n", []),
    ("etc/network/interfaces", "auto eth0\niface eth0 inet dhcp\n", []),
    ("etc/network/interfaces", "auto br0\niface br0 inet dhcp\n bridge_ports enp1s0\n", []),
    ("etc/network/interfaces", "allow-hotplug enp3s0\niface enp3s0 inet dhcp\n", ["enp3s0"]),
    ("etc/network/interfaces.d/lan", "iface eth1 inet static\n", ["eth1"]),
    ("etc/systemd/network/80.network", "[Match]\nName=en*\n[Network]\nDHCP=yes\n", []),
    ("etc/systemd/network/80.network", "[Match]\nName=eno1 ens9\n", ["eno1", "ens9"]),
    (
        "etc/systemd/network/10.link",
        "[Match]\nMACAddress=52:54:00:00:00:99\n[Link]\nName=lan0\n",
        ["52:54:00:00:00:99"],
    ),
    ("etc/netplan/01.yaml", "network:\n  ethernets:\n    enp1s0:\n      dhcp4: true\n", []),
    ("etc/netplan/01.yaml", "network:\n  ethernets:\n    ens33:\n      dhcp4: yes\n", ["ens33"]),
    (
        "etc/netplan/01.yaml",
        "network:\n  ethernets:\n    lan:\n      match:\n        macaddress: '52:54:00:AA:BB:CC'\n",
        [],
    ),
    (
        "etc/NetworkManager/system-connections/a.nmconnection",
        "[connection]\nid=a\ninterface-name=ens5\n",
        ["ens5"],
    ),
    (
        "etc/sysconfig/network-scripts/ifcfg-em1",
        'DEVICE="em1"\nHWADDR=52:54:00:AA:BB:CC\n',
        ["em1"],
    ),
]


@pytest.mark.parametrize(("file", "text", "absent"), CONFIGURATIONS)
def test_cards_that_are_not_here(tmp_path: Path, file: str, text: str, absent: list[str]) -> None:
    put(tmp_path, file, text)
    said = absent_cards(tmp_path, HERE, tmp_path / "no-sysfs")
    assert len(said) == len(absent)
    for name, line in zip(absent, said, strict=True):
        assert f"/{file} names {name}, which is not in this machine" == line


def test_links_of_a_foreign_root_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    put(root, "real/interfaces", "auto ens7\n")
    (root / "etc").mkdir()
    (root / "etc/network").symlink_to("/real")
    (root / "etc/netplan").symlink_to("../../../../../etc")
    (root / "etc/loop").symlink_to("loop")
    assert RootFolder(root).path("etc/netplan") == root / "etc"
    assert RootFolder(root).path("etc/loop") is None
    assert len(absent_cards(root, HERE, tmp_path)) == 1


# --- data backups ---


def test_data_backups_are_listed() -> None:
    backups = [
        {"name": "db", "engine": "restic", "snapshot": "1a2b", "restore": ["restic", "re store"]},
        {"name": "mail", "engine": "borg", "error": "no space"},
        {"name": "web", "engine": "borg", "snapshot": "w", "warnings": ["x"]},
    ]
    first, second, third = data_backups(Manifest("i", 1 << 18, (), {"data": backups}))
    assert first.startswith("data backup db, restic, ")
    assert first.endswith("; by hand: restic 're store'")
    assert second.endswith("it FAILED when the image was made: no space")
    assert "NOT WHOLE" in third


@pytest.mark.parametrize("damage", ["damage", ["damage"], [{"name": 1}]])
def test_damaged_data_backups_are_said(damage: object) -> None:
    (line,) = data_backups(Manifest("i", 1 << 18, (), {"data": damage}))
    assert line.startswith("data backups: ")
