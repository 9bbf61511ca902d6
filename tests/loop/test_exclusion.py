"""Partitions that are left out of an image: neither read nor, at a restore, written."""

from __future__ import annotations

from pathlib import Path

import pytest

from imager.capture import CaptureJob, SourceDisk, capture
from imager.diskidentity import DiskIdentity
from imager.exclusion import leave_out_as
from imager.imagesource import ImageSource
from imager.layout import read_layout
from imager.loopdevice import loop_device
from imager.process import run
from imager.progress import NullProgress
from imager.repository import Repository
from tests.support.commandline import imager
from tests.support.disks import (
    MIB,
    check_filesystem,
    digest,
    loop_disk,
    make_file,
    make_filesystem,
    make_random,
    mounted,
    needs_loop,
    partitions_of,
    read_at,
)

pytestmark = needs_loop

SIZE = 64 * MIB
# The second begins and ends in the middle of blocks.
SYSTEM, DATA = (MIB, 24 * MIB), (30 * MIB + 4096, SIZE - 33 * 512 - 30 * MIB - 8192)
UUID = "11111111-2222-4333-8444-555555555555"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The system on the first partition, data on the second."""
    path = make_file(tmp_path / "disk", SIZE)
    script = "label: gpt\n" + "".join(
        f"start={offset // 512}, size={size // 512}, type=L, name={name}\n"
        for name, (offset, size) in {"system": SYSTEM, "data": DATA}.items()
    )
    run(["sfdisk", "--quiet", "--wipe=never", str(path)], input_bytes=script.encode())
    for offset, size in (SYSTEM, DATA):
        with loop_device(str(path), offset, size) as device:
            make_filesystem(device, "ext4")
            if (offset, size) == DATA:
                run(["tune2fs", "-U", UUID, device])
    fill(path, DATA, "mail", tmp_path)
    return path


def fill(disk: Path, part: tuple[int, int], name: str, folder: Path) -> None:
    with loop_device(str(disk), *part) as device, mounted(device, folder / "mnt") as root:
        make_random(root / name, 4 * MIB, len(name))


def part_digest(disk: Path, part: tuple[int, int], folder: Path) -> str:
    copy = folder / "part"
    copy.write_bytes(read_at(disk, *part))
    return digest(copy)


@pytest.mark.parametrize("option", [[], ["--all-blocks"]], ids=["used", "all blocks"])
def test_it_is_neither_read_nor_written(
    disk: Path, repo: Path, tmp_path: Path, option: list[str]
) -> None:
    words = ("capture", disk, "--repo", repo, "--name", "web1", *option)
    whole = imager(*words, "--json").json["statistics"]
    less = imager(*words, "--exclude-partition", "2", "--json").json
    assert whole["read_bytes"] - less["statistics"]["read_bytes"] >= 4 * MIB
    assert "asked for" in less["disks"][0]["partitions"][1]["excluded"]
    # a restore onto the same disk leaves what was changed there meanwhile
    system = part_digest(disk, SYSTEM, tmp_path)
    fill(disk, SYSTEM, "broken", tmp_path)
    fill(disk, DATA, "newer mail", tmp_path)
    data = part_digest(disk, DATA, tmp_path)
    for how in ("--delta", "--read-back"):
        done = imager("restore", "web1@latest", disk, "--yes", how, "--repo", repo)
        assert f"partition 2 (ext4, UUID {UUID}) is not in the image" in done.out
        assert part_digest(disk, DATA, tmp_path) == data
    if option:
        assert part_digest(disk, SYSTEM, tmp_path) == system
    with loop_device(str(disk), *DATA) as device:
        check_filesystem(device, "ext4")
    with loop_device(str(disk), *SYSTEM) as device:
        check_filesystem(device, "ext4")
    # nor is anything written to it on another disk
    other = make_file(tmp_path / "other", SIZE, 0x77)
    imager("restore", "web1@latest", other, "--yes", "--repo", repo)
    assert read_at(other, *DATA) == b"\x77" * DATA[1]
    with loop_device(str(other), *SYSTEM) as device:
        check_filesystem(device, "ext4")
    refused = imager(
        "restore", "web1@latest", tmp_path / "p", "--partition", 2, "--yes", "--repo", repo, code=4
    )
    assert "partition 2 is not in the image" in refused.err


def test_as_the_configuration_says(
    disk: Path, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "imager.toml"
    monkeypatch.setenv("IMAGER_CONFIG", str(config))

    def excluded(names: str) -> list[int]:
        config.write_text(
            '[[data]]\nname = "mail"\nengine = "command"\nbackup = ["true"]\n'
            f"exclude-partitions = [{names}]\n"
        )
        done = imager("capture", disk, "--repo", repo, "--data", "--json")
        parts = done.json["disks"][0]["partitions"]
        return [part["number"] for part in parts if "data backup mail" in part.get("excluded", "")]

    assert excluded(f'"UUID={UUID}"') == [2]
    assert excluded('"PARTLABEL=data"') == [2]
    assert excluded('"PARTLABEL=other", "/dev/loop999p2"') == []
    config.write_text(config.read_text().replace("PARTLABEL=other", "2"))
    assert "may be another disk's" in imager("capture", disk, "--data", "--repo", repo, code=2).err
    with loop_disk(disk) as device, partitions_of(device) as (_, data):
        config.write_text(config.read_text().replace('"2"', f'"{data}"'))
        parts = imager("capture", device, "--repo", repo, "--json").json["disks"][0]["partitions"]
        assert [part["number"] for part in parts if part.get("excluded")] == [2]


def test_names_that_are_refused(disk: Path, repo: Path, tmp_path: Path) -> None:
    words = ("capture", disk, "--repo", repo, "--exclude-partition")
    assert "no such partition" in imager(*words, "3", code=2).err
    assert "no such partition" in imager(*words, "sdb:2", code=2).err
    assert imager(*words, "disk:2", "--json").json["disks"][0]["partitions"][1]["excluded"]


def test_an_image_of_an_image_lacks_the_same(disk: Path, repo: Path) -> None:
    """As when a machine that ran on an image becomes a new one."""
    imager("capture", disk, "--repo", repo, "--exclude-partition", "2", "--name", "web1")
    repository = Repository.open(str(repo))
    base = repository.find("web1@latest")
    with ImageSource(Repository.open(str(repo)), base.disks[0]) as source:
        layout = read_layout(source)
        again = SourceDisk("disk", source, layout, DiskIdentity())
        (left_out,) = leave_out_as(base, [again])
        volume = left_out.layout.volumes[1]
        assert volume.filesystem.kind == "ext4" and volume.filesystem.uuid == UUID
        found = capture(CaptureJob((left_out,), "web1"), repository, NullProgress())
    assert found.disks[0].root == base.disks[0].root
    assert found.disks[0].excluded == base.disks[0].excluded
