"""The places of an image by name: partitions, logical volumes, over one disk and several."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.capture import CaptureJob, SourceDisk, capture
from imager.diskidentity import DiskIdentity
from imager.errors import ObjectMissing, UsageError
from imager.imagevolumes import (
    ImageVolume,
    OpenDisk,
    find_volume,
    image_volumes,
    open_disks,
    parse_address,
)
from imager.layout import read_layouts
from imager.process import run
from imager.progress import NullProgress
from imager.repository import Repository
from tests.support.disks import make_gpt
from tests.unit.test_allocation_lvm2 import (
    KIB,
    MIB,
    START,
    linear,
    pv,
    striped,
    text_of,
    volume,
)


def taken(repo: Path, *paths: Path) -> tuple[Repository, list[str]]:
    """An image of disks named by their files."""
    repository = Repository.open(str(repo))
    with ExitStack() as stack:
        sources = [stack.enter_context(FileSource(path)) for path in paths]
        disks = tuple(
            SourceDisk(path.name, source, layout, DiskIdentity(size=source.size))
            for path, source, layout in zip(paths, sources, read_layouts(sources), strict=True)
        )
        manifest = capture(CaptureJob(disks=disks, name="web"), repository, NullProgress())
    return repository, [disk.name for disk in manifest.disks]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def volumes_of(repo: Path, opened: ExitStack) -> list[ImageVolume]:
    manifest = Repository.open(str(repo)).find("web@latest")
    disks = opened.enter_context(open_disks(lambda: Repository.open(str(repo)), manifest.disks))
    assert all(isinstance(disk, OpenDisk) for disk in disks)
    return image_volumes(disks)


def test_partitions(repo: Path, tmp_path: Path, opened: ExitStack) -> None:
    path = make_gpt(tmp_path / "sda")
    run(["mkfs.ext4", "-q", "-F", "-E", "offset=1048576,nodiscard", str(path), "16M"])
    taken(repo, path)
    found = volumes_of(repo, opened)
    assert [(v.name, v.file_name, v.number, v.filesystem.kind) for v in found] == [
        ("sda 1", "sda1", 1, "ext4"),
        ("sda 2", "sda2", 2, "unknown"),
    ]
    content = path.read_bytes()
    assert found[0].source.pread(1024, 1024) == content[MIB + 1024 : MIB + 2048]
    assert find_volume(found, "1/etc/fstab") == (found[0], "/etc/fstab")
    assert find_volume(found, "sda2/etc") == (found[1], "/etc")
    assert find_volume(found, "/etc") == (found[0], "/etc")
    assert find_volume(found, "1") == (found[0], "/")
    with pytest.raises(ObjectMissing, match="no 3") as missing:
        find_volume(found, "3/etc")
    assert missing.value.hint == "it has: sda1 (ext4), sda2 (unknown)"
    with pytest.raises(ObjectMissing, match="no vg"):
        find_volume(found, "vg/root/etc")


def test_logical_volumes_over_two_disks(repo: Path, tmp_path: Path, opened: ExitStack) -> None:
    """One in two pieces on one disk, one dealt out to both: the second is listed once."""
    chance = random.Random(4)
    text = text_of(
        volume("root", linear(0, 2, "pv0", 10), linear(2, 1, "pv0", 2)),
        volume("my-data", striped(4, 4, 0)),
    )
    content = chance.randbytes(4 * MIB)
    one, two = pv(text), pv(text, number=1)
    one[START + 10 * MIB : START + 12 * MIB] = b"a" * (2 * MIB)
    one[START + 2 * MIB : START + 3 * MIB] = b"b" * MIB
    unit = 4 * KIB
    for at in range(0, 4 * MIB, 2 * unit):
        row = at // 2
        first, second = START + 4 * MIB + row, START + row
        one[first : first + unit] = content[at : at + unit]
        two[second : second + unit] = content[at + unit : at + 2 * unit]
    for name, raw in (("sda", one), ("sdb", two)):
        (tmp_path / name).write_bytes(raw)
    taken(repo, tmp_path / "sda", tmp_path / "sdb")
    found = volumes_of(repo, opened)
    assert [(v.name, v.file_name, v.disk) for v in found] == [
        ("vg/root", "vg-root", None),
        ("vg/my-data", "vg-my--data", None),
    ]
    root, _ = find_volume(found, "vg/root/etc")
    assert root.source.pread(MIB, 2 * MIB) == b"a" * MIB + b"b" * MIB
    data, path = find_volume(found, "vg/my-data")
    assert path == "/"
    assert data.source.pread(12_345, 3 * MIB) == content[12_345 : 12_345 + 3 * MIB]
    with pytest.raises(ObjectMissing, match="no filesystem"):
        find_volume(found, "/etc")


def test_names_that_are_none() -> None:
    assert parse_address("web1@latest/sda:2/etc") == ("web1@latest/sda", "2/etc")
    for text in ("web1@latest", ":2/etc", ""):
        with pytest.raises(UsageError, match="name a place"):
            parse_address(text)
