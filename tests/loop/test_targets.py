"""What can be restored onto, what is refused, and what is done to the target besides."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imager.blocksource import FileSource
from imager.fingerprint import read_fingerprint
from imager.loopdevice import loop_device
from imager.partitions import PartitionTable, read_partition_table
from imager.plan import RestoreOptions, plan_restore
from imager.process import run
from imager.repository import Repository
from tests.support.commandline import imager
from tests.support.disks import (
    KIB,
    MIB,
    check_filesystem,
    digest,
    loop_disk,
    make_file,
    make_filesystem,
    make_gpt,
    make_random,
    mounted,
    needs_loop,
    partitions_of,
    read_at,
    write_at,
)
from tests.support.fusefile import faulty_file
from tests.support.trees import describe_tree, fill_tree

pytestmark = needs_loop

SIZE = 64 * MIB
ROOT_AT = 40960 * 512
ROOT_SIZE = SIZE - ROOT_AT - 2048 * 512


def table_of(path: str | Path) -> PartitionTable:
    with FileSource(path) as source:
        return read_partition_table(source)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, object]]:
    """A disk with an ext4 on its second partition, its repository, and the tree in it."""
    folder = tmp_path_factory.mktemp("server")
    source = make_gpt(folder / "sda.img", SIZE)
    behind = ROOT_AT + ROOT_SIZE
    write_at(source, behind, bytes(SIZE - behind - 33 * 512))  # or it fits no smaller disk
    with loop_device(str(source), ROOT_AT, ROOT_SIZE) as part:
        make_filesystem(part, "ext4")
        with mounted(part, folder / "mnt") as mount:
            fill_tree(mount, seed=20)
        with mounted(part, folder / "mnt", "ro") as mount:
            tree = describe_tree(mount)
    repo = folder / "repo"
    imager("capture", source, "--repo", repo)
    return source, repo, tree


def restore(repo: Path, target: object, *options: object, code: int = 0) -> Any:
    words = ["restore", "sda@latest", target, "--yes", "--repo", repo, "--json", *options]
    document = imager(*words, code=code).json
    return document if code == 4 else document[0]


def refusals(repo: Path, target: object, *options: object) -> list[str]:
    """The refusals of a plan, after a look that a restore is refused for the same reasons."""
    words = ["sda@latest", target, *options, "--repo", repo, "--json"]
    (plan,) = imager("plan", *words, code=4).json
    error = imager("restore", *words, "--yes", code=4).json["error"]
    assert all(reason in error["message"] for reason in plan["refusals"])
    found: list[str] = plan["refusals"]
    return found


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    before = digest(path)
    yield
    assert digest(path) == before, f"{path} was written to"


def assert_tree(
    path: Path, tree: dict[str, object], offset: int = ROOT_AT, size: int = ROOT_SIZE
) -> None:
    with loop_device(str(path), offset, size, read_only=True) as part:
        check_filesystem(part, "ext4")
        with mounted(part, path.parent / "mnt", "ro") as folder:
            assert describe_tree(folder) == tree


# --- sizes ---


@pytest.mark.parametrize("more", [0, 512, 40 * MIB, -MIB + 33 * 512])
@pytest.mark.parametrize("is_device", [False, True])
def test_targets_of_other_sizes(
    server: tuple[Path, Path, dict[str, object]], tmp_path: Path, more: int, is_device: bool
) -> None:
    """The table's end moves; ids and partitions stay."""
    source, repo, tree = server
    target = make_file(tmp_path / "b.img", SIZE + more, 0x5A)
    if is_device:
        with loop_disk(target) as device:
            restore(repo, device, "--read-back")
    else:
        restore(repo, target, "--read-back")
    old, new = table_of(source), table_of(target)
    assert (new.disk_id, new.partitions, new.notes) == (old.disk_id, old.partitions, ())
    run(["sfdisk", "--verify", str(target)])
    if shutil.which("sgdisk"):
        assert b"No problems found" in run(["sgdisk", "--verify", str(target)]).stdout
    assert_tree(target, tree)
    assert target.stat().st_size == SIZE + more


def test_every_reason_against_a_target_at_once(
    server: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    _, repo, _ = server
    target = make_file(tmp_path / "b.img", 48 * MIB, 0x5A)
    with loop_disk(target, sector_size=4096) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "mnt"):
            found = refusals(repo, device)
    assert any("is mounted at" in reason for reason in found)
    assert any("sectors of 4096 bytes" in reason for reason in found)
    assert any("need" in reason and str(48 * MIB) in reason for reason in found)
    with unchanged(target):
        refusals(repo, target)


def test_data_behind_the_partitions_is_not_cut_off(repo: Path, tmp_path: Path) -> None:
    imager("capture", make_gpt(tmp_path / "sda.img"), "--repo", repo)
    target = make_file(tmp_path / "b.img", SIZE - MIB + 33 * 512)
    with unchanged(target):
        (reason,) = refusals(repo, target)
    assert f"data outside of partitions at byte {SIZE - MIB + 33 * 512}" in reason


def test_grow(server: tuple[Path, Path, dict[str, object]], tmp_path: Path) -> None:
    source, repo, tree = server
    target = make_file(tmp_path / "b.img", 2 * SIZE, 0x5A)
    with loop_disk(target) as device:
        result = restore(repo, device, "--grow")
    old, new = table_of(source), table_of(target)
    assert (new.disk_id, new.partitions[0], new.notes) == (old.disk_id, old.partitions[0], ())
    last = new.partitions[1]
    assert last.uuid == old.partitions[1].uuid
    assert result["grown_to"] == last.size > SIZE + ROOT_SIZE - 2 * MIB
    with loop_device(str(target), last.offset, last.size) as part:
        check_filesystem(part, "ext4")
        with mounted(part, tmp_path / "mnt", "ro") as folder:
            assert shutil.disk_usage(folder).total > 90 * MIB
            assert _without_sizes(describe_tree(folder)) == _without_sizes(tree)


def _without_sizes(tree: dict[str, object]) -> dict[str, object]:
    """resize2fs changes nothing of files, but e2fsck may touch the root folder's lost+found."""
    return {name: entry for name, entry in tree.items() if name not in (".", "lost+found")}


def test_grow_without_room_or_with_what_cannot_grow(
    server: tuple[Path, Path, dict[str, object]], tmp_path: Path, repo: Path
) -> None:
    _, server_repo, tree = server
    target = tmp_path / "b.img"
    assert restore(server_repo, target, "--grow")["grown_to"] is None
    assert_tree(target, tree)
    imager("capture", make_gpt(tmp_path / "sda.img"), "--repo", repo)
    big = make_file(tmp_path / "big.img", 2 * SIZE)
    with unchanged(big):
        (reason,) = refusals(repo, big, "--grow")
    assert "unknown can't be grown" in reason


# --- partitions ---


def test_one_partition_into_a_partition(
    server: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    source, repo, tree = server
    target = make_gpt(tmp_path / "b.img", SIZE, fill=0x5A)
    with unchanged_outside(target, ROOT_AT, ROOT_SIZE):
        restore(repo, target, "--partition", 2, "--read-back")
    assert_tree(target, tree)
    with loop_disk(target) as device, unchanged_outside(target, 2048 * 512, 32768 * 512):
        restore(repo, device, "--partition", 1, "--to-partition", 1)
    assert read_at(target, MIB, 16 * MIB) == read_at(source, MIB, 16 * MIB)
    with unchanged(target):
        (reason,) = refusals(repo, target, "--partition", 2, "--to-partition", 1)
        assert "16777216 bytes" in reason
        (reason,) = refusals(repo, target, "--partition", 2, "--to-partition", 9)
        assert "no partition 9" in reason and "it has 1, 2" in reason
        imager("restore", "sda@latest", target, "--yes", "--partition", 9, "--repo", repo, code=2)
        imager("restore", "sda@latest", target, "--to-partition", 1, "--repo", repo, code=2)


def test_one_partition_into_a_larger_one_and_grow(
    server: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    _, repo, _ = server
    target = make_gpt(tmp_path / "b.img", 2 * SIZE, fill=0x5A)
    room = 2 * SIZE - ROOT_AT - 2048 * 512
    result = restore(repo, target, "--partition", 2, "--grow")
    assert result["grown_to"] == room
    with loop_device(str(target), ROOT_AT, room) as part:
        check_filesystem(part, "ext4")
        with mounted(part, tmp_path / "mnt", "ro") as folder:
            assert shutil.disk_usage(folder).total > 90 * MIB


def test_one_partition_into_a_file_and_a_device(
    server: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    _, repo, tree = server
    target = tmp_path / "root.img"
    restore(repo, target, "--partition", 2)
    assert target.stat().st_size == ROOT_SIZE
    assert_tree(target, tree, 0, ROOT_SIZE)
    backing = make_file(tmp_path / "c.img", ROOT_SIZE + MIB, 0x5A)
    with loop_disk(backing) as device:
        restore(repo, device, "--partition", 2, "--read-back")
    assert_tree(backing, tree, 0, ROOT_SIZE)
    assert read_at(backing, ROOT_SIZE, MIB) == b"\x5a" * MIB


def test_a_partition_beside_a_mounted_one(
    server: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    """The other partitions of a disk may be in use, the one that is overwritten may not."""
    _, repo, tree = server
    target = make_gpt(tmp_path / "b.img", SIZE, fill=0x5A)
    with loop_disk(target) as device, partitions_of(device) as parts:
        make_filesystem(parts[0], "ext4")
        with mounted(parts[0], tmp_path / "mnt1"):
            restore(repo, device, "--partition", 2)
            assert any("mounted" in text for text in refusals(repo, device, "--partition", 1))
            assert any("mounted" in text for text in refusals(repo, device))
    assert_tree(target, tree)


def test_a_table_that_the_kernel_has_not_read_yet(
    server: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    """Somebody made a new table while a partition was in use: the kernel kept the old one."""
    _, repo, tree = server
    target = make_gpt(tmp_path / "b.img", 2 * SIZE, fill=0x5A)
    start = ROOT_AT + 16 * MIB
    with loop_disk(target) as device, partitions_of(device):
        script = (
            f"label: gpt\nstart=2048, size=2048\nstart={start // 512}, size={ROOT_SIZE // 512}\n"
        )
        command = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe=never", device]
        run(command, input_bytes=script.encode())
        outcome = imager("plan", "sda@latest", device, "--partition", 2, "--repo", repo, code=4)
        assert "kernel" in outcome.out
    del tree


def test_a_logical_partition(repo: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "sda.img", SIZE)
    script = (
        "label: dos\nstart=2048, size=8192, type=83\nstart=16384, size=65536, type=5\n"
        "start=18432, size=8192, type=83\nstart=30720, size=8192, type=83\n"
    )
    run(["sfdisk", "--quiet", "--wipe=never", str(source)], input_bytes=script.encode())
    write_at(source, 30720 * 512, b"logical" * 1000)
    imager("capture", source, "--repo", repo)
    target = tmp_path / "b.img"
    restore(repo, target, "--partition", 6, "--read-back")
    assert target.read_bytes() == read_at(source, 30720 * 512, 8192 * 512)
    words = ["restore", "sda@latest", target, "--partition", 2, "--yes", "--repo", repo]
    assert "extended" in imager(*words, code=2).err


@contextmanager
def unchanged_outside(path: Path, offset: int, length: int) -> Iterator[None]:
    size = path.stat().st_size
    parts = [(0, offset), (offset + length, size - offset - length)]
    before = [read_at(path, *part) for part in parts]
    yield
    assert [read_at(path, *part) for part in parts] == before


# --- what the target had before ---


@pytest.mark.parametrize("is_device", [False, True])
def test_zero_blocks_are_zeroed(repo: Path, tmp_path: Path, is_device: bool) -> None:
    source = make_random(tmp_path / "sda.img", 8 * MIB)
    write_at(source, 3 * MIB, bytes(4 * MIB))
    write_at(source, 8 * MIB - 4096, bytes(4096))
    imager("capture", source, "--repo", repo)
    target = make_file(tmp_path / "b.img", 8 * MIB, 0x5A)
    if is_device:
        with loop_disk(target) as device:
            result = restore(repo, device)
    else:
        result = restore(repo, target)
    assert digest(target) == digest(source)
    assert result["zeroed_bytes"] == 4 * MIB


@pytest.mark.parametrize("is_device", [False, True])
def test_delta_writes_what_differs(repo: Path, tmp_path: Path, is_device: bool) -> None:
    source = make_random(tmp_path / "sda.img", 16 * MIB)
    imager("capture", source, "--repo", repo)
    target = tmp_path / "b.img"
    shutil.copy(source, target)
    for at in (0, 5 * MIB, 9 * MIB + 17):
        write_at(target, at, b"changed")
    with loop_disk(target) as device:
        where = device if is_device else target
        if not is_device:
            where = tmp_path / "c.img"
            shutil.copy(target, where)
        result = restore(repo, where, "--delta")
        assert result["written_bytes"] == 3 * 64 * KIB
        assert result["kept_bytes"] == 16 * MIB - 3 * 64 * KIB
        assert restore(repo, where, "--delta", "--read-back")["written_bytes"] == 0
        assert digest(where) == digest(source)


def test_a_stale_gpt_of_a_larger_disk_goes(repo: Path, tmp_path: Path) -> None:
    """A disk with an MBR over one that had a GPT: tools would find the old backup."""
    source = make_file(tmp_path / "sda.img", SIZE)
    script = b"label: dos\nlabel-id: 0x12345678\nstart=2048, size=65536, type=83\n"
    run(["sfdisk", "--quiet", "--wipe=never", str(source)], input_bytes=script)
    imager("capture", source, "--all-blocks", "--repo", repo)
    target = make_gpt(tmp_path / "b.img", 2 * SIZE, fill=0x5A)
    restore(repo, target)
    assert read_at(target, 0, SIZE) == source.read_bytes()
    assert (table_of(target).scheme, table_of(target).disk_id) == ("mbr", "0x12345678")
    assert b"EFI PART" not in read_at(target, 2 * SIZE - MIB, MIB)


def test_one_refused_disk_of_several_stops_all(repo: Path, tmp_path: Path) -> None:
    sources = [make_random(tmp_path / f"sd{n}.img", 2 * MIB, seed=n) for n in (1, 2)]
    imager("capture", *sources, "--name", "srv", "--repo", repo)
    good, small = make_file(tmp_path / "good", 2 * MIB), make_file(tmp_path / "small", MIB)
    with unchanged(good), unchanged(small):
        imager("restore", "srv@latest", good, small, "--yes", "--repo", repo, code=4)


# --- new ids ---


@pytest.mark.parametrize("scheme", ["gpt", "dos"])
def test_new_ids(repo: Path, tmp_path: Path, scheme: str) -> None:
    if scheme == "gpt":
        source = make_gpt(tmp_path / "sda.img")
    else:
        source = make_file(tmp_path / "sda.img", SIZE)
        script = b"label: dos\nlabel-id: 0x12345678\nstart=2048, size=65536, type=83\n"
        run(["sfdisk", "--quiet", "--wipe=never", str(source)], input_bytes=script)
    imager("capture", source, "--repo", repo)
    target = tmp_path / "b.img"
    result = restore(repo, target, "--new-ids", "--read-back")
    old, new = table_of(source), table_of(target)
    assert old.disk_id is not None and new.disk_id is not None
    pairs = [(old.disk_id, new.disk_id)]
    pairs += [
        (str(a.uuid), str(b.uuid)) for a, b in zip(old.partitions, new.partitions, strict=True)
    ]
    assert all(before != after for before, after in pairs)
    assert result["new_ids"] == dict(pairs)
    assert [(p.offset, p.size) for p in new.partitions] == [
        (p.offset, p.size) for p in old.partitions
    ]


# --- a target that lies ---


def test_read_back_finds_a_disk_that_lies(repo: Path, tmp_path: Path) -> None:
    source = make_random(tmp_path / "sda.img", 4 * MIB)
    write_at(source, 3 * MIB, bytes(MIB))
    imager("capture", source, "--repo", repo)
    backing = make_file(tmp_path / "b.img", 4 * MIB, 0x5A)
    with faulty_file(backing, flipped=[MIB + 5, 3 * MIB + 70_000]) as target:
        restore(repo, target)  # nobody looked
        words = ["restore", "sda@latest", target, "--yes", "--read-back", "--repo", repo]
        outcome = imager(*words, code=3)
    assert f"byte {MIB}, the unknown filesystem" in outcome.err
    assert f"byte {3 * MIB}, the unknown filesystem" in outcome.err
    assert "do not use this disk" in outcome.err
    assert digest(backing) == digest(source), "what was written was right"


# --- targets in use ---


def test_a_mounted_target(server: tuple[Path, Path, dict[str, object]], tmp_path: Path) -> None:
    _, repo, _ = server
    target = make_file(tmp_path / "b.img", SIZE, 0x5A)
    with loop_disk(target) as device:
        make_filesystem(device, "ext4")
        for options in ("rw", "ro"):
            with mounted(device, tmp_path / "mnt", options), unchanged(target):
                for path in (device, target):
                    (reason,) = refusals(repo, path)
                    assert f"mounted at {tmp_path / 'mnt'}" in reason


def test_a_swap_area_in_use(server: tuple[Path, Path, dict[str, object]], tmp_path: Path) -> None:
    _, repo, _ = server
    target = make_file(tmp_path / "b.img", SIZE)
    with loop_disk(target) as device:
        run(["mkswap", "-q", device])
        run(["swapon", device])
        try:
            (reason,) = refusals(repo, device)
        finally:
            run(["swapoff", device])
    assert "in use as swap" in reason


def test_the_disk_that_holds_the_repository(tmp_path: Path) -> None:
    disk = make_file(tmp_path / "usb.img", SIZE)
    source = make_random(tmp_path / "sda.img", MIB)
    with loop_disk(disk) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "mnt") as folder:
            repo = folder / "repo"
            outcome = imager("capture", source, "--init", "--repo", repo)
            assert "warning" not in outcome.err
            assert any("holds the repository" in text for text in refusals(repo, device))
            outcome = imager(
                "capture", device, "--name", "usb", "--consistency", "none", "--repo", repo
            )
            assert f"the repository lies on {device}" in outcome.err


def test_a_file_of_the_repository(repo: Path, tmp_path: Path) -> None:
    imager("capture", make_file(tmp_path / "sda.img", 100), "--repo", repo)
    imager("capture", make_random(tmp_path / "big.img", MIB), "--repo", repo)
    pack = max(repo.glob("packs/*/*.pack"), key=lambda path: path.stat().st_size)
    with unchanged(pack):
        imager("restore", "sda@latest", pack, "--yes", "--repo", repo, code=4)


def test_the_file_behind_the_repository(tmp_path: Path) -> None:
    """The repository lies on a loop device: its backing file is no target either."""
    disk = make_file(tmp_path / "usb.img", SIZE)
    source = make_random(tmp_path / "sda.img", MIB)
    with loop_disk(disk) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "mnt") as folder:
            imager("capture", source, "--init", "--repo", folder / "repo")
            assert refusals(folder / "repo", disk)


def test_a_read_only_target(server: tuple[Path, Path, dict[str, object]], tmp_path: Path) -> None:
    _, repo, _ = server
    target = make_file(tmp_path / "b.img", SIZE)
    with loop_device(str(target), read_only=True) as device, unchanged(target):
        words = ["restore", "sda@latest", device, "--yes", "--repo", repo]
        assert imager(*words, code=1).err.startswith("imager: cannot")


def test_nothing_is_written_without_a_yes(
    server: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    _, repo, _ = server
    target = make_file(tmp_path / "b.img", SIZE, 0x5A)
    with loop_disk(target) as device, unchanged(target):
        imager("restore", "sda@latest", device, "--repo", repo, code=4)
        imager("plan", "sda@latest", device, "--repo", repo)
    new = tmp_path / "new.img"
    imager("restore", "sda@latest", new, "--repo", repo, code=4)
    imager("plan", "sda@latest", new, "--repo", repo)
    assert not new.exists()


def test_another_machine_is_said(repo: Path, tmp_path: Path) -> None:
    """An image of a UEFI machine on a disk of a BIOS one, and the other way round."""
    source = make_gpt(tmp_path / "sda.img", SIZE)
    imager("capture", source, "--repo", repo)
    repository = Repository.open(str(repo))
    manifest = repository.find("sda@latest")
    here = read_fingerprint()
    other = {"firmware": "bios" if here.firmware == "uefi" else "uefi", "architecture": "m68k"}
    manifest.document["hardware"].update(other)
    with loop_disk(make_file(tmp_path / "b.img", SIZE)) as device:
        plan = plan_restore(repository, manifest, manifest.disks[0], device, RestoreOptions())
    assert not plan.refusals
    assert ["architecture" in plan.warnings[0], "firmware" in plan.warnings[1]] == [True, True]
