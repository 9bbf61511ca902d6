"""Filesystems of images proved without a boot: checked, all files read, missed blocks found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.capture import CaptureJob, SourceDisk, capture
from imager.diskidentity import DiskIdentity
from imager.extents import Extents
from imager.layout import DiskLayout, read_layout
from imager.loopdevice import loop_device
from imager.progress import NullProgress
from imager.proofs import latest_proof
from imager.provefiles import prove_filesystems
from imager.repository import Repository
from tests.support.commandline import imager
from tests.support.disks import MIB, make_filesystem, make_sparse, mounted, needs_loop

pytestmark = needs_loop

# What the one file is full of: found on the disk by it.
PATTERN = b"needle in a hay!"


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A filesystem on a whole disk, with a file of 4 MiB and a small one."""
    size = 320 if request.param == "xfs" else 64
    path = make_sparse(tmp_path / "disk.img", size * MIB)
    make_filesystem(path, request.param)
    with loop_device(str(path)) as device, mounted(device, tmp_path / "mounted") as root:
        (root / "large").write_bytes(PATTERN * (4 * MIB // len(PATTERN)))
        (root / "folder").mkdir()
        (root / "folder/small").write_text("small")
    return path


def make_image(repo: Path, disk: Path, *, missed: Extents | None = None) -> str:
    """An image; with ``missed``, of a map that calls these used bytes unused."""
    with FileSource(disk) as source:
        layout = read_layout(source)
        if missed is not None:
            layout = without(layout, missed)
        captured = SourceDisk("disk", source, layout, DiskIdentity())
        job = CaptureJob((captured,), "disk")
        return capture(job, Repository.open(str(repo)), NullProgress()).id


def without(layout: DiskLayout, missed: Extents) -> DiskLayout:
    (volume,) = layout.volumes
    allocation = replace(volume.allocation, used=volume.allocation.used.subtract(missed))
    return replace(layout, volumes=(replace(volume, allocation=allocation),))


def prove(repo: Path, image: str, *, coverage: bool) -> tuple[str, str]:
    repository = Repository.open(str(repo))
    manifest = repository.manifest(image)
    proof = prove_filesystems(repository, manifest, NullProgress(), coverage=coverage)
    return proof.verdict, proof.reason


def test_a_sound_image(repo: Path, disk: Path) -> None:
    image = make_image(repo, disk)
    for coverage in (False, True):
        verdict, words = prove(repo, image, coverage=coverage)
        assert verdict == "proved", words
        assert words.startswith("1 filesystem checked")
    repository = Repository.open(str(repo))
    for level in ("filesystems", "coverage"):
        assert latest_proof(repository, image, level) is not None
    assert latest_proof(repository, image) is None  # it was not booted


def test_a_missed_block(repo: Path, disk: Path) -> None:
    """Its content reads as zeros, which no checker sees: only the coverage does."""
    content = disk.read_bytes()
    start = content.index(PATTERN * 4096)
    missed = Extents([(-(-start // (64 << 10)) * (64 << 10) + (128 << 10), 64 << 10)])
    image = make_image(repo, disk, missed=missed)
    assert prove(repo, image, coverage=False)[0] == "proved"
    verdict, words = prove(repo, image, coverage=True)
    assert verdict == "failed"
    assert "/large" in words


def test_a_damaged_filesystem(repo: Path, disk: Path) -> None:
    """Zeros where the inode tables and the roots of trees are."""
    with disk.open("r+b") as file:
        file.seek(64 << 10)
        file.write(bytes(4 * MIB))
    image = make_image(repo, disk)
    shown = imager("prove", image, "--filesystems", "--repo", repo, "--json", code=1).json
    assert (shown["verdict"], shown["cause"], shown["level"]) == (
        "failed",
        "filesystem",
        "filesystems",
    )


def test_what_no_checker_knows_is_not_tried(repo: Path, tmp_path: Path) -> None:
    nothing = make_sparse(tmp_path / "empty.img", MIB)
    image = make_image(repo, nothing)
    assert "NOT TRIED" in imager("prove", image, "--filesystems", "--repo", repo, code=5).out
