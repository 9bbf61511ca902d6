"""What can be captured: block devices, partitions, files, several disks, sources in use."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from imager.extents import Extents
from imager.loopdevice import loop_device
from imager.process import run
from tests.support.commandline import imager, timed
from tests.support.disks import (
    KIB,
    MIB,
    TIB,
    digest,
    loop_disk,
    make_file,
    make_filesystem,
    make_gpt,
    make_random,
    make_sparse,
    mounted,
    needs_loop,
    partitions_of,
    read_at,
    write_at,
)
from tests.support.fusefile import faulty_file

pytestmark = needs_loop


def round_trip(source: str | Path, repo: Path, target: Path) -> dict[str, object]:
    taken: dict[str, object] = imager(
        "capture", source, "--name", "x", "--all-blocks", "--repo", repo, "--json"
    ).json
    imager("restore", taken["id"], target, "--yes", "--read-back", "--repo", repo)
    return taken


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_block_device(repo: Path, tmp_path: Path, sector: int) -> None:
    source = make_random(tmp_path / "a.img", 9 * MIB + 4096)
    with loop_device(str(source), sector_size=sector, read_only=True) as device:
        taken = round_trip(device, repo, tmp_path / "b.img")
    (disk,) = taken["disks"]  # type: ignore[misc]
    assert (disk["size"], disk["logical_sector"]) == (9 * MIB + 4096, sector)
    assert disk["name"] == Path(device).name
    assert digest(tmp_path / "b.img") == digest(source)


@pytest.mark.parametrize("size", [1, 511, 513, 4095, 64 * KIB - 1, 64 * KIB + 1, 5 * MIB + 12345])
def test_a_file_of_odd_size(repo: Path, tmp_path: Path, size: int) -> None:
    source = make_random(tmp_path / "a.img", size)
    round_trip(source, repo, tmp_path / "b.img")
    assert (tmp_path / "b.img").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("options", [[], ["--read-back"], ["--delta"], ["--delta", "--read-back"]])
@pytest.mark.parametrize("tail", ["data", "zeros"])
def test_a_file_of_odd_size_to_a_block_device(
    repo: Path, tmp_path: Path, options: list[str], tail: str
) -> None:
    source = make_random(tmp_path / "a.img", 2 * MIB + 100)
    if tail == "zeros":
        write_at(source, 2 * MIB - 64 * KIB, bytes(64 * KIB + 100))
    imager("capture", source, "--repo", repo)
    backing = make_file(tmp_path / "b.img", 3 * MIB, 0x5A)
    with loop_disk(backing) as device:
        imager("restore", "a@latest", device, "--yes", *options, "--repo", repo)
    assert read_at(backing, 0, 2 * MIB + 100) == source.read_bytes()
    assert read_at(backing, 2 * MIB + 100, MIB) == b"\x5a" * (MIB - 100)


def test_a_device_of_512_byte_sectors_and_odd_size(repo: Path, tmp_path: Path) -> None:
    source = make_random(tmp_path / "a.img", 1 * MIB + 3 * 512)
    with loop_device(str(source), read_only=True) as device:
        round_trip(device, repo, tmp_path / "b.img")
    assert digest(tmp_path / "b.img") == digest(source)


def test_a_partition_device(repo: Path, tmp_path: Path) -> None:
    source = make_gpt(tmp_path / "a.img")
    write_at(source, 2048 * 512, bytes(range(256)) * 1000)
    with loop_disk(source) as device, partitions_of(device) as parts:
        assert len(parts) == 2
        taken = round_trip(parts[0], repo, tmp_path / "b.img")
    assert taken["disks"][0]["size"] == 32768 * 512  # type: ignore[index]
    assert (tmp_path / "b.img").read_bytes() == read_at(source, 2048 * 512, 32768 * 512)


def test_a_whole_image_file_of_other_sectors(repo: Path, tmp_path: Path) -> None:
    """A file has no sectors of its own: the table of a 4096-byte disk needs the option."""
    source = make_file(tmp_path / "a.img", 64 * MIB)
    with loop_device(str(source), sector_size=4096) as device:
        run(["sfdisk", "--quiet", device], input_bytes=b"label: gpt\nstart=1M, size=8M\n")
    seen = imager("inspect", source, "--sector-size", 4096, "--json").json
    assert (seen["table"]["scheme"], len(seen["partitions"])) == ("gpt", 1)
    taken = imager("capture", source, "--sector-size", 4096, "--repo", repo, "--json").json
    assert taken["disks"][0]["logical_sector"] == 4096
    imager("restore", taken["id"], tmp_path / "b.img", "--yes", "--repo", repo)
    seen = imager("inspect", tmp_path / "b.img", "--sector-size", 4096, "--json").json
    assert (seen["table"]["scheme"], len(seen["partitions"])) == ("gpt", 1)


def test_a_sparse_terabyte_is_quick(repo: Path, tmp_path: Path) -> None:
    source = make_sparse(tmp_path / "a.img", TIB)
    for offset in (0, 123 * MIB, TIB // 2 + 7, TIB - 4):
        write_at(source, offset, b"data")
    with timed("capture, verify and restore of a sparse TiB"):
        taken = imager("capture", source, "--repo", repo, "--json").json
        imager("verify", "--repo", repo)
        imager("restore", taken["id"], tmp_path / "b.img", "--yes", "--repo", repo)
    assert taken["statistics"]["read_bytes"] < MIB
    assert (tmp_path / "b.img").stat().st_size == TIB
    assert (tmp_path / "b.img").stat().st_blocks * 512 < 2 * MIB
    for offset in (0, 123 * MIB, TIB // 2 + 7):
        assert read_at(tmp_path / "b.img", offset, 8) == b"data\0\0\0\0"
    assert read_at(tmp_path / "b.img", TIB - 8, 9) == b"\0\0\0\0data"


# --- several disks ---


def test_several_disks_in_one_image(repo: Path, tmp_path: Path) -> None:
    sources = [make_random(tmp_path / f"sd{n}.img", 2 * MIB + n * 512, seed=n) for n in (1, 2)]
    taken = imager("capture", *sources, "--name", "srv", "--repo", repo, "--json").json
    assert [disk["name"] for disk in taken["disks"]] == ["sd1", "sd2"]
    targets = [tmp_path / f"back{n}.img" for n in (1, 2)]
    results = imager("restore", "srv@latest", *targets, "--yes", "--repo", repo, "--json").json
    assert [item["target"] for item in results] == [str(path) for path in targets]
    assert [digest(path) for path in targets] == [digest(path) for path in sources]
    one = tmp_path / "one.img"
    imager("restore", "srv@latest/sd2", one, "--yes", "--repo", repo)
    assert digest(one) == digest(sources[1])
    crossed = [tmp_path / f"crossed{n}.img" for n in (1, 2)]
    words = [f"sd2={crossed[0]}", f"sd1={crossed[1]}"]
    imager("restore", "srv@latest", *words, "--yes", "--repo", repo)
    assert digest(crossed[0]) == digest(sources[1])
    assert digest(crossed[1]) == digest(sources[0])
    for words in ([one], [one, one], [f"sd1={one}", f"sd1={crossed[0]}"]):
        imager("restore", "srv@latest", *words, "--yes", "--repo", repo, code=2)
    assert "name one" in imager("map", "srv@latest", "--repo", repo, code=2).err
    assert digest(one) == digest(sources[1])


def test_two_files_of_one_name(repo: Path, tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / f"d{n}").mkdir()
    sources = [make_random(tmp_path / f"d{n}" / "disk.img", MIB, seed=n) for n in (1, 2)]
    taken = imager("capture", *sources, "--repo", repo, "--json").json
    assert [disk["name"] for disk in taken["disks"]] == ["disk", "disk-2"]
    imager("restore", f"{taken['id']}/disk-2", tmp_path / "b.img", "--yes", "--repo", repo)
    assert digest(tmp_path / "b.img") == digest(sources[1])


def test_one_target_under_two_names(repo: Path, tmp_path: Path) -> None:
    sources = [make_random(tmp_path / f"sd{n}.img", MIB, seed=n) for n in (1, 2)]
    imager("capture", *sources, "--name", "srv", "--repo", repo)
    target = make_file(tmp_path / "target.img", MIB)
    (tmp_path / "link.img").symlink_to(target)
    words = [target, tmp_path / "link.img"]
    imager("restore", "srv@latest", *words, "--yes", "--repo", repo, code=2)
    assert read_at(target, 0, 4) == b"\xa5" * 4


@pytest.mark.skipif(not shutil.which("mkfs.btrfs"), reason="mkfs.btrfs is not installed")
def test_a_mirror_of_which_one_disk_is_missing(repo: Path, tmp_path: Path) -> None:
    images = [make_file(tmp_path / f"m{n}.img", 128 * MIB) for n in (1, 2)]
    with ExitStack() as stack:
        devices = [stack.enter_context(loop_device(str(path))) for path in images]
        run(["mkfs.btrfs", "-q", "-f", "-K", "-d", "raid1", "-m", "raid1", *devices])
        whole = imager("capture", *devices, "--name", "m", "--repo", repo, "--json")
        assert whole.json["warnings"] == []
        half = imager("capture", devices[0], "--name", "m", "--repo", repo, "--json")
    (warning,) = half.json["warnings"]
    assert "2 devices" in warning and "only 1" in warning
    assert warning in half.err
    assert warning in imager("show", half.json["id"], "--repo", repo).out


# --- sources in use ---


def test_a_source_that_is_written_to(repo: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "a.img", 32 * MIB)
    with loop_device(str(source)) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "mnt") as mount:
            for path in (device, source):
                words = ["capture", path, "--consistency", "offline", "--repo", repo]
                outcome = imager(*words, code=4)
                assert f"mounted at {mount}" in outcome.err
                assert "--consistency none" in outcome.err
            assert imager("list", "--repo", repo, "--json").json == []
            for asked, found in (("none", "none"), ("freeze", "frozen"), ("track", "tracked")):
                words = ["--consistency", asked, "--repo", repo, "--json"]
                assert imager("capture", device, *words).json["consistency"] == found
            for path, found in ((device, "tracked"), (source, "frozen")):
                taken = imager("capture", path, "--repo", repo, "--json").json
                assert taken["consistency"] == found
                assert taken["freeze"]["filesystems"] == [str(mount)]
        with mounted(device, tmp_path / "mnt", "ro"):
            taken = imager("capture", device, "--repo", repo, "--json").json
            assert taken["consistency"] == "offline"


def test_a_mounted_partition_makes_its_disk_used(repo: Path, tmp_path: Path) -> None:
    source = make_gpt(tmp_path / "a.img")
    with loop_disk(source) as device, partitions_of(device) as parts:
        make_filesystem(parts[0], "ext4")
        with mounted(parts[0], tmp_path / "mnt"):
            words = ["--consistency", "offline", "--repo", repo]
            assert "p1 is mounted" in imager("capture", device, *words, code=4).err
            imager("capture", parts[1], "--repo", repo)


# --- bad sectors ---


@pytest.mark.parametrize("table", [False, True])
def test_a_file_with_bad_sectors(repo: Path, tmp_path: Path, table: bool) -> None:
    """Through the kernel: a FUSE file that answers EIO for some sectors."""
    path = tmp_path / "old.img"
    backing = make_gpt(path) if table else make_random(path, 4 * MIB)
    bad = [(2 * MIB + 512, 512), (3 * MIB - 1024, 3 * 512)]
    with faulty_file(backing, bad=bad) as source:
        taken = imager("capture", source, "--repo", repo, "--json", code=5).json
    assert taken["partial"] is True
    assert taken["disks"][0]["unreadable"] == [list(extent) for extent in bad]
    where = "partition 1" if table else "the unknown filesystem"
    target = make_file(tmp_path / "b.img", backing.stat().st_size, 0x5A)
    outcome = imager("restore", taken["id"], target, "--yes", "--repo", repo, code=5)
    missing = [line for line in outcome.out.splitlines() if "MISSING" in line]
    assert len(missing) == 2
    assert all(where in line for line in missing)
    (result,) = imager(
        "restore", taken["id"], target, "--yes", "--repo", repo, "--json", code=5
    ).json
    assert len(result["missing"]) == 2
    expected = bytearray(backing.read_bytes())
    for offset, length in bad:
        expected[offset : offset + length] = bytes(length)
    assert target.read_bytes() == bytes(expected)
    assert imager("verify", "--repo", repo, "--json").json["sound"] is True


def test_a_device_with_bad_sectors(repo: Path, tmp_path: Path) -> None:
    """A block device whose reads fail, past the page cache."""
    backing = make_random(tmp_path / "old.img", 4 * MIB)
    bad = [(1 * MIB + 512, 512), (3 * MIB - 1024, 3 * 512)]
    with faulty_file(backing, bad=bad) as file, loop_device(str(file), read_only=True) as device:
        words = ["capture", device, "--name", "old", "--repo", repo, "--json"]
        taken = imager(*words, code=5).json
    found = Extents(map(tuple, taken["disks"][0]["unreadable"]))
    assert found == Extents(bad)


def test_a_bad_partition_table_is_captured_whole(repo: Path, tmp_path: Path) -> None:
    """The first sector can't be read: the backup GPT, or all of the disk, is used instead."""
    backing = make_gpt(tmp_path / "old.img")
    with faulty_file(backing, bad=[(0, 1024)]) as source:
        taken = imager("capture", source, "--repo", repo, "--json", code=5).json
    assert taken["disks"][0]["unreadable"] == [[0, 1024]]
    imager("restore", taken["id"], tmp_path / "b.img", "--yes", "--repo", repo, code=5)
    assert read_at(tmp_path / "b.img", 1024, 64 * MIB) == read_at(backing, 1024, 64 * MIB)
