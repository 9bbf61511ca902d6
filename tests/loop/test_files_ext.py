"""The reader of ext2, ext3 and ext4 beside the kernel's."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.errors import ImagerError
from imager.files.ext import ExtReader
from tests.loop.allocation_lab import SHUTDOWN_LOGFLUSH, crash, damaged, make_image, mounted
from tests.loop.files_lab import assert_as_the_kernel, by_kernel, by_reader, fill_with_all, reading
from tests.support.disks import MIB, needs_loop

pytestmark = needs_loop

KINDS = {
    "ext4": "-t ext4",
    "ext4-1k": "-t ext4 -b 1024 -O meta_bg,^resize_inode",
    "bigalloc": "-t ext4 -O bigalloc -C 65536",
    "inline": "-t ext4 -O inline_data -I 256",
    "large-attributes": "-t ext4 -O ea_inode -I 512",
    "small-inodes": "-t ext4 -I 128",
    "ext3": "-t ext3",
    "ext2": "-t ext2 -b 1024",
}


def made(folder: Path, options: str, size: int = 64 * MIB) -> Path:
    return make_image(
        folder / "image", ["mkfs.ext4", "-q", "-F", "-E", "nodiscard", *options.split()], size
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_as_the_kernel_shows_it(kind: str, tmp_path: Path) -> None:
    image = made(tmp_path, KINDS[kind])
    with mounted(image) as folder:
        fill_with_all(folder)
        if kind == "large-attributes":
            os.setxattr(folder / "old", "user.large", b"long " * 9000)
    reader = assert_as_the_kernel(image, ExtReader)
    assert reader.notes == ()


@pytest.mark.parametrize("kind", ["ext3", "ext4"])
def test_a_journal_in_use(kind: str, tmp_path: Path) -> None:
    """As after the kernel's replay; without it, late files are not there."""
    image = made(tmp_path, f"-t {kind}")
    with mounted(image) as folder:
        (folder / "first").mkdir()
    with mounted(image) as folder:
        fill_with_all(folder)
        crash(folder, SHUTDOWN_LOGFLUSH)
    before = image.read_bytes()
    with reading(image, ExtReader) as reader:
        found = by_reader(reader)
        assert reader.notes == ("its journal was in use; it is replayed in memory",)
    assert image.read_bytes() == before
    with mounted(image, "loop,noatime") as folder:
        expected = by_kernel(folder)
    # Opening for writing changes times of the top and of lost+found.
    names = expected.keys() - {"."}
    assert names == found.keys() - {"."} and len(names) > 200
    # What was never written to its place before the crash has no content to compare.
    assert {name: expected[name] for name in names} == {name: found[name] for name in names}


def test_damage_is_an_error_and_never_a_wrong_tree(tmp_path: Path) -> None:
    """Whatever bytes are there: an answer or one of our errors, in bounded time."""
    image = made(tmp_path, "-t ext4 -O ^metadata_csum", 16 * MIB)
    with mounted(image) as folder:
        for n in range(40):
            (folder / f"file-{n}").write_bytes(b"content" * n * 50)
        (folder / "folder").mkdir()
        (folder / "link").symlink_to("folder")
    chance = random.Random(5)
    errors = 0
    for _ in range(60):
        with damaged(image, [(0, 8192), (8192, 600_000)], chance):
            try:
                with FileSource(image) as source:
                    by_reader(ExtReader(source))
            except (ImagerError, OSError):
                errors += 1
    print(f"{errors} of 60 were noticed")
