"""Maps of physical volumes, made by the real lvm2 under a kernel that has device-mapper."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.process import run
from tests.guest.lab import Tree, attached, filled, poison_all, read_maps, read_tree, said
from tests.loop.allocation_lab import MIB
from tests.support.disks import make_file
from tests.support.trees import fill_tree

CONFIG = """
devices { filter=["a|^/dev/loop|", "a|^/dev/md|", "r|.*|"] use_devicesfile=0
          obtain_device_list_from_udev=0 }
activation { udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0 }
backup { backup=0 archive=0 }
"""


@pytest.fixture(autouse=True)
def lvm_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lvm").mkdir()
    (tmp_path / "lvm" / "lvm.conf").write_text(CONFIG)
    monkeypatch.setenv("LVM_SYSTEM_DIR", str(tmp_path / "lvm"))


@contextlib.contextmanager
def active(images: list[Path]) -> Iterator[list[str]]:
    """The volume group ``vg`` with its volumes, from the images."""
    with attached(images) as devices:
        run(["vgchange", "-q", "-ay", "vg"])
        try:
            yield devices
        finally:
            run(["vgchange", "-q", "-an", "vg"])


@contextlib.contextmanager
def new_group(images: list[Path], *options: str) -> Iterator[list[str]]:
    with attached(images) as devices:
        run(["pvcreate", "-q", "-y", *options, *devices])
        run(["vgcreate", "-q", "-s", "1m", "vg", *devices])
        try:
            yield devices
        finally:
            run(["vgchange", "-q", "-an", "vg"])


def create(name: str, size: int, *options: str) -> str:
    """A logical volume of ``size`` MiB; options may end with the devices."""
    run(["lvcreate", "-q", "-y", "-Zn", "-Wn", "-n", name, "-L", f"{size}m", "vg", *options])
    return f"/dev/vg/{name}"


def _fill(tree: Path) -> None:
    fill_tree(tree, seed=3, files=30)


def test_plain_volumes(tmp_path: Path) -> None:
    """Linear on one and on two disks, in pieces, striped, mirrored, swap, and free extents."""
    images = [make_file(tmp_path / f"pv{n}", size * MIB) for n, size in enumerate((120, 96, 8))]
    kinds = {"root": "ext4", "wide": "ext4", "striped": "xfs", "mirror": "ext4"}
    trees: dict[str, Tree] = {}
    with new_group(images, "--metadatacopies", "2") as (one, two, three):
        create("gap", 4, one)
        create("root", 14, one)
        create("swap", 4, one)
        run(["lvextend", "-q", "-L", "+6m", "vg/root", one])
        create("wide", 18, one)
        run(["lvextend", "-q", "-L", "+14m", "vg/wide", two])
        create("striped", 48, "-i", "2", "-I", "4k", one, two)
        create("mirror", 16, "--type", "mirror", "-m", "1", one, two, three)
        run(["mkswap", "/dev/vg/swap"])
        run(["lvremove", "-q", "-y", "vg/gap"])
        while said(["lvs", "--noheadings", "-o", "copy_percent", "vg/mirror"]) != "100.00":
            time.sleep(0.1)
        for name, kind in kinds.items():
            trees[name] = filled(f"/dev/vg/{name}", kind, tmp_path / "mnt", _fill)
    maps = read_maps(images)
    for found in maps:
        print(found.certainty, found.used.total / MIB, found.reason)
    assert [found.certainty for found in maps] == ["exact"] * 3
    assert poison_all(images, maps) > 100 * MIB
    with active(images):
        for name, kind in kinds.items():
            assert read_tree(f"/dev/vg/{name}", kind, tmp_path / "mnt") == trees[name], name
        run(["swapon", "/dev/vg/swap"])
        run(["swapoff", "/dev/vg/swap"])
    (alone,) = read_maps(images[:1])
    assert alone.certainty == "all"
    assert "root: ext4, exact" in (alone.reason or "")
    assert "wide: whole (partly on pv1" in (alone.reason or "")
    assert "mirror: whole (partly on pv1" in (alone.reason or "")
    assert not maps[0].used.subtract(alone.used)


def test_the_mirror_from_its_second_leg(tmp_path: Path) -> None:
    images = [make_file(tmp_path / f"pv{n}", 32 * MIB) for n in range(2)]
    with new_group(images) as devices:
        create("mirror", 16, "--type", "mirror", "-m", "1", "--mirrorlog", "core", *devices)
        while said(["lvs", "--noheadings", "-o", "copy_percent", "vg/mirror"]) != "100.00":
            time.sleep(0.1)
        tree = filled("/dev/vg/mirror", "ext4", tmp_path / "mnt", _fill)
    maps = read_maps(images)
    assert [found.certainty for found in maps] == ["exact"] * 2, maps[0].reason
    assert poison_all(images, maps) > 12 * MIB
    with active(images) as (one, _):
        run(["lvconvert", "-q", "-y", "-m", "0", "vg/mirror", one])
        assert read_tree("/dev/vg/mirror", "ext4", tmp_path / "mnt") == tree


def test_what_is_taken_whole(tmp_path: Path) -> None:
    """Thin pools, snapshots with their origins, RAID levels; the plain one beside stays exact."""
    images = [make_file(tmp_path / f"pv{n}", 112 * MIB) for n in range(2)]
    trees: dict[str, Tree] = {}
    with new_group(images) as (one, two):
        create("plain", 16, one)
        create("origin", 16, one)
        run(["lvcreate", "-q", "-y", "-L", "20m", "-T", "vg/pool", "-Zn", one])
        run(["lvcreate", "-q", "-y", "-V", "16m", "-T", "vg/pool", "-n", "thin"])
        create("raid", 16, "--type", "raid1", "-m", "1", one, two)
        for name in ("plain", "origin", "thin", "raid"):
            trees[name] = filled(f"/dev/vg/{name}", "ext4", tmp_path / "mnt", _fill)
        run(["lvcreate", "-q", "-y", "-s", "-L", "12m", "-n", "snap", "vg/origin", two])
        trees["snap"] = trees["origin"]
        trees["origin"] = filled("/dev/vg/origin", "ext4", tmp_path / "mnt", lambda tree: None)
    maps = read_maps(images)
    for found in maps:
        print(found.certainty, found.used.total / MIB, found.reason)
        assert found.certainty == "all"
    assert "plain: ext4, exact" in (maps[0].reason or "")
    assert maps[0].used.total < (16 + 16 + 24 + 4 + 17 + 8) * MIB
    assert poison_all(images, maps) > 90 * MIB
    with active(images):
        for name, tree in trees.items():
            assert read_tree(f"/dev/vg/{name}", "ext4", tmp_path / "mnt") == tree, name


def test_a_move_in_progress(tmp_path: Path) -> None:
    images = [make_file(tmp_path / f"pv{n}", 32 * MIB) for n in range(2)]
    with new_group(images) as (one, two):
        create("root", 20, one)
        tree = filled("/dev/vg/root", "ext4", tmp_path / "mnt", _fill)
        # As slow as the kernel can be told to: it would be ready before its state is read.
        run(["modprobe", "dm_mirror"])
        Path("/sys/module/dm_mirror/parameters/raid1_resync_throttle").write_text("1")
        run(["pvmove", "-q", "-b", "-i", "3600", one, two])
        run(["sync"])
        maps = read_maps(images)
        run(["pvmove", "-q", "--abort"])
        assert read_tree("/dev/vg/root", "ext4", tmp_path / "mnt") == tree
    for found in maps:
        print(found.certainty, found.used.total / MIB, found.reason)
        assert found.certainty == "all" and "whole" in (found.reason or "")
        assert 20 * MIB < found.used.total < 24 * MIB


def test_a_volume_group_on_a_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDADM_NO_UDEV", "1")
    images = [make_file(tmp_path / name, 32 * MIB) for name in "ab"]
    array = "/dev/md11"
    with attached(images) as devices:
        run(["mdadm", "-C", array, "-R", "-q", "--assume-clean", "-n2", "-l1", "-e1.2", *devices])
        run(["pvcreate", "-q", "-y", array])
        run(["vgcreate", "-q", "-s", "1m", "vg", array])
        create("root", 16)
        tree = filled("/dev/vg/root", "ext4", tmp_path / "mnt", _fill)
        run(["vgchange", "-q", "-an", "vg"])
        run(["mdadm", "--stop", "-q", array])
    maps = read_maps(images)
    assert [found.reason for found in maps] == ["it holds lvm2 (root: ext4, exact)"] * 2
    assert [found.certainty for found in maps] == ["exact"] * 2
    assert poison_all(images, maps) > 40 * MIB
    with attached(images) as devices:
        run(["mdadm", "--assemble", "--run", "-q", array, *devices])
        run(["vgchange", "-q", "-ay", "vg"])
        assert read_tree("/dev/vg/root", "ext4", tmp_path / "mnt") == tree
        run(["vgchange", "-q", "-an", "vg"])
        run(["mdadm", "--stop", "-q", array])
