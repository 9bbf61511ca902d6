"""imager rollback: back to an image of the same disk, whatever interrupts it."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from imager.marker import Marker
from imager.process import run
from tests.support.commandline import imager, run_until
from tests.support.disks import (
    KIB,
    MIB,
    digest,
    loop_disk,
    make_filesystem,
    make_gpt,
    make_random,
    make_sparse,
    mounted,
    needs_loop,
    read_at,
    write_at,
)
from tests.support.writelog import Write, read_log, recorded_file

pytestmark = needs_loop

SIZE = 40 * MIB
SECTOR = 512
CRASHES = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with a GPT, noise, and much that is zero."""
    disk = make_gpt(tmp_path_factory.mktemp("server") / "server.img", SIZE, fill=0)
    noise = random.Random(5)
    for place in range(8):
        write_at(disk, (3 + 4 * place) * MIB + 12 * KIB, noise.randbytes(MIB))
    return disk


def change(disk: Path) -> None:
    """What an upgrade does: the start, files, what was empty, and what then is."""
    noise = random.Random(6)
    write_at(disk, 0, noise.randbytes(440))
    write_at(disk, 34 * SECTOR, noise.randbytes(8 * KIB))
    for place in range(6):
        write_at(disk, (3 + 4 * place) * MIB + 300 * KIB, noise.randbytes(70 * KIB))
    write_at(disk, 5 * MIB, noise.randbytes(256 * KIB))
    write_at(disk, 27 * MIB, bytes(MIB))


def captured(disk: Path, repo: Path) -> str:
    taken = imager("capture", disk, "--all-blocks", "--repo", repo, "--json").json
    return str(taken["image"])


def test_it_writes_what_differs(tmp_path: Path, repo: Path, server: Path) -> None:
    disk = shutil.copy(server, tmp_path / "server.img")
    image = captured(disk, repo)
    change(disk)
    with loop_disk(disk) as device:
        (result,) = imager("rollback", image, device, "--yes", "--repo", repo, "--json").json
        assert 0 < result["written_bytes"] < 4 * MIB
        assert digest(device) == digest(server)
        (again,) = imager("rollback", image, device, "--yes", "--repo", repo, "--json").json
    assert again["written_bytes"] == 0
    assert digest(disk) == digest(server)


def test_killed_anywhere_and_run_again(tmp_path: Path, repo: Path, server: Path) -> None:
    disk = shutil.copy(server, tmp_path / "server.img")
    image, expected = captured(disk, repo), digest(server)
    changed = shutil.copy(disk, tmp_path / "changed.img")
    change(changed)
    words = ["rollback", image, disk, "--yes", "--repo", repo]
    shutil.copy(changed, disk)
    outcome, calls = run_until(0, *words)
    assert outcome.code == 0 and calls > 12
    marked = 0
    for point in sorted({*range(1, 3), *range(3, calls - 4, calls // 3), *range(calls - 3, calls)}):
        shutil.copy(changed, disk)
        outcome, _ = run_until(point, *words)
        assert outcome.code == -signal.SIGKILL
        content = read_at(disk, 0, SIZE)
        marker = Marker.decode(content)
        marked += marker is not None
        if marker is None:
            assert digest(disk) in (digest(changed), expected), "half done, and no marker says so"
        imager(*words)
        assert digest(disk) == expected
    assert marked > 3


def test_power_fails_anywhere(tmp_path: Path, repo: Path, server: Path) -> None:
    """Of what was not flushed any part is on the disk, sector by sector."""
    disk = shutil.copy(server, tmp_path / "server.img")
    image, expected = captured(disk, repo), digest(server)
    change(disk)
    changed = shutil.copy(disk, tmp_path / "changed.img")
    with recorded_file(disk, tmp_path / "log") as file:
        imager("rollback", image, file, "--yes", "--repo", repo)
    writes = read_log(tmp_path / "log")
    assert digest(disk) == expected
    assert sum(write.is_flush for write in writes) >= 3
    chance = random.Random(7)
    torn = tmp_path / "torn.img"
    seen = set()
    for number in range(CRASHES):
        ends = number if number < 6 else chance.randrange(len(writes) + 1)
        if number % 4 == 3:  # the last moments count most
            ends = len(writes) - chance.randrange(6)
        shutil.copy(changed, torn)
        tear(torn, writes[:ends], chance)
        now = digest(torn)
        marker = Marker.decode(read_at(torn, 0, 4096))
        seen.add("marker" if marker else "done" if now == expected else "untouched")
        if marker is None and now != expected:
            behind = read_at(torn, 64 * KIB, SIZE)
            assert behind == read_at(changed, 64 * KIB, SIZE), "half done, and no marker says so"
        imager("rollback", image, torn, "--yes", "--repo", repo)
        assert digest(torn) == expected
    assert seen == {"marker", "done", "untouched"}


def tear(image: Path, writes: list[Write], chance: random.Random) -> None:
    """What is on the disk when the power fails after these writes: all that was flushed, and of
    the later ones any sectors."""
    flushed = max((n for n, write in enumerate(writes) if write.is_flush), default=0)
    share = chance.choice((0.1, 0.5, 0.9))
    with image.open("r+b") as file:
        for number, write in enumerate(writes):
            for at in range(0, len(write.data), SECTOR):
                if number < flushed or chance.random() < share:
                    file.seek(write.offset + at)
                    file.write(write.data[at : at + SECTOR])


def test_a_disk_in_use(tmp_path: Path, repo: Path) -> None:
    disk = make_sparse(tmp_path / "server.img", SIZE)
    with loop_disk(disk) as device:
        make_filesystem(device, "ext4")
        image = captured(disk, repo)
        with mounted(device, tmp_path / "mnt"):
            outcome = imager("rollback", image, device, "--yes", "--repo", repo, code=4)
    assert "is mounted at" in outcome.err and "--at-boot" in outcome.err


def test_another_disk_is_refused(tmp_path: Path, repo: Path, server: Path) -> None:
    image = captured(server, repo)
    larger = make_sparse(tmp_path / "larger.img", SIZE + MIB)
    other = make_gpt(tmp_path / "other.img", SIZE)
    run(["sfdisk", "--disk-id", str(other), "0f0e0d0c-0000-4000-8000-000000000001"])
    foreign = make_random(tmp_path / "foreign.img", SIZE)
    write_at(foreign, 0, Marker("another", "sda", "00" * 32, 0).encode())
    for disk, reason in (
        (larger, "bytes, the disk that"),
        (other, "has the partition table"),
        (foreign, "an unfinished restore of another"),
    ):
        before = digest(disk)
        outcome = imager("rollback", image, disk, "--yes", "--repo", repo, code=4)
        assert reason in outcome.err and "restore IMAGE DISK --delta" in outcome.err
        assert digest(disk) == before
    outcome = imager("rollback", image, "--yes", "--repo", repo, code=4)
    assert "neither serial number nor WWN" in outcome.err
