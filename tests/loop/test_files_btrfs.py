"""The reader of Btrfs beside the kernel's."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.errors import ImagerError, UnsupportedError
from imager.files.btrfs.reader import BtrfsReader
from imager.process import run
from tests.loop.allocation_lab import (
    damaged,
    differences,
    mounted,
    opened,
)
from tests.loop.files_lab import by_kernel, by_reader, fill_with_all, reading
from tests.support.disks import MIB, make_sparse, needs_loop

pytestmark = needs_loop


def made(folder: Path, *options: str) -> Path:
    image = make_sparse(folder / "image", 256 * MIB)
    run(["mkfs.btrfs", "-q", "-f", *options, str(image)])
    return image


@pytest.mark.parametrize("compression", ["", "zlib", "lzo", "zstd"])
def test_all_is_as_the_kernel_shows_it(compression: str, tmp_path: Path) -> None:
    """Subvolumes within each other, a snapshot that shares with one, and a folder in trees."""
    image = made(tmp_path, *(["--mixed"] if compression == "lzo" else []))
    chance = random.Random(3)
    words = [chance.randbytes(chance.randrange(1, 9)) for _ in range(300)]
    text = b" ".join(chance.choice(words) for _ in range(100_000))
    options = f",compress-force={compression}" if compression else ""
    with mounted(image, f"loop,noatime{options}") as folder:
        run(["btrfs", "subvolume", "create", str(folder / "sub")])
        fill_with_all(folder / "sub")
        run(["btrfs", "subvolume", "create", str(folder / "sub/inner")])
        (folder / "sub/inner/file").write_bytes(text[:5000])
        (folder / "text").write_bytes(text)
        with (folder / "text").open("r+b") as file:
            os.fsync(file.fileno())
            file.seek(70_000)
            file.write(b"changed in the middle")
        run(["btrfs", "subvolume", "snapshot", "-r", str(folder / "sub"), str(folder / "snap")])
        (folder / "sub/tiny").write_text("changed since the snapshot")
        (folder / "large").mkdir()
        for n in range(1500):
            (folder / "large" / f"entry-{n:06}-{'y' * (n % 40)}").touch()
    with mounted(image, "loop,ro,subvolid=5") as folder:
        expected = by_kernel(folder)
    with reading(image, BtrfsReader) as reader:
        found = by_reader(reader)
        large = reader.find(reader.top(), "large")
        assert large is not None and len(list(reader.names(large))) == 1500
        assert reader.find(large, "no such name") is None
    # A place where a subvolume was not taken into the snapshot: its times are of the moment.
    assert expected.pop("snap/inner") and found.pop("snap/inner")
    assert differences(expected, found) == {}


def test_a_log_in_use_is_refused(tmp_path: Path) -> None:
    image = made(tmp_path)
    with mounted(image) as folder:
        (folder / "first").write_text("text")
        os.sync()
        (folder / "file").write_text("text")
        with opened(folder / "file") as fd:
            os.fsync(fd)
        copy = tmp_path / "copy"
        run(["cp", "--sparse=always", str(image), str(copy)])
    with FileSource(copy) as source, pytest.raises(UnsupportedError, match="only the kernel"):
        BtrfsReader(source)


def test_damage_is_an_error_and_never_a_wrong_tree(tmp_path: Path) -> None:
    image = made(tmp_path, "-m", "single")
    with mounted(image) as folder:
        for n in range(40):
            (folder / f"file-{n}").write_bytes(b"content" * n * 10)
        (folder / "link").symlink_to("folder")
    with reading(image, BtrfsReader) as reader:
        whole = by_reader(reader)
    raw = image.read_bytes()
    fsid = raw[65536 + 32 : 65536 + 48]  # stands in each tree node too
    nodes = [at for at in range(1 << 20, len(raw), 4096) if raw[at + 32 : at + 48] == fsid]
    places = [(at, 16384) for at in nodes if at not in (64 << 20,)]
    chance = random.Random(5)
    errors = 0
    for _ in range(60):
        with damaged(image, [(65536, 4096), *places], chance):
            try:
                with FileSource(image) as source:
                    assert by_reader(BtrfsReader(source)) == whole
            except (ImagerError, OSError):
                errors += 1
    assert errors > 5
