"""Overlays: which image they lie over, what they hold, and the disk that they make."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.commit import find_base
from imager.errors import ImagerError, ObjectMissing, UsageError
from imager.manifest import Manifest
from imager.overlay import OverlaySource, make_overlay, overlay_file, read_overlay
from imager.process import beside, find_tool, run
from imager.repository import Repository
from tests.support.commandline import imager
from tests.support.disks import MIB, make_random

pytestmark = pytest.mark.skipif(find_tool("qemu-img") is None, reason="needs qemu-img")

SIZE = 4 * MIB + 512


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_random(tmp_path / "disk.img", SIZE)


@pytest.fixture
def repository(repo: Path) -> Repository:
    return Repository.open(str(repo))


@pytest.fixture
def image(disk: Path, repo: Path, repository: Repository) -> Manifest:
    made = imager("capture", disk, "--repo", repo, "--json").json["image"]
    return repository.manifest(made)


@pytest.fixture
def overlay(tmp_path: Path, repository: Repository, image: Manifest) -> Path:
    path = tmp_path / "an, overlay.qcow2"
    make_overlay(path, repository, image, image.disks[0])
    return path


def write(overlay: Path, disk: Path, *commands: str) -> None:
    """By QEMU itself, over the disk in place of the image."""
    base = f"driver=raw,file.driver=file,file.filename={disk}"
    file = str(overlay).replace(",", ",,")
    options = f"driver=qcow2,file.driver=file,file.filename={file}"
    below = ",".join(f"backing.{option}" for option in base.split(","))
    words = [word for command in commands for word in ("-c", command)]
    run(["qemu-io", "--image-opts", *words, f"{options},{below}"])


@pytest.fixture
def base(disk: Path) -> Iterator[FileSource]:
    with FileSource(disk) as source:
        yield source


def test_what_it_lies_over(overlay: Path, repository: Repository, image: Manifest) -> None:
    found = read_overlay(overlay)
    assert found.base == (repository.id, image.id, image.disks[0].name)
    assert found.size == SIZE
    with pytest.raises(UsageError, match="there already"):
        make_overlay(overlay, repository, image, image.disks[0])


def test_an_empty_one_is_the_base(overlay: Path, base: FileSource) -> None:
    with OverlaySource(read_overlay(overlay), base) as source:
        assert source.pieces == []
        assert source.pread(0, SIZE) == base.pread(0, SIZE)
        with pytest.raises(ImagerError):
            source.pread(SIZE - 1, 2)


def test_what_was_written_shows(overlay: Path, disk: Path, base: FileSource) -> None:
    write(
        overlay,
        disk,
        "write -P 0x11 4096 512",
        "write -P 0x22 1M 200k",
        "write -z 2M 128k",
        f"write -P 0x33 {SIZE - 512} 512",
    )
    expected = bytearray(disk.read_bytes())
    expected[4096:4608] = b"\x11" * 512
    expected[MIB : MIB + (200 << 10)] = b"\x22" * (200 << 10)
    expected[2 * MIB : 2 * MIB + (128 << 10)] = bytes(128 << 10)
    expected[SIZE - 512 :] = b"\x33" * 512
    with OverlaySource(read_overlay(overlay), base) as source:
        assert source.pread(0, SIZE) == expected
        chance = random.Random(3)
        for _ in range(200):
            start = chance.randrange(SIZE)
            length = min(chance.randrange(1, 300_000), SIZE - start)
            assert source.pread(start, length) == expected[start : start + length]
        assert source.changed.total < MIB


def test_a_commit_is_a_full_capture(overlay: Path, disk: Path, repo: Path, image: Manifest) -> None:
    write(overlay, disk, "write -P 0x44 3M 4k", "write -z 1M 64k")
    made = imager("commit", overlay, "--repo", repo, "--note", "why", "--json").json
    assert (made["name"], made["previous"], made["note"]) == (image.name, image.id, "why")
    content = bytearray(disk.read_bytes())
    content[3 * MIB : 3 * MIB + 4096] = b"\x44" * 4096
    content[MIB : MIB + (64 << 10)] = bytes(64 << 10)
    disk.write_bytes(content)
    full = imager("capture", disk, "--repo", repo, "--json").json
    assert full["disks"][0]["root"] == made["disks"][0]["root"]
    assert full["disks"][0]["root"] != image.disks[0].root
    assert made["statistics"]["read_bytes"] <= 3 * image.block_size  # only what was written


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"\0" * 4096, bytes(range(256)) * 16])
def test_what_is_no_overlay(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="no overlay"):
        read_overlay(file)


def test_an_overlay_over_something_else(tmp_path: Path, repo: Path) -> None:
    file = tmp_path / "other.qcow2"
    create = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "x.img"]
    run([*create, str(file), "1M"])
    assert "no overlay" in imager("commit", file, "--repo", repo, code=2).err


def test_a_commit_elsewhere(overlay: Path, tmp_path: Path, repository: Repository) -> None:
    other = Repository.create(str(tmp_path / "other"))
    with pytest.raises(ImagerError, match="another repository"):
        find_base(overlay, other)
    with pytest.raises(ObjectMissing):
        find_base(tmp_path / "nothing", repository)
    (image_id,) = repository.image_ids()
    repository.remove(image_id)
    with pytest.raises(ObjectMissing):
        find_base(overlay, repository)


def test_a_commit_while_the_machine_runs(overlay: Path, disk: Path, repo: Path) -> None:
    """QEMU locks the file."""
    socket = overlay.parent / "nbd"
    options = (
        f"driver=qcow2,file.driver=file,file.filename={str(overlay).replace(',', ',,')},"
        f"backing.driver=raw,backing.file.driver=file,backing.file.filename={disk}"
    )
    with beside(["qemu-nbd", "-t", "-k", str(socket), "--image-opts", options]):
        deadline = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "lock" in imager("commit", overlay, "--repo", repo, code=1).err


def test_several_disks_have_a_file_each(tmp_path: Path, image: Manifest) -> None:
    path = tmp_path / "run"
    assert overlay_file(path, image.disks[0], image) == path
    two = Manifest(image.id, image.block_size, image.disks * 2, image.document)
    assert overlay_file(path, image.disks[0], two) == tmp_path / f"run.{image.disks[0].name}"
