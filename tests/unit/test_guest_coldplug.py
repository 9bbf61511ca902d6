"""The wait for disks that come late, against a sysfs of our own."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bootmedia.guest.coldplug import wait_for_disks


@pytest.fixture
def interface(tmp_path: Path) -> Path:
    """A USB stick that the kernel has found and not looked at."""
    (tmp_path / "sys/class/block").mkdir(parents=True)
    folder = tmp_path / "sys/bus/usb/devices/2-1:1.0"
    folder.mkdir(parents=True)
    (folder / "bInterfaceClass").write_text("08\n")
    return folder


def _add_disk(root: Path, interface: Path) -> None:
    (interface / "host6/target6:0:0/6:0:0:0/block/sda").mkdir(parents=True)
    (root / "sys/class/block/sda").mkdir()


def test_a_usb_disk_without_its_node_is_awaited(tmp_path: Path, interface: Path) -> None:
    assert not wait_for_disks(0, 0.3, tmp_path)
    _add_disk(tmp_path, interface)
    assert wait_for_disks(0, 0.3, tmp_path)


def test_the_wait_ends_when_it_comes(tmp_path: Path, interface: Path) -> None:
    threading.Timer(0.3, _add_disk, (tmp_path, interface)).start()
    assert wait_for_disks(0, 30, tmp_path)
    assert (tmp_path / "sys/class/block/sda").exists()


def test_other_usb_devices_are_not_awaited(tmp_path: Path, interface: Path) -> None:
    (interface / "bInterfaceClass").write_text("03\n")
    assert wait_for_disks(0, 0.3, tmp_path)


def test_a_rule_waits_until_no_disk_comes_any_more(tmp_path: Path) -> None:
    blocks = tmp_path / "sys/class/block"
    blocks.mkdir(parents=True)
    threading.Timer(0.3, (blocks / "sdb").mkdir).start()
    assert wait_for_disks(0.8, 30, tmp_path)
    assert (blocks / "sdb").exists()


def test_a_machine_without_usb_is_not_kept_waiting(tmp_path: Path) -> None:
    assert wait_for_disks(0, 0.3, tmp_path)
