"""Who uses a device: made-up /sys and /proc trees; the real ones are in tests/loop."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from imager import deviceuse
from imager.deviceuse import Use, device_numbers, disk_numbers_below, uses_of


class Machine:
    """A made-up machine: sda with two partitions, RAID and LVM on top, a loop device."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sys, self.proc = root / "sys", root / "proc"
        (self.sys / "dev/block").mkdir(parents=True)
        (self.sys / "block").mkdir()
        (self.proc / "self").mkdir(parents=True)
        self.mounts("")
        self.swaps("")
        self.numbers: dict[str, str] = {}
        monkeypatch.setattr(deviceuse, "SYS_ROOT", self.sys)
        monkeypatch.setattr(deviceuse, "PROC_ROOT", self.proc)
        plain = Path.stat

        def fake_stat(path: Path, **options: bool) -> os.stat_result:
            number = self.numbers.get(str(path))
            if number is None:
                return plain(path, **options)
            major, minor = map(int, number.split(":"))
            values = [stat.S_IFBLK | 0o660, *[0] * 15]
            return os.stat_result(values, {"st_rdev": os.makedev(major, minor)})

        monkeypatch.setattr(Path, "stat", fake_stat)

    def device(self, name: str, number: str, *, parent: str | None = None) -> Path:
        folder = self.sys / "devices" / (parent or "") / name
        folder.mkdir(parents=True)
        (folder / "dev").write_text(f"{number}\n")
        if parent:
            (folder / "partition").write_text("1\n")
        else:
            (self.sys / "block" / name).symlink_to(folder)
        (self.sys / "dev/block" / number).symlink_to(folder)
        self.numbers[f"/dev/{name}"] = number
        return folder

    def stack(self, upper: Path, lower: Path) -> None:
        for folder, name, other in ((lower, "holders", upper), (upper, "slaves", lower)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / other.name).symlink_to(other)

    def mounts(self, text: str) -> None:
        (self.proc / "self/mountinfo").write_text(text)

    def swaps(self, text: str) -> None:
        header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        (self.proc / "swaps").write_text(header + text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "machine", monkeypatch)


def mount_line(number: str, point: str, options: str, source: str) -> str:
    return f"36 35 {number} / {point} {options} shared:1 - ext4 {source} rw\n"


def test_a_free_disk(machine: Machine) -> None:
    machine.device("sda", "8:0")
    assert uses_of("/dev/sda") == []


def test_mounts_of_a_disk_and_its_partitions(machine: Machine) -> None:
    machine.device("sda", "8:0")
    machine.device("sda1", "8:1", parent="sda")
    machine.device("sda2", "8:2", parent="sda")
    machine.mounts(
        mount_line("8:1", "/boot", "ro,noatime", "/dev/sda1")
        + mount_line("8:2", "/srv/with\\040blank", "rw", "/dev/sda2")
    )
    assert uses_of("/dev/sda") == [
        Use("sda1", "mounted at /boot", False),
        Use("sda2", "mounted at /srv/with blank", True),
    ]
    assert uses_of("/dev/sda1") == [Use("sda1", "mounted at /boot", False)]
    assert device_numbers("/dev/sda") == {"8:0", "8:1", "8:2"}


def test_what_is_stacked_on_a_disk(machine: Machine) -> None:
    sda = machine.device("sda", "8:0")
    part = machine.device("sda1", "8:1", parent="sda")
    raid = machine.device("md0", "9:0")
    volume = machine.device("dm-0", "253:0")
    machine.stack(raid, part)
    machine.stack(volume, raid)
    machine.mounts(mount_line("253:0", "/", "rw", "/dev/mapper/root"))
    assert sda.exists()
    assert uses_of("/dev/sda") == [Use("dm-0", "mounted at /", True)]


def test_btrfs_shows_no_number_of_its_own(machine: Machine) -> None:
    machine.device("sda", "8:0")
    machine.mounts(mount_line("0:31", "/data", "rw", "/dev/sda"))
    assert uses_of("/dev/sda") == [Use("sda", "mounted at /data", True)]


def test_swap(machine: Machine) -> None:
    machine.device("sda", "8:0")
    machine.device("sda1", "8:1", parent="sda")
    machine.swaps("/dev/sda1                               partition\t1048572\t0\t-2\n")
    assert uses_of("/dev/sda") == [Use("sda1", "in use as swap", True)]


def test_a_file_behind_a_loop_device(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "disk.img"
    file.write_bytes(b"x")
    assert uses_of(str(file)) == []
    loop = machine.device("loop3", "7:3")
    (loop / "loop").mkdir()
    (loop / "loop/backing_file").write_text(f"{file}\n")
    machine.mounts(mount_line("7:3", "/mnt", "rw", "/dev/loop3"))
    assert uses_of(str(file)) == [Use("loop3", "mounted at /mnt", True)]
    (tmp_path / "link.img").symlink_to(file)
    assert uses_of(str(tmp_path / "link.img")) == [Use("loop3", "mounted at /mnt", True)]


def test_damaged_tables_of_the_kernel_are_no_crash(machine: Machine) -> None:
    machine.device("sda", "8:0")
    machine.mounts("\n36 35\nnothing here\n36 35 8:0 / /mnt rw - ext4 /dev/sda rw\n")
    assert uses_of("/dev/sda") == [Use("sda", "mounted at /mnt", True)]


def test_a_loop_in_what_is_stacked_ends(machine: Machine) -> None:
    one, other = machine.device("md0", "9:0"), machine.device("md1", "9:1")
    machine.stack(one, other)
    machine.stack(other, one)
    assert device_numbers("/dev/md0") == {"9:0", "9:1"}


def test_disks_below_a_folder(machine: Machine, tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    found = disk_numbers_below(tmp_path / "not" / "there" / "yet")
    assert f"{os.major(number)}:{os.minor(number)}" in found
    assert found == disk_numbers_below(tmp_path)
