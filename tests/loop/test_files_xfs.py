"""The reader of XFS beside the kernel's."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.errors import ImagerError, UnsupportedError
from imager.files.xfs.reader import XfsReader
from imager.process import run
from tests.loop.allocation_lab import (
    SHUTDOWN_LOGFLUSH,
    crash,
    damaged,
    differences,
    mounted,
)
from tests.loop.files_lab import by_kernel, by_reader, fill_with_all, reading
from tests.support.disks import MIB, make_sparse, needs_loop

pytestmark = needs_loop

KINDS = {
    "plain": "",
    "small-blocks": "-b size=1024 -m rmapbt=1,reflink=1",
    "large-folders": "-n size=16384 -i size=1024",
    "many-extents": "-i nrext64=1",
}


def made(folder: Path, options: str = "") -> Path:
    image = make_sparse(folder / "image", 320 * MIB)
    run(["mkfs.xfs", "-q", "-f", *options.split(), str(image)])
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_as_the_kernel_shows_it(kind: str, tmp_path: Path) -> None:
    """Folders and attributes of every form: in the inode, one block, leaves, trees."""
    image = made(tmp_path, KINDS[kind])
    with mounted(image, "loop,noatime") as folder:
        fill_with_all(folder)
        for n in range(200):
            os.setxattr(folder / "late", f"user.n{n}", b"v" * n)
        os.setxattr(folder / "old", "user.large", b"long " * 9000)
        (folder / "large").mkdir()
        for n in range(1500):
            (folder / "large" / f"entry-{n:06}-{'y' * (n % 40)}").touch()
        for n in range(0, 1500, 3):
            (folder / "large" / f"entry-{n:06}-{'y' * (n % 40)}").unlink()
        with (folder / "fragmented").open("wb") as file:
            for n in range(300):
                file.seek(n * 20_000)
                file.write(bytes([n % 251]) * 3000)
                os.fsync(file.fileno())
    with mounted(image, "loop,ro") as folder:
        expected = by_kernel(folder)
    for *_, attributes, _ in expected.values():  # type: ignore[misc]
        # How XFS keeps ACLs: the kernel lists them twice.
        attributes.pop("trusted.SGI_ACL_FILE", None)
        attributes.pop("trusted.SGI_ACL_DEFAULT", None)
    with reading(image, XfsReader) as reader:
        found = by_reader(reader)
        top = reader.top()
        large = reader.find(top, "large")
        assert large is not None and len(list(reader.names(large))) == 1000
        assert reader.find(large, "entry-000000-") is None
    assert differences(expected, found) == {}


def test_a_log_in_use_is_refused(tmp_path: Path) -> None:
    image = made(tmp_path)
    with mounted(image) as folder:
        (folder / "file").write_text("text")
        crash(folder, SHUTDOWN_LOGFLUSH)
    with FileSource(image) as source, pytest.raises(UnsupportedError, match="only the kernel"):
        XfsReader(source)


def test_damage_is_an_error_and_never_a_wrong_tree(tmp_path: Path) -> None:
    image = made(tmp_path)
    with mounted(image) as folder:
        for n in range(40):
            (folder / f"file-{n}").write_bytes(b"content" * n * 50)
            os.setxattr(folder / f"file-{n}", "user.x", b"x" * n * 20)
        (folder / "link").symlink_to("folder")
    chance = random.Random(5)
    errors = 0
    for _ in range(60):
        with damaged(image, [(0, 512), (16384, 600_000)], chance):
            try:
                with FileSource(image) as source:
                    by_reader(XfsReader(source))
            except (ImagerError, OSError):
                errors += 1
    print(f"{errors} of 60 were noticed")
