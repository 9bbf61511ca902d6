"""Maps of a mirror's members, made by the real mdadm under a kernel that has md."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.process import run
from tests.guest.lab import attached, filled, poison_all, read_maps, read_tree
from tests.loop.allocation_lab import MIB
from tests.support.disks import make_file, mounted
from tests.support.trees import fill_tree

ARRAY = "/dev/md10"


@pytest.fixture(autouse=True)
def no_udev(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDADM_NO_UDEV", "1")


@contextlib.contextmanager
def new_array(images: list[Path], *options: str) -> Iterator[list[str]]:
    """``--assume-clean``: the images are the same to begin with."""
    create = ["mdadm", "--create", ARRAY, "--run", "--quiet", "--assume-clean", f"-n{len(images)}"]
    with attached(images) as devices:
        run([*create, *options, *devices])
        try:
            yield devices
        finally:
            run(["mdadm", "--stop", "--quiet", ARRAY])


@contextlib.contextmanager
def assembled(images: list[Path]) -> Iterator[str]:
    with attached(images) as devices:
        run(["mdadm", "--assemble", "--run", "--quiet", ARRAY, *devices])
        try:
            yield ARRAY
        finally:
            run(["mdadm", "--stop", "--quiet", ARRAY])


def _fill(tree: Path) -> None:
    fill_tree(tree, seed=3, files=30)


@pytest.mark.parametrize("version", ["0.90", "1.0", "1.1", "1.2"])
def test_both_members_of_a_stopped_mirror(tmp_path: Path, version: str) -> None:
    images = [make_file(tmp_path / name, 32 * MIB) for name in "ab"]
    with new_array(images, "-l1", f"-e{version}", "--bitmap=internal"):
        tree = filled(ARRAY, "ext4", tmp_path / "mnt", _fill)
    maps = read_maps(images)
    print(maps[0].certainty, maps[0].used.total / MIB, maps[0].reason)
    assert [found.certainty for found in maps] == ["exact"] * 2, maps[0].reason
    assert maps[0].reason == "it holds ext4"
    assert read_maps(images[1:]) == maps[1:]
    assert poison_all(images, maps) > 35 * MIB
    with assembled(images) as array:
        assert read_tree(array, "ext4", tmp_path / "mnt") == tree
    if version == "1.2":
        with assembled(images[1:]) as array:
            assert read_tree(array, "ext4", tmp_path / "mnt") == tree


def test_a_mirror_in_use(tmp_path: Path) -> None:
    """The copy of a running server: filesystem mounted, array not clean."""
    images = [make_file(tmp_path / name, 32 * MIB) for name in "ab"]
    copies = [image.with_suffix(".copy") for image in images]
    with new_array(images, "-l1", "-e1.2", "--bitmap=internal"):
        run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", ARRAY])
        Path("/sys/block/md10/md/safe_mode_delay").write_text("0")  # never clean by itself
        with mounted(ARRAY, tmp_path / "mnt") as folder:
            _fill(folder)
            run(["sync"])
            for image, copy in zip(images, copies, strict=True):
                shutil.copyfile(image, copy)
        tree = read_tree(ARRAY, "ext4", tmp_path / "mnt")
    maps = read_maps(copies)
    print(maps[0].certainty, maps[0].used.total / MIB, maps[0].reason)
    assert [found.certainty for found in maps] == ["union"] * 2
    (alone,) = read_maps(copies[:1])
    assert alone.certainty == "all" and "not all of its members" in (alone.reason or "")
    assert poison_all(copies, maps) > 30 * MIB
    with assembled(copies) as array:
        run(["e2fsck", "-p", array], accept=(0, 1))
        assert read_tree(array, "ext4", tmp_path / "mnt") == tree


def test_members_that_are_taken_whole(tmp_path: Path) -> None:
    images = [make_file(tmp_path / name, 24 * MIB) for name in "abcd"]
    with new_array(images, "-l5", "-e1.2"):
        run(["mkfs.ext4", "-q", "-F", ARRAY])
    for found in read_maps(images):
        assert (found.certainty, "RAID level 5" in (found.reason or "")) == ("all", True)
    Path("/proc/sys/dev/raid/speed_limit_max").write_text("1")
    Path("/proc/sys/dev/raid/speed_limit_min").write_text("1")
    images = [make_file(tmp_path / name, 24 * MIB) for name in "ab"]
    with new_array(images, "-l1", "-e1.2") as devices, attached([tmp_path / "c"]) as (spare,):
        run(["mdadm", "--zero-superblock", "--quiet", spare])
        run(["mdadm", ARRAY, "--quiet", "--fail", devices[0]], accept=(0, 1))
        run(["mdadm", ARRAY, "--quiet", "--add", spare])
        (rebuilt,) = read_maps([tmp_path / "c"])
    assert (rebuilt.certainty, rebuilt.reason) == ("all", "md: it is being rebuilt")


def test_luks(tmp_path: Path) -> None:
    image = make_file(tmp_path / "image", 32 * MIB)
    cheap = ["--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"]
    run(["cryptsetup", "luksFormat", "-q", *cheap, str(image)], input_bytes=b"secret")
    (found,) = read_maps([image])
    assert found.certainty == "all" and found.used.total == 32 * MIB
    assert "can't be thinned offline" in (found.reason or "")
