"""The coverage proof on real filesystems: good maps hold, and maps with a planned lie do not."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from imager import layout, process
from imager.allocation import AllocationMap, Filesystem, allocation_map, identify
from imager.blocksource import BlockSource, FileSource
from imager.coverage import Holding, files, prove_layouts
from imager.coverage import prove as prove_holding
from imager.coverage.view import open_view
from imager.extents import Extents
from imager.layout import DiskLayout, Proof
from imager.loopdevice import loop_device
from tests.loop import allocation_lab
from tests.loop.allocation_lab import (
    MIB,
    SHUTDOWN_LOGFLUSH,
    crash,
    fill,
    make_image,
    mounted,
    read_map,
)
from tests.support.commandline import CHECKOUT, imager
from tests.support.disks import digest, make_file, make_gpt, needs_loop, unmount, write_at
from tests.support.mdmembers import member as raid_member
from tests.support.sources import MemorySource

pytestmark = [
    *needs_loop,
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no FUSE here"),
]
memory_path = allocation_lab.memory_path  # the fixture

MKFS = {
    "ext4": ("mkfs.ext4 -q -F -E nodiscard", 64),
    "ext4-1k": ("mkfs.ext4 -q -F -b 1024 -E nodiscard", 64),
    "ext2": ("mkfs.ext2 -q -F -b 1024 -E nodiscard", 32),
    "xfs": ("mkfs.xfs -q -f -K", 320),
    "btrfs": ("mkfs.btrfs -q -f -K", 128),
}
JOURNALLED = ("ext4", "ext4-1k", "xfs", "btrfs")

# Found again in the image wherever it is stored.
MARK = b"\xf0 in a file \xf1 " + bytes(range(200, 256))
NAME = "a-name-that-stands-nowhere-else"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Views lie in a folder of the test's own: other tests have theirs at the same time."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    left = [line for line in _left_behind() if str(tmp_path) in line]
    assert not left, left


def _left_behind() -> list[str]:
    """Mounts and loop devices of views."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    loops = process.run(["losetup", "--list", "--noheadings"]).stdout.decode().splitlines()
    return [
        line for line in [*mounts, *loops] if "/imager-view-" in line or "/imager-files-" in line
    ]


def _clean_image(path: Path, kind: str) -> Path:
    line, size = MKFS[kind]
    image = make_image(path, line.split(), size * MIB)
    with mounted(image) as folder:
        _fill(folder)
    return image


def _dirty_image(path: Path, kind: str) -> Path:
    """One with a journal to replay: crashed after an fsync, or (btrfs can't) copied after it."""
    line, size = MKFS[kind]
    image = make_image(path, line.split(), size * MIB)
    with mounted(image) as folder:
        _fill(folder)
        os.sync()
        for number in range(40):
            with (folder / f"late-{number}").open("wb") as file:
                file.write(random.Random(number).randbytes(number * 2000))
                file.flush()
                os.fsync(file.fileno())
        if kind != "btrfs":
            crash(folder, SHUTDOWN_LOGFLUSH)
            return image
        dirty = path.with_suffix(".copy")
        process.run(["cp", "--sparse=always", str(image), str(dirty)])
        return dirty


def _fill(folder: Path) -> None:
    fill(folder, seed=3, files=60)
    (folder / NAME).write_bytes(MARK * 200)


def prove(source: BlockSource, filesystem: Filesystem, allocation: AllocationMap) -> Proof:
    return prove_holding(Holding(source, filesystem, allocation, source))


def _prove(image: Path, found: AllocationMap | None = None) -> Proof:
    """The proof of the right map or another; the image must not change by it."""
    before = digest(image)
    started = time.monotonic()
    with FileSource(image) as source:
        proof = prove(source, identify(source), found or allocation_map(source))
    print(f"{proof.verdict}: {proof.text}; {time.monotonic() - started:.2f} s")
    assert digest(image) == before
    return proof


def _known_map(image: Path, *certainties: str) -> AllocationMap:
    found = read_map(image)
    print(found.certainty, found.reason, f"{found.used.total >> 10} KiB")
    assert found.certainty in certainties, found.reason
    return found


def _blocks_with(image: Path, content: bytes, size: int = 4096) -> Extents:
    """Every block in which the content stands or begins."""
    places = [match.start() for match in re.finditer(re.escape(content), image.read_bytes())]
    assert places
    return Extents((place // size * size, size) for place in places)


def _without(found: AllocationMap, lie: Extents) -> AllocationMap:
    assert found.used.intersect(lie), "no lie: the map never had it"
    return AllocationMap(found.used.subtract(lie), found.certainty, found.reason)


@pytest.mark.parametrize("kind", MKFS)
def test_good_maps_of_clean_filesystems_hold(memory_path: Path, kind: str) -> None:
    image = _clean_image(memory_path / "image", kind)
    assert _prove(image, _known_map(image, "exact")).verdict == "proved"


@pytest.mark.parametrize("kind", JOURNALLED)
def test_good_maps_of_dirty_filesystems_hold(memory_path: Path, kind: str) -> None:
    image = _dirty_image(memory_path / "image", kind)
    assert _prove(image, _known_map(image, "union", "exact")).verdict == "proved"


@pytest.mark.parametrize("kind", ["ext4-1k", "xfs", "btrfs"])
@pytest.mark.parametrize("content", [MARK, NAME.encode()], ids=["data", "metadata"])
def test_a_lie_about_a_clean_filesystem_fails(memory_path: Path, kind: str, content: bytes) -> None:
    image = _clean_image(memory_path / "image", kind)
    lie = _blocks_with(image, content)
    proof = _prove(image, _without(_known_map(image, "exact"), lie))
    assert proof.verdict == "failed"
    assert NAME in proof.text or "checker" in proof.text or "mounted" in proof.text


@pytest.mark.parametrize("kind", ["ext4-1k", "xfs"])
def test_a_lie_about_a_journal_fails(memory_path: Path, kind: str) -> None:
    """A block that only the replay reads."""
    image = _dirty_image(memory_path / "image", kind)
    found = _known_map(image, "union")
    proof = _prove(image, _without(found, _blocks_with(image, b"late-39")))
    assert proof.verdict == "failed"


def test_a_lie_about_the_journal_alone_fails(memory_path: Path) -> None:
    """Of ext4 the log is known by its magic (ext4 never writes that elsewhere)."""
    image = _dirty_image(memory_path / "image", "ext4-1k")
    descriptors = _blocks_with(image, bytes.fromhex("c03b3998 00000001"), 1024)
    proof = _prove(image, _without(_known_map(image, "union"), descriptors))
    assert proof.verdict == "failed" and "cannot be mounted" in proof.text


def test_what_passes_without_a_block_does_not_need_it(memory_path: Path) -> None:
    """Lies of one block, all over: what is proved can be overwritten without a loss."""
    image = _clean_image(memory_path / "image", "ext4-1k")
    found = _known_map(image, "exact")
    used = [at for extent in found.used for at in range(extent.offset, extent.end, 1024)]
    chosen = random.Random(1).sample(used, 8)
    with FileSource(image) as source:
        filesystem = identify(source)
        passed = [
            block
            for block in chosen
            if prove(source, filesystem, _without(found, Extents([(block, 1024)]))).holds
        ]
    print(f"{len(passed)} of {len(chosen)} blocks are not needed")
    assert 0 < len(passed) < len(chosen)
    with mounted(image, "loop,ro") as folder:
        before = allocation_lab.manifest(folder)
    with image.open("r+b") as file:
        for block in passed:
            file.seek(block)
            file.write(b"\x5a" * 1024)
    process.run(["e2fsck", "-f", "-n", str(image)])
    with mounted(image, "loop,ro") as folder:
        assert allocation_lab.manifest(folder) == before


def test_damage_of_the_source_is_no_proof(memory_path: Path) -> None:
    """A checker that gives up early has not seen everything."""
    image = _clean_image(memory_path / "image", "ext4")
    found = _known_map(image, "exact")
    process.run(["debugfs", "-w", "-R", f"sif /{NAME} links_count 7", str(image)])
    proof = _prove(image, found)
    assert proof.verdict == "not proved" and "finds faults" in proof.text


@pytest.mark.skipif(process.find_tool("ntfs-3g") is None, reason="ntfs-3g is not installed")
def test_ntfs_is_read_by_its_own_driver(memory_path: Path) -> None:
    image = make_image(memory_path / "image", ["mkntfs", "-q", "-F", "-Q"], 32 * MIB)
    folder = memory_path / "folder"
    folder.mkdir()
    process.run(["ntfs-3g", str(image), str(folder)])
    try:
        (folder / NAME).write_bytes(MARK * 200)
    finally:
        unmount(folder)
    found = _known_map(image, "exact")
    assert _prove(image, found).verdict == "proved"
    proof = _prove(image, _without(found, _blocks_with(image, MARK)))
    assert proof.verdict == "failed" and NAME in proof.text


def test_what_the_kernel_cannot_mount_is_not_proved(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checker alone reads no files."""
    image = _clean_image(memory_path / "image", "ext4")
    driver = replace(files.DRIVERS["ext4"], mount=("mount", "-t", "unheard-of"))
    monkeypatch.setitem(files.DRIVERS, "ext4", driver)
    proof = _prove(image)
    assert proof.verdict == "not proved"
    assert "e2fsck -f -n finds no fault, but the files cannot be read: unknown" in proof.text


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every map misses the data of one file."""

    def lie(source: FileSource, *rest: object) -> AllocationMap:
        found = allocation_map(source, *rest)  # type: ignore[arg-type]
        if found.certainty == "all":
            return found
        at = source.pread(0, source.size).find(MARK) // 4096 * 4096
        return _without(found, Extents([(at, 4096)]))

    monkeypatch.setattr(layout, "allocation_map", lie)


def _disk(folder: Path) -> Path:
    """Two partitions; the second is an ext4."""
    image = _clean_image(folder / "image", "ext4")
    disk = make_gpt(folder / "disk.img", 96 * MIB)
    with disk.open("r+b") as file:
        file.seek(40960 * 512)
        file.write(image.read_bytes())
    process.run(["e2fsck", "-f", "-y", f"{disk}?offset={40960 * 512}"], accept=(0, 1))
    return disk


def test_a_capture_takes_all_where_the_proof_fails(memory_path: Path, lying: None) -> None:
    disk, repository = _disk(memory_path), memory_path / "repo"
    words = ("capture", disk, "--repo", repository, "--prove-map", "--json")
    captured = imager(*words, code=5)
    empty, root = captured.json["disks"][0]["partitions"]
    assert empty["proof"]["verdict"] == "nothing to prove"
    assert root["proof"]["verdict"] == "failed" and NAME in root["proof"]["text"]
    assert (root["certainty"], root["used_bytes"]) == ("all", root["size"])
    assert root["reason"] == "the map failed its proof"
    assert "partition 2: PROOF FAILED" in captured.err
    assert any("PROOF FAILED" in text for text in captured.json["warnings"])
    imager("restore", "disk@latest", memory_path / "copy.img", "--repo", repository, "--yes")
    assert digest(memory_path / "copy.img") == digest(disk)


def test_a_capture_with_a_proof(memory_path: Path) -> None:
    disk, repository = _disk(memory_path), memory_path / "repo"
    captured = imager("capture", disk, "--repo", repository, "--prove-map", "--json")
    root = captured.json["disks"][0]["partitions"][1]
    assert root["proof"]["verdict"] == "proved" and "e2fsck -f -n, and" in root["proof"]["text"]
    assert root["certainty"] == "exact" and captured.json["warnings"] == []
    assert "partition 2: map proved" in captured.err


def test_a_missing_checker_is_said(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, repository = _disk(memory_path), memory_path / "repo"
    monkeypatch.setattr("imager.checkers.find_tool", lambda _: None)
    captured = imager("capture", disk, "--repo", repository, "--prove-map", "--json", code=5)
    root = captured.json["disks"][0]["partitions"][1]
    assert root["proof"]["verdict"] == "not proved" and root["certainty"] == "exact"
    assert "NOT PROVED: e2fsck is missing: install e2fsprogs" in captured.err


def test_inspect_proves(memory_path: Path) -> None:
    shown = imager("inspect", _disk(memory_path), "--prove").out
    assert "partition 1: nothing to prove" in shown and "partition 2: map proved: e2fsck" in shown


def test_a_disk_with_large_sectors(memory_path: Path) -> None:
    line, size = MKFS["xfs"]
    image = make_image(memory_path / "image", ["true"], size * MIB)
    with loop_device(str(image), sector_size=4096) as device:
        process.run([*line.split(), device])
        assert "the disk: map proved" in imager("inspect", device, "--prove").out


def test_what_is_mounted_for_writing_is_refused(memory_path: Path) -> None:
    image = _clean_image(memory_path / "image", "ext4")
    with mounted(image):
        assert "is mounted at" in imager("inspect", image, "--prove", code=4).err


def test_a_source_mounted_read_only_is_proved(memory_path: Path) -> None:
    """Of one Btrfs the kernel never mounts two devices: then the files are not read."""
    for kind in ("xfs", "btrfs"):
        image = _clean_image(memory_path / kind, kind)
        with mounted(image, "loop,ro"):
            proof = _prove(image)
        assert proof.verdict == "proved" or (kind == "btrfs" and proof.verdict == "not proved")


def test_inspect_shows_what_a_capture_would_take(memory_path: Path, lying: None) -> None:
    shown = imager("inspect", _disk(memory_path), "--prove", code=5).out
    assert "partition 2: PROOF FAILED" in shown and "a capture reads 96.0 MiB" in shown


def test_the_view_ends_with_the_block(memory_path: Path) -> None:
    image = _clean_image(memory_path / "image", "ext4")
    with FileSource(image) as source:
        with pytest.raises(KeyboardInterrupt), open_view(source, Extents()) as view:
            assert view.path.stat().st_size == source.size
            raise KeyboardInterrupt
        with open_view(source, Extents()) as view, view.path.open("rb", buffering=0) as held:
            with contextlib.suppress(OSError):
                held.read(1)
            assert [miss.offset for miss in view.misses()] == [0]
            process.run(["umount", "--lazy", str(view.path.parent)])
    assert not view.path.parent.exists()


PROVER = """
import sys, time
from imager.blocksource import BlockSource, FileSource
from imager.coverage.view import open_view
from imager.extents import Extents
from imager.loopdevice import loop_device
import signal
signal.signal(signal.SIGTERM, signal.default_int_handler)
with FileSource(sys.argv[1]) as source, open_view(source, Extents.whole(source.size)) as view:
    print(view.path, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_view_outlives_its_program(memory_path: Path, number: signal.Signals) -> None:
    image = _clean_image(memory_path / "image", "ext4")
    prover = subprocess.Popen(
        [sys.executable, "-c", PROVER, str(image)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert prover.stdout is not None
    path = Path(prover.stdout.readline().strip())
    assert path.stat().st_size == image.stat().st_size
    prover.send_signal(number)
    prover.wait(20)
    prover.stdout.close()
    deadline = time.monotonic() + 10
    while _left_behind() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not path.exists()
    if number == signal.SIGKILL:  # nobody was left to do this
        path.parent.rmdir()
    assert not path.parent.exists()


# --- filesystems in logical volumes ---


def _lvm(folder: Path, command: str, *devices: str) -> list[str]:
    """Run an LVM command that sees these devices only, and needs no device mapper."""
    system = folder / "lvm"
    system.mkdir(exist_ok=True)
    accept = ", ".join(f'"a|^{device}$|"' for device in devices)
    config = f'devices {{ use_devicesfile=0 filter=[{accept}, "r|.*|"] }} backup {{ backup=0 }}'
    words = [*command.split(), "--driverloaded", "n", "--config", config]
    result = process.run(words, environment={"LVM_SYSTEM_DIR": str(system)})
    return result.stdout.decode().splitlines()


def _volume_group(folder: Path) -> list[Path]:
    """Two disks with a volume group: root lies on both, small on the second."""
    disks = [make_file(folder / name, 64 * MIB) for name in ("one", "two")]
    sizes = {"root": 80, "small": 20}
    with loop_device(str(disks[0])) as one, loop_device(str(disks[1])) as two:
        _lvm(folder, f"vgcreate -s 1M vg {one} {two}", one, two)
        for name, size in sizes.items():
            _lvm(folder, f"lvcreate -an -Zn -Wn -l {size} -n {name} vg", one, two)
        columns = "lv_name,seg_start_pe,seg_pe_ranges"
        rows = _lvm(folder, f"lvs --noheadings -o {columns} vg", one, two)
    images = {}
    for name, size in sizes.items():
        images[name] = make_image(folder / name, MKFS["ext4"][0].split(), size * MIB)
        with mounted(images[name]) as inside:
            _fill(inside)
    for name, start, device, first, last in (re.split(r"[\s:-]+", row.strip()) for row in rows):
        content = images[name].read_bytes()[int(start) * MIB :][
            : (int(last) - int(first) + 1) * MIB
        ]
        write_at(disks[0] if device == one else disks[1], (int(first) + 1) * MIB, content)
    return disks


@pytest.fixture
def volume_group(memory_path: Path) -> list[Path]:
    if process.find_tool("vgcreate") is None:
        pytest.skip("LVM is not installed")
    return _volume_group(memory_path)


def _prove_disks(disks: list[Path], lie: bytes = b"") -> list[Proof]:
    """The proofs of disks captured together, whose maps miss the blocks with some content."""
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(FileSource(disk)) for disk in disks]
        layouts = layout.read_layouts(sources)
        if lie:
            layouts = [
                _lying_layout(disk, found, lie) for disk, found in zip(disks, layouts, strict=True)
            ]
        proved = prove_layouts(list(zip(sources, layouts, strict=True)))
    proofs = [volume.proof for found in proved for volume in found.volumes if volume.proof]
    print(*proofs, sep="\n")
    return proofs


def _lying_layout(disk: Path, found: DiskLayout, content: bytes) -> DiskLayout:
    (volume,) = found.volumes
    wrong = AllocationMap(
        volume.allocation.used.subtract(_blocks_with(disk, content)), volume.allocation.certainty
    )
    return replace(found, volumes=(replace(volume, allocation=wrong),))


def test_a_volume_group_is_proved_by_what_it_holds(volume_group: list[Path]) -> None:
    one, two = _prove_disks(volume_group)
    assert (one.verdict, two.verdict) == ("proved", "proved")
    assert "vg/root: e2fsck" in one.text
    assert "vg/root: e2fsck" in two.text and "vg/small: e2fsck" in two.text
    (one,), (two,) = _prove_disks(volume_group[:1]), _prove_disks(volume_group[1:])
    assert one.verdict == "nothing to prove"  # all of it is part of what lies elsewhere too
    assert two.verdict == "proved" and "root" not in two.text and "vg/small" in two.text


def test_lies_of_the_volume_group_fail(volume_group: list[Path]) -> None:
    """The maps of the filesystems are right; the way back to the disks is not."""
    for content in (MARK, b"physical_volumes {"):
        proofs = _prove_disks(volume_group, content)
        assert [proof.verdict for proof in proofs] == ["failed", "failed"]
        assert all(NAME in proof.text or "lvm2 cannot be read" in proof.text for proof in proofs)


def test_a_mirror_is_proved_by_what_it_holds(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", MKFS["ext2"][0].split(), 2 * MIB)
    with mounted(image) as folder:
        (folder / NAME).write_bytes(MARK * 200)
    device = MemorySource(raid_member("1.2", content=image.read_bytes()))
    filesystem, found = identify(device), allocation_map(device)
    assert filesystem.kind == "md" and not found.used.covers(0, device.size), found.reason
    proof = prove(device, filesystem, found)
    assert proof.verdict == "proved" and "e2fsck" in proof.text
    at = device.content.find(MARK) // 1024 * 1024
    proof = prove(device, filesystem, _without(found, Extents([(at, 1024)])))
    assert proof.verdict == "failed" and NAME in proof.text
