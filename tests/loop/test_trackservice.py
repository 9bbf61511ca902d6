"""`imager track`: between images a service notes what is written; captures read only that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.blocktrace import TRACEFS
from imager.errors import ImagerError
from imager.extents import Extents
from imager.process import run
from imager.repository import Repository
from imager.trackrecord import TrackClient, TrackRecord, record_path, track_key
from imager.trackservice import _left, boot_id
from tests.loop.test_tracking import take
from tests.support.commandline import CHECKOUT, finish, imager, start
from tests.support.disks import (
    MIB,
    loop_disk,
    make_sparse,
    mounted,
    needs_loop,
)

pytestmark = needs_loop

PATIENCE = 120
BLOCK = 64 << 10  # of the fixture's repository; 16 of them are the sample


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A mounted disk and its folder, with 10 MiB that stay as they are."""
    monkeypatch.setenv("IMAGER_TRACK_DIR", str(tmp_path / "track"))
    image = make_sparse(tmp_path / "disk.img", 96 * MIB)
    # All of it now: the kernel would write inode tables later, whenever it likes.
    eager = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    run(["mkfs.ext4", "-q", "-F", "-E", eager, str(image)])
    with loop_disk(image) as device, mounted(device, tmp_path / "m") as folder:
        (folder / "still").write_bytes(os.urandom(10 * MIB))
        run(["sync", "-f", str(folder)])
        try:
            yield device, folder
        finally:
            if record_path(track_key(device)).exists():
                imager("track", "stop", device, code=1)


class Service:
    """The service of a disk in a process of its own; it can be asked when this is entered."""

    def __init__(self, device: str) -> None:
        self._device = device
        code = f"from imager.trackservice import serve; serve({device!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Service:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with TrackClient(self._device):
                    return self
            except ImagerError:
                assert self.process.poll() is None, self.process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE) in (0, -number)


def test_the_second_capture_reads_what_was_written(disk: tuple[str, Path], repo: Path) -> None:
    device, folder = disk
    with Service(device):
        first = take(device, repo)
        (folder / "new").write_bytes(os.urandom(6 * MIB))
        run(["sync", "-f", str(folder)])
        second = take(device, repo, check=repo.parent)
        assert first.document["tracked"]["since"] == [None]
        assert first.statistics["read_bytes"] > 10 * MIB
        tracked = second.document["tracked"]
        assert tracked["since"] == [first.id]
        assert tracked["sampled_blocks"] > 0
        assert 6 * MIB <= second.statistics["read_bytes"] < 1.2 * 6 * MIB + 16 * BLOCK
        third = take(device, repo, check=repo.parent)
        assert third.statistics["read_bytes"] < 2 * MIB + 16 * BLOCK
        imager("track", "stop", device)
    assert not list((TRACEFS / "instances").glob(f"imager-track-{track_key(device)}"))


def test_a_restart_goes_on(disk: tuple[str, Path], repo: Path) -> None:
    """What is written while no service runs is in the kernel's buffer."""
    device, folder = disk
    with Service(device) as service:
        first = take(device, repo)
        (folder / "one").write_bytes(os.urandom(MIB))
        run(["sync", "-f", str(folder)])
        service.end(signal.SIGTERM)
    (folder / "two").write_bytes(os.urandom(MIB))
    run(["sync", "-f", str(folder)])
    with Service(device):
        assert imager("track", "status", device, "--json").json["since"] == first.id
        second = take(device, repo, check=repo.parent)
        assert second.document["tracked"]["since"] == [first.id]
        imager("track", "stop", device)


def test_a_killed_service_knows_nothing(disk: tuple[str, Path], repo: Path) -> None:
    device, _ = disk
    with Service(device) as service:
        take(device, repo)
        service.end(signal.SIGKILL)
    with Service(device):
        found = imager("track", "status", device)
        assert "reads all of it" in found.out
        second = take(device, repo, check=repo.parent)
        assert second.document["tracked"]["since"] == [None]
        assert second.statistics["read_bytes"] > 10 * MIB
        imager("track", "stop", device)


@pytest.mark.parametrize("key", [None, "boot", "device", "size"])
def test_a_record_of_something_else_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    """And each is believed once only."""
    monkeypatch.setenv("IMAGER_TRACK_DIR", str(tmp_path))
    record = TrackRecord(boot_id(), "7-1-0-5", 5 * MIB, 3, None, Extents([(0, 4096)]))
    other = {} if key is None else {key: 5 if key == "size" else "another"}
    record_path("7-1-0-5").write_text(json.dumps({**record.to_json(), **other}))
    assert _left("7-1-0-5", 5 * MIB) == (record if key is None else None)
    assert _left("7-1-0-5", 5 * MIB) is None


def test_a_lie_is_found_and_turns_tracking_off(
    disk: tuple[str, Path], repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, folder = disk
    monkeypatch.setattr("imager.livecapture._SAMPLE", 10_000)  # so that it is sure to be found
    with Service(device) as service:
        take(device, repo)
        still = folder / "still"
        with still.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(os.urandom(4096))
        run(["sync", "-f", str(folder)])
        service.end(signal.SIGTERM)
    file = record_path(track_key(device))
    record = json.loads(file.read_bytes())
    assert record["written"]
    file.write_text(json.dumps({**record, "written": []}))
    with Service(device):
        second = take(device, repo, check=repo.parent)
        assert "unchanged" in second.document["tracked"]["lie"]
        found = imager("track", "status", device, code=1)
        assert "unchanged, and they are not" in found.out
        assert take(device, repo).document["tracked"]["since"] == [None]
        imager("track", "stop", device)


def test_a_capture_that_ends_early_changes_nothing(disk: tuple[str, Path], repo: Path) -> None:
    device, folder = disk
    with Service(device):
        first = take(device, repo)
        (folder / "new").write_bytes(os.urandom(MIB))
        run(["sync", "-f", str(folder)])
        with TrackClient(device) as client:
            base, written, _ = client.begin()
            assert base is not None and base.image == first.id
            assert written.extents.total >= MIB
        second = take(device, repo, check=repo.parent)
        assert second.document["tracked"]["since"] == [first.id]
        imager("track", "stop", device)


def test_an_image_that_has_gone_is_no_base(disk: tuple[str, Path], repo: Path) -> None:
    device, _ = disk
    with Service(device):
        first = take(device, repo)
        Repository.open(str(repo)).remove(first.id)
        assert take(device, repo).document["tracked"]["since"] == [None]
        imager("track", "stop", device)


def test_one_service_a_disk(disk: tuple[str, Path]) -> None:
    device, _ = disk
    with Service(device):
        outcome = finish(start("track", "start", "--foreground", device), seconds=PATIENCE)
        assert outcome.code == 4
        assert "is tracked already" in outcome.err
        imager("track", "stop", device)
    outcome = imager("track", "status", device, code=1)
    assert "is not tracked" in outcome.err


def test_the_unit(disk: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = disk
    monkeypatch.setenv("IMAGER_UNIT_DIR", str(tmp_path / "units"))
    found = imager("track", "start", device, "--json").json
    assert found["runs"] is False
    unit = tmp_path / "units" / found["unit"]
    run(["systemd-analyze", "verify", "--man=no", str(unit)])
    assert subprocess.run(["grep", "-c", device, unit], check=False).returncode == 0
    imager("track", "stop", device)
    assert not unit.exists()
