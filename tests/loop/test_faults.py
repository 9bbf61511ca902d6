"""Power cuts, interrupts and full disks: earlier images stay whole, and a second run completes.

``IMAGER_FAULT_POINTS`` sets how often each kind of kill is tried; ``IMAGER_FAULT_SEED`` where.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from imager.marker import Marker
from tests.support.commandline import command, finish, imager, peak_memory, run_until, start, timed
from tests.support.disks import (
    GIB,
    KIB,
    MIB,
    TIB,
    digest,
    loop_disk,
    make_file,
    make_filesystem,
    make_random,
    make_sparse,
    mounted,
    needs_loop,
    read_at,
)
from tests.support.fusefile import faulty_file

pytestmark = needs_loop

POINTS = int(os.environ.get("IMAGER_FAULT_POINTS", "8"))
SEED = int(os.environ.get("IMAGER_FAULT_SEED", "1"))
SIZE = 80 * MIB  # more than a pack
DELAY = 0.01  # seconds a call, so that an interrupt comes in the middle


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What does not compress, large enough that there is a middle to be killed in."""
    return make_random(tmp_path_factory.mktemp("content") / "big.img", SIZE)


def verified(repo: Path) -> bool:
    return bool(imager("verify", "--repo", repo, "--json").json["sound"])


def left_over(repo: Path) -> set[str]:
    return {path.parts[-2] for path in repo.rglob("*") if path.is_file()} & {"sessions", "tmp"}


def points(calls: int) -> list[int]:
    """Which call to die at: spread over all of them, the first and the last few for certain."""
    chance = random.Random(SEED)
    ends = [1, calls - 5, calls - 2, calls]
    spread = [1 + int(calls * (n + chance.random()) / POINTS) for n in range(POINTS)]
    return sorted({*ends, *spread} & {*range(1, calls + 1)})


# --- kill -9 ---


def test_a_killed_capture(tmp_path: Path, repo: Path, content: Path) -> None:
    earlier = imager("capture", make_random(tmp_path / "a.img", MIB, 5), "--repo", repo, "--json")
    words = ["capture", content, "--init", "--repo"]
    outcome, calls = run_until(0, *words, tmp_path / "other")
    assert outcome.code == 0 and calls > 50
    images = 1
    for point in points(calls):
        outcome, _ = run_until(point, *words, repo)
        assert outcome.code in (0, -signal.SIGKILL)  # calls get fewer with what is stored already
        assert verified(repo)
        found = [item["id"] for item in imager("list", "--repo", repo, "--json").json]
        assert earlier.json["image"] in found
        assert len(found) - images in (0, 1)
        images = len(found)
    taken = imager("capture", content, "--repo", repo, "--json").json
    assert taken["statistics"]["known_blocks"] > 0, "what was stored before is not stored twice"
    assert verified(repo)
    imager("restore", taken["id"], tmp_path / "b.img", "--yes", "--repo", repo)
    assert digest(tmp_path / "b.img") == digest(content)


def test_a_capture_killed_in_a_new_repository(tmp_path: Path) -> None:
    source = make_random(tmp_path / "a.img", MIB, 5)
    words = ["capture", source, "--init", "--repo"]
    _, calls = run_until(0, *words, tmp_path / "other")
    for point in points(calls):
        repo = tmp_path / f"repo{point}"
        outcome, made = run_until(point, *words, repo)
        # Calls differ by the few of a folder that two packs share by the chance of their names.
        assert outcome.code == -signal.SIGKILL or (outcome.code == 0 and made < point)
        if (repo / "repository.json").exists():
            assert verified(repo)
        imager(*words, repo)
        assert verified(repo)
        assert imager("list", "--repo", repo, "--json").json


@pytest.mark.parametrize("kind", ["device", "file", "new"])
def test_a_killed_restore(tmp_path: Path, repo: Path, content: Path, kind: str) -> None:
    taken = imager("capture", content, "--repo", repo, "--json").json
    expected = digest(content)
    backing = make_file(tmp_path / "b.img", SIZE, 0x5A)
    resumed = 0
    with contextlib.ExitStack() as stack:
        is_device = kind == "device"
        target = stack.enter_context(loop_disk(backing)) if is_device else str(backing)
        words = ["restore", taken["id"], target, "--yes", "--repo", repo]
        prepare(target, kind)
        outcome, calls = run_until(0, *words)
        assert outcome.code == 0 and calls > 20
        for point in points(calls):
            prepare(target, kind)
            outcome, _ = run_until(point, *words)
            assert outcome.code == -signal.SIGKILL
            if Path(target).exists():
                check_half_restored(target, repo, taken["id"], expected)
            (result,) = imager(*words, "--json").json
            resumed += result["kept_bytes"] > 0
            assert digest(target) == expected
    assert verified(repo)
    assert resumed > POINTS // 4


def prepare(target: str, kind: str) -> None:
    """Back to a disk that has nothing of the image, or to no file at all."""
    if kind == "new":
        Path(target).unlink(missing_ok=True)
        return
    with Path(target).open("r+b") as file:
        for _ in range(SIZE // MIB):
            file.write(b"\x5a" * MIB)
        file.flush()
        os.fsync(file.fileno())


def check_half_restored(target: str, repo: Path, image: str, expected: str) -> None:
    """It carries the marker, or nothing was begun, or all is done."""
    marker = Marker.decode(read_at(target, 0, 4096))
    if marker is None:
        start = read_at(target, 0, SIZE)
        untouched = start in (b"\x5a" * SIZE, bytes(SIZE), b"")
        assert untouched or digest(target) == expected, "half restored, and no marker says so"
        return
    assert (marker.image, marker.disk) == (image, "big")
    (plan,) = imager("plan", image, target, "--repo", repo, "--json").json
    assert plan["resumes"] is True
    assert plan["overwrites"] == [f"an unfinished restore of {image}/big"]


# --- interrupts ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_capture(tmp_path: Path, repo: Path, number: int) -> None:
    content = make_random(tmp_path / "big.img", 2 * SIZE)
    with faulty_file(content, delay=DELAY) as source:
        process = start("capture", source, "--repo", repo, "--progress", "json")
        wait_for_bytes(process, SIZE)
        process.send_signal(number)
        outcome = finish(process)
    assert outcome.code == 130
    assert "interrupted" in outcome.err and "again" in outcome.err
    assert "Traceback" not in outcome.err
    assert imager("list", "--repo", repo, "--json").json == []
    assert left_over(repo) == set()
    taken = imager("capture", content, "--repo", repo, "--json").json
    assert taken["statistics"]["known_blocks"] > 0
    assert verified(repo)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_the_first_block(tmp_path: Path, repo: Path, number: int) -> None:
    with faulty_file(make_random(tmp_path / "big.img", MIB), delay=0.5) as source:
        process = start("capture", source, "--repo", repo)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(number)
        outcome = finish(process)
    assert outcome.code == 130
    assert "again" in outcome.err
    assert left_over(repo) == set()


def test_an_interrupted_restore(tmp_path: Path, repo: Path, content: Path) -> None:
    taken = imager("capture", content, "--repo", repo, "--json").json
    backing = make_file(tmp_path / "b.img", SIZE, 0x5A)
    with faulty_file(backing, delay=DELAY) as target:
        words = ["restore", taken["id"], target, "--yes", "--repo", repo]
        process = start(*words, "--progress", "json", "--json")
        wait_for_bytes(process, SIZE // 4)
        process.send_signal(signal.SIGINT)
        outcome = finish(process)
        assert outcome.code == 130
        assert outcome.json["error"]["exit_code"] == 130
    words[2] = backing
    (result,) = imager(*words, "--json").json
    assert result["kept_bytes"] >= SIZE // 4
    assert result["kept_bytes"] + result["written_bytes"] == SIZE
    assert digest(backing) == digest(content)


def wait_for_bytes(process: subprocess.Popen[str], count: int) -> None:
    """Until the JSON lines of progress say that so many bytes are done."""
    assert process.stderr is not None
    for line in process.stderr:
        if json.loads(line).get("done", 0) >= count:
            return
    raise AssertionError(f"it ended before it could be interrupted: {process.wait()}")


# --- full disks ---


def test_a_repository_that_runs_full(tmp_path: Path, content: Path) -> None:
    disk = make_file(tmp_path / "usb.img", 64 * MIB)
    with loop_disk(disk) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "mnt") as folder:
            repo = folder / "repo"
            first = make_random(tmp_path / "a.img", 2 * MIB, 5)
            taken = imager("capture", first, "--init", "--repo", repo, "--json").json
            outcome = imager("capture", content, "--repo", repo, code=1)
            assert "No space left on device" in outcome.err
            assert "hint: make room" in outcome.err
            assert [item["id"] for item in imager("list", "--repo", repo, "--json").json] == [
                taken["id"]
            ]
            assert left_over(repo) == set()
            assert verified(repo)
            imager("restore", taken["id"], tmp_path / "b.img", "--yes", "--repo", repo)
            # a small image still finds its place
            imager("capture", first, "--repo", repo)
    assert digest(tmp_path / "b.img") == digest(first)


def test_a_full_repository_that_got_room(tmp_path: Path) -> None:
    """The blocks that were stored before the disk was full are found by the next capture."""
    content = make_random(tmp_path / "big.img", 128 * MIB)
    disk = make_file(tmp_path / "usb.img", 180 * MIB)
    with loop_disk(disk) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "mnt") as folder:
            leave_room(folder, 100 * MIB)
            imager("capture", content, "--init", "--repo", folder / "repo", code=1)
            assert left_over(folder / "repo") == set()
            (folder / "ballast").unlink()
            taken = imager("capture", content, "--repo", folder / "repo", "--json").json
            assert taken["statistics"]["known_blocks"] > 0
            assert verified(folder / "repo")


def leave_room(folder: Path, size: int) -> None:
    """Fill a filesystem with ballast, but for so many bytes."""
    with (folder / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - size)
    os.sync()


def test_a_target_that_runs_full(tmp_path: Path, repo: Path, content: Path) -> None:
    taken = imager("capture", content, "--repo", repo, "--json").json
    disk = make_file(tmp_path / "usb.img", 112 * MIB)
    with loop_disk(disk) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "mnt") as folder:
            leave_room(folder, SIZE // 2)
            target = folder / "b.img"
            words = ["restore", taken["id"], target, "--yes", "--repo", repo]
            outcome = imager(*words, code=1)
            assert "No space left on device" in outcome.err
            assert f"cannot write {target} at byte" in outcome.err
            assert "hint: free some space" in outcome.err
            assert Marker.decode(read_at(target, 0, 4096)) is not None
            (folder / "ballast").unlink()
            (result,) = imager(*words, "--json").json
            assert result["kept_bytes"] > 0
            assert digest(target) == digest(content)


def test_a_target_that_may_not_be_so_large(tmp_path: Path, repo: Path) -> None:
    imager("capture", make_random(tmp_path / "a.img", 2 * MIB), "--repo", repo)
    target = tmp_path / "b.img"
    words = command("restore", "a@latest", target, "--yes", "--repo", repo)
    limited = ["prlimit", f"--fsize={MIB}", *words]
    result = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "cannot create" in result.stderr
    imager("restore", "a@latest", target, "--yes", "--repo", repo)


# --- memory ---

MOST_MEMORY = 150 * MIB


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 GiB of which 1 GiB is data that compresses to a half, spread out."""
    path = make_sparse(tmp_path_factory.mktemp("crowded") / "big.img", 4 * GIB)
    chance = random.Random(3)
    noise = chance.randbytes(8 * MIB)
    with path.open("r+b") as file:
        for n in range(1024):
            file.seek(4 * n * MIB)
            for _ in range(4):
                start = chance.randrange(7 * MIB)
                file.write(noise[start : start + 128 * KIB] + b"text" * (32 * KIB))
    return path


def test_memory_of_a_full_disk(tmp_path: Path, crowded: Path) -> None:
    assert_little_memory(tmp_path, crowded)


def test_memory_of_a_sparse_terabyte(tmp_path: Path) -> None:
    source = make_sparse(tmp_path / "big.img", TIB)
    chance = random.Random(4)
    with source.open("r+b") as file:
        for _ in range(500):
            file.seek(chance.randrange(TIB - 4096))
            file.write(chance.randbytes(100))
    assert_little_memory(tmp_path, source)


def assert_little_memory(tmp_path: Path, source: Path) -> None:
    repo, target = tmp_path / "repo", tmp_path / "b.img"
    for words in (
        ["capture", source, "--init"],
        ["capture", source],  # which finds all of it
        ["verify"],
        ["restore", "big@latest", target, "--yes"],
        ["diff", "big@latest", "big@latest"],
        ["map", "big@latest"],
    ):
        with timed(words[0]):
            outcome, peak = peak_memory(*words, "--repo", repo)
        print(f"{words[0]}: {peak / MIB:.0f} MiB")
        assert outcome.code == 0, outcome.err
        assert peak < MOST_MEMORY
    target.unlink()
