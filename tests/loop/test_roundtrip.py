"""Real filesystems out and back: file for file, and byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.layout import read_layout
from imager.loopdevice import loop_device
from imager.process import run
from tests.support.commandline import imager
from tests.support.disks import (
    MIB,
    MKFS,
    check_filesystem,
    digest,
    loop_disk,
    make_file,
    make_filesystem,
    make_gpt,
    mounted,
    needs_loop,
)
from tests.support.trees import describe_tree, fill_tree

pytestmark = needs_loop

SIZES = {"ext4": 64 * MIB, "ext2": 48 * MIB, "xfs": 304 * MIB, "btrfs": 128 * MIB}


def filled_filesystem(image: Path, kind: str, seed: int) -> dict[str, object]:
    """A filesystem on what is full of a pattern; the description of its tree."""
    make_file(image, SIZES[kind])
    with loop_device(str(image)) as device:
        make_filesystem(device, kind)
        with mounted(device, image.parent / "mnt") as folder:
            fill_tree(folder, seed)
        with mounted(device, image.parent / "mnt", "ro") as folder:
            return describe_tree(folder)


def tree_of(image: Path, kind: str) -> dict[str, object]:
    """The tree of a restored filesystem, after a check of the latter."""
    with loop_device(str(image), read_only=True) as device:
        check_filesystem(device, kind)
        with mounted(device, image.parent / "mnt", "ro") as folder:
            return describe_tree(folder)


def assert_used_kept_and_rest_zero(source: Path, restored: Path) -> int:
    """Byte for byte, by the allocation map; returns how many bytes are unused."""
    with FileSource(source) as opened:
        used = read_layout(opened).used()
    unused = used.complement(source.stat().st_size)
    with source.open("rb") as one, restored.open("rb") as other:
        for extent in used:
            one.seek(extent.offset)
            other.seek(extent.offset)
            assert one.read(extent.length) == other.read(extent.length), f"used: {extent}"
        for extent in unused:
            other.seek(extent.offset)
            assert not other.read(extent.length).strip(b"\0"), f"unused: {extent}"
    return unused.total


@pytest.mark.parametrize("kind", MKFS)
def test_every_file_comes_back(repo: Path, tmp_path: Path, kind: str) -> None:
    if not shutil.which(MKFS[kind][0]):
        pytest.skip(f"{MKFS[kind][0]} is not installed")
    source = tmp_path / "source.img"
    tree = filled_filesystem(source, kind, seed=7)
    before = digest(source)
    taken = imager("capture", source, "--repo", repo, "--json").json
    assert digest(source) == before, "the source was changed"
    (volume,) = taken["disks"][0]["partitions"]
    assert volume["filesystem"]["kind"] == kind
    assert volume["certainty"] == "exact" or not kind.startswith("ext")
    fresh, old = tmp_path / "fresh.img", make_file(tmp_path / "old.img", SIZES[kind], 0x5A)
    for target in (fresh, old):
        imager("restore", taken["id"], target, "--yes", "--read-back", "--repo", repo)
        assert_used_kept_and_rest_zero(source, target)
        assert tree_of(target, kind) == tree
    unused = assert_used_kept_and_rest_zero(source, fresh)
    assert unused > SIZES[kind] // 4 or volume["certainty"] == "all"
    assert imager("verify", "--repo", repo, "--json").json["sound"] is True


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_all_blocks_is_byte_for_byte(repo: Path, tmp_path: Path, kind: str) -> None:
    if not shutil.which(MKFS[kind][0]):
        pytest.skip(f"{MKFS[kind][0]} is not installed")
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    filled_filesystem(source, kind, seed=8)
    taken = imager("capture", source, "--all-blocks", "--repo", repo, "--json").json
    assert taken["all_blocks"] is True
    make_file(target, SIZES[kind], 0x5A)
    imager("restore", taken["id"], target, "--yes", "--repo", repo)
    assert digest(target) == digest(source)


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_partitioned_disk_by_block_devices(repo: Path, tmp_path: Path, sector: int) -> None:
    """ext4, swap, foreign bytes, and bytes outside of partitions; device to device."""
    source, target = make_file(tmp_path / "a.img", 96 * MIB), tmp_path / "b.img"
    make_file(target, 96 * MIB, 0x5A)
    unit = MIB // sector
    script = (
        "label: gpt\n"
        f"start={unit}, size={50 * unit}, type=L\n"
        f"start={60 * unit}, size={16 * unit}, type=S\n"
        f"start={80 * unit}, size={8 * unit}, type=L\n"
    )
    with loop_disk(source, sector_size=sector) as device:
        run(["sfdisk", "--quiet", "--wipe=never", device], input_bytes=script.encode())
    with loop_device(str(source), MIB, 50 * MIB, sector_size=sector) as part:
        make_filesystem(part, "ext4")
        with mounted(part, tmp_path / "mnt") as folder:
            fill_tree(folder, seed=9)
        with mounted(part, tmp_path / "mnt", "ro") as folder:
            tree = describe_tree(folder)
    with loop_device(str(source), 60 * MIB, 16 * MIB, sector_size=sector) as part:
        run(["mkswap", "-q", part])
    with loop_device(str(source), sector_size=sector, read_only=True) as device:
        taken = imager("capture", device, "--name", "disk", "--repo", repo, "--json").json
        assert taken["disks"][0]["logical_sector"] == sector
        kinds = [item["filesystem"]["kind"] for item in taken["disks"][0]["partitions"]]
        assert kinds == ["ext4", "swap", "unknown"]
        with FileSource(device) as opened:
            used = read_layout(opened).used()
    with loop_disk(target, sector_size=sector) as device:
        imager("restore", taken["id"], device, "--yes", "--read-back", "--repo", repo)
        assert b"label: gpt" in run(["sfdisk", "--dump", device]).stdout
    with source.open("rb") as one, target.open("rb") as other:
        for extent in used:
            one.seek(extent.offset)
            other.seek(extent.offset)
            assert one.read(extent.length) == other.read(extent.length)
        for extent in used.complement(96 * MIB):
            other.seek(extent.offset)
            assert not other.read(extent.length).strip(b"\0")
    with loop_device(str(target), MIB, 50 * MIB, sector_size=sector, read_only=True) as part:
        check_filesystem(part, "ext4")
        with mounted(part, tmp_path / "mnt", "ro") as folder:
            assert describe_tree(folder) == tree


def test_an_image_after_a_change_and_back(repo: Path, tmp_path: Path) -> None:
    """What the product is for: an image before a change, and the server back after it."""
    source = make_gpt(tmp_path / "server.img")
    size = (64 * MIB // 512 - 40960 - 2048) * 512
    with loop_device(str(source), 40960 * 512, size) as part:
        make_filesystem(part, "ext4")
        with mounted(part, tmp_path / "mnt") as folder:
            fill_tree(folder, seed=10)
        with mounted(part, tmp_path / "mnt", "ro") as folder:
            tree = describe_tree(folder)
    first = imager("capture", source, "--note", "before", "--repo", repo, "--json").json
    with loop_device(str(source), 40960 * 512, size) as part, mounted(part, tmp_path / "mnt"):
        shutil.rmtree(tmp_path / "mnt" / "d1")
        (tmp_path / "mnt" / "new").write_bytes(b"changed" * 10_000)
    second = imager("capture", source, "--note", "after", "--repo", repo, "--json").json
    counts = second["statistics"]
    assert counts["known_blocks"] > counts["new_blocks"] > 0
    for change in imager("diff", first["id"], second["id"], "--repo", repo, "--json").json[
        "changes"
    ]:
        assert "partition 2" in change["where"] and "ext4" in change["where"]
    (result,) = imager(
        "restore", first["id"], source, "--delta", "--yes", "--repo", repo, "--json"
    ).json
    assert 0 < result["written_bytes"] < result["kept_bytes"]
    with loop_device(str(source), 40960 * 512, size, read_only=True) as part:
        check_filesystem(part, "ext4")
        with mounted(part, tmp_path / "mnt", "ro") as folder:
            assert describe_tree(folder) == tree
