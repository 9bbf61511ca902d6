"""The map of ext2/3/4 against real filesystems: losing no file, and equal to the kernel's view."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from imager.allocation import allocation_map, identify
from imager.blocksource import FileSource, PartSource
from imager.process import run
from tests.loop import allocation_lab
from tests.loop.allocation_lab import (
    MIB,
    device_of,
    fill,
    free_by_kernel,
    frozen,
    make_image,
    manifest,
    mounted,
    poison,
    read_map,
)

pytestmark = pytest.mark.loop
memory_path = allocation_lab.memory_path  # the fixture

MATRIX = {
    "ext2-1k": "mkfs.ext2 -b 1024",
    "ext2-4k-revision0": "mkfs.ext2 -b 4096 -r 0",
    "ext2-no-sparse-super": "mkfs.ext2 -b 1024 -O ^sparse_super,^resize_inode",
    "ext3-1k": "mkfs.ext3 -b 1024",
    "ext3-4k": "mkfs.ext3 -b 4096 -J size=8",
    "ext4-default": "mkfs.ext4 -L label -U 3e1f9f43-3fbb-4d4f-9f51-39b0cd54bd33",
    "ext4-1k": "mkfs.ext4 -b 1024",
    "ext4-4k-small-groups": "mkfs.ext4 -b 4096 -g 1024",
    "ext4-meta-bg": "mkfs.ext4 -b 1024 -g 256 -N 4096 -O meta_bg,^resize_inode",
    "ext4-meta-bg-32bit": "mkfs.ext4 -b 1024 -O meta_bg,^resize_inode,^64bit",
    "ext4-no-flex-bg": "mkfs.ext4 -b 1024 -O ^flex_bg",
    "ext4-sparse-super2": "mkfs.ext4 -b 1024 -O sparse_super2,^resize_inode",
    "ext4-sparse-super2-one": "mkfs.ext4 -b 1024 -O sparse_super2 -E num_backup_sb=1",
    "ext4-bigalloc": "mkfs.ext4 -O bigalloc -C 16384",
    "ext4-bigalloc-1k": "mkfs.ext4 -b 1024 -O bigalloc -C 8192",
    "ext4-inline-data": "mkfs.ext4 -I 1024 -O inline_data",
    "ext4-mmp": "mkfs.ext4 -O mmp",
    "ext4-uninit-bg": "mkfs.ext4 -b 1024 -O ^metadata_csum,uninit_bg",
    "ext4-uninit-bg-32bit": "mkfs.ext4 -b 1024 -O ^metadata_csum,uninit_bg,^64bit",
    "ext4-no-checksums": "mkfs.ext4 -b 1024 -O ^metadata_csum,^uninit_bg",
    "ext4-32bit": "mkfs.ext4 -b 1024 -O ^64bit",
    "ext4-no-journal": "mkfs.ext4 -O ^has_journal",
    "ext4-no-resize-inode": "mkfs.ext4 -b 1024 -O ^resize_inode",
    "ext4-csum-seed": "mkfs.ext4 -b 1024 -O metadata_csum_seed",
    "ext4-fast-commit-orphan-file": "mkfs.ext4 -O fast_commit,orphan_file",
    "ext4-many-features": "mkfs.ext4 -O stable_inodes,verity,ea_inode,large_dir,encrypt",
    "ext4-no-lazy-tables": "mkfs.ext4 -b 2048 -E lazy_itable_init=0,packed_meta_blocks=1",
}


def _mkfs(line: str) -> list[str]:
    program, *options = line.split()
    return [program, "-q", "-F", "-E", "nodiscard", *options]


@pytest.mark.parametrize("line", MATRIX.values(), ids=MATRIX)
def test_nothing_unused_is_missed(memory_path: Path, line: str) -> None:
    image = make_image(memory_path / "image", _mkfs(line))
    with mounted(image) as folder:
        fill(folder, seed=len(line))
    with mounted(image, "loop,ro") as folder:
        before = manifest(folder)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    assert poison(image, found.used) > 16 * MIB
    run(["e2fsck", "-fn", str(image)])
    with mounted(image, "loop,ro") as folder:
        assert manifest(folder) == before


@pytest.mark.parametrize(
    "line",
    [line for name, line in MATRIX.items() if "no-journal" not in name and "ext2" not in name],
    ids=[name for name in MATRIX if "no-journal" not in name and "ext2" not in name],
)
def test_equals_the_kernels_own_map_while_frozen(memory_path: Path, line: str) -> None:
    image = make_image(memory_path / "image", _mkfs(line))
    with mounted(image) as folder:
        fill(folder, seed=len(line), files=60)
        with frozen(folder):
            found, free = read_map(device_of(folder)), free_by_kernel(folder)
    assert found.certainty == "exact", found.reason
    # The kernel counts blocks as used that it holds ready for open files, in memory only.
    assert not free.intersect(found.used)
    with mounted(image) as folder, frozen(folder):
        found, free = read_map(device_of(folder)), free_by_kernel(folder)
    assert found.certainty == "exact", found.reason
    assert found.used.complement(image.stat().st_size) == free


UNMOUNTABLE = {
    "64k blocks, bigger than a page": "mkfs.ext4 -b 65536 -J size=64",
    "quota, not in every kernel": "mkfs.ext4 -b 4096 -O quota,project -I 256",
    "casefold, not in every kernel": "mkfs.ext4 -b 1024 -O casefold",
    "64k blocks and clusters": "mkfs.ext4 -b 65536 -O bigalloc,^has_journal -C 131072",
}


@pytest.mark.parametrize("line", UNMOUNTABLE.values(), ids=UNMOUNTABLE)
def test_without_mounting(memory_path: Path, line: str) -> None:
    """What some kernels can't mount: filled by mkfs, read by debugfs."""
    tree, after = memory_path / "tree", memory_path / "after"
    tree.mkdir()
    after.mkdir()
    for n in range(50):
        (tree / f"file{n}").write_bytes(os.urandom(n * 5000))
    image = make_image(memory_path / "image", [*_mkfs(line), "-d", str(tree)], 256 * MIB)
    run(["e2fsck", "-fy", str(image)], accept=(0, 1))  # mkfs doesn't count quota usage
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    assert poison(image, found.used) > 64 * MIB
    run(["e2fsck", "-fn", str(image)])
    run(["debugfs", "-R", f"rdump / {after}", str(image)])
    for path in tree.iterdir():
        assert (after / path.name).read_bytes() == path.read_bytes()


def test_partition_bigger_than_its_filesystem(memory_path: Path) -> None:
    image = make_image(memory_path / "image", _mkfs("mkfs.ext4 -b 1024"))
    alone = read_map(image)
    with image.open("r+b") as file:
        file.truncate(128 * MIB + 512)
    with FileSource(image) as whole:
        found = allocation_map(PartSource(whole, 0, 100 * MIB + 512))
    assert found.certainty == "exact"
    assert found.used.covers(64 * MIB, 36 * MIB + 512)
    assert found.used.clip(0, 64 * MIB) == alone.used


def test_partition_smaller_than_its_filesystem_is_used_whole(memory_path: Path) -> None:
    image = make_image(memory_path / "image", _mkfs("mkfs.ext4"))
    with FileSource(image) as whole:
        part = PartSource(whole, 0, 64 * MIB - 4096)
        found = allocation_map(part)
        assert found.certainty == "all" and "only" in (found.reason or "")
        assert found.used.covers(0, part.size)


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        (["ssv state 2"], "errors"),
        (["ssv journal_inum 0"], "another device"),
        (["feature needs_recovery", "feature ^has_journal"], "one to recover"),
        (["feature ^has_journal", "ssv state 0"], "waits for e2fsck"),
        (["feature FEATURE_I30"], "unknown incompat feature bits 0x40000000"),
        (["feature FEATURE_R30"], "unknown ro_compat feature bits 0x40000000"),
        (["feature FEATURE_I0"], "unknown incompat feature bits 0x1"),
        (["ssv journal_dev 5"], "another device"),
        (["set_bg 1 checksum 5"], "group descriptor 1"),
        (["set_bg 0 block_bitmap_csum 5", "set_bg 0 checksum calc"], "block bitmap is wrong"),
        (["set_bg 0 free_blocks_count 5", "set_bg 0 checksum calc"], "free clusters"),
        (["freeb 270", "setb 8000"], "bitmap calls the metadata at block 270 free"),
    ],
)
def test_every_doubt_is_all_of_it(memory_path: Path, commands: list[str], said: str) -> None:
    image = make_image(memory_path / "image", _mkfs("mkfs.ext4 -b 1024"))
    script = "\n".join(commands) + "\n"
    run(["debugfs", "-w", "-f", "-", str(image)], input_bytes=script.encode())
    found = read_map(image)
    assert found.certainty == "all"
    assert said in (found.reason or "")
    assert found.used.covers(0, image.stat().st_size)


def test_external_journal_and_its_device(memory_path: Path) -> None:
    journal = make_image(memory_path / "journal", _mkfs("mkfs.ext4 -b 1024 -O journal_dev"))
    assert identify_file(journal) == "jbd"
    assert read_map(journal).certainty == "all"
    loop = run(["losetup", "-f", "--show", str(journal)]).stdout.decode().strip()
    try:
        image = make_image(memory_path / "image", _mkfs(f"mkfs.ext4 -b 1024 -J device={loop}"))
        found = read_map(image)
    finally:
        run(["losetup", "-d", loop])
    assert (found.certainty, found.reason) == ("all", "ext4: the journal is on another device")


def identify_file(path: Path) -> str:
    with FileSource(path) as source:
        return identify(source).kind


def test_speed(tmp_path: Path) -> None:
    """Printed, not asserted."""
    for size in ("16G", "8T"):
        image = tmp_path / size
        run(["truncate", "-s", size, str(image)])
        run(["mkfs.ext4", "-q", "-F", str(image)])
        start = time.perf_counter()
        found = read_map(image)
        print(f"{size} ext4: {time.perf_counter() - start:.3f} s, {len(found.used)} ranges")
        assert found.certainty == "exact"
        image.unlink()
