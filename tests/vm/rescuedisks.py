"""Small disks to restore by a rescue medium, and what a test does to the machine meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imager.process import run
from tests.machines.qemu import Machine
from tests.support.commandline import imager_alone
from tests.support.disks import MIB, make_random, make_sparse, write_at

DISK_MIB = 96
_PART_MIB = DISK_MIB - 2
_SLOW = 6 * MIB
"""Bytes per second: a restore then takes long enough to be disturbed."""


def make_repository(folder: Path) -> Path:
    """A repository with an image, ``data``, in packs of two captures; beside it the ``source``
    disk: GPT, ext4, half full of what does not compress."""
    source, repository = folder / "data.img", folder / "images"
    _make_source(source, folder, {"first": 24, "second": 16})
    imager_alone("capture", source, "--repo", repository, "--init", "--name", "data")
    _make_source(source, folder, {"first": 24, "second": 16, "third": 24})
    imager_alone("capture", source, "--repo", repository, "--name", "data")
    return repository


def restored_outside(repository: Path, target: Path) -> Path:
    """The same image, restored to a file of the target's size by the command line."""
    other = make_sparse(target.with_suffix(".outside"), target.stat().st_size)
    imager_alone("restore", "data@latest", other, "--yes", "--repo", repository)
    return other


def same_bytes(one: Path, other: Path) -> bool:
    return run(["cmp", "--silent", str(one), str(other)], accept=(0, 1)).returncode == 0


def is_untouched(disk: Path) -> bool:
    """Nothing was ever written to a disk that was made sparse."""
    return disk.stat().st_blocks == 0


def slow_down(machine: Machine, *drives: str) -> None:
    """Of QEMU's drives ("disc", "disk0", "stick-image"), from now on."""
    for drive in drives:
        rates = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
        machine.monitor.execute("block_set_io_throttle", device=drive, bps=_SLOW, **rates)


@contextmanager
def seconds_of(what: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - begun:.1f} s")


def _make_source(disk: Path, folder: Path, files_mib: dict[str, int]) -> None:
    """The same bytes at the same places for what is the same."""
    tree = folder / "tree"
    tree.mkdir(exist_ok=True)
    for seed, (name, mib) in enumerate(files_mib.items()):
        make_random(tree / name, mib * MIB, seed)
    filesystem = make_sparse(folder / "filesystem.img", _PART_MIB * MIB)
    run(["mkfs.ext4", "-q", "-F", "-L", "data", "-d", str(tree), str(filesystem)])
    make_sparse(disk, DISK_MIB * MIB)
    script = f"label: gpt\nstart=2048, size={_PART_MIB * 2048}, type=L\n"
    run(["sfdisk", "--quiet", str(disk)], input_bytes=script.encode())
    write_at(disk, MIB, filesystem.read_bytes())
