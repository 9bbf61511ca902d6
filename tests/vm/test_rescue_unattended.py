"""A rescue medium that restores by itself: rules for the target, the report, repositories over
HTTP, and power that fails."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from imager.repository import Repository
from tests.machines.qemu import Bus, Disk, Machine, Network
from tests.support.disks import MIB, make_sparse
from tests.support.httpserver import range_server
from tests.vm.rescue import READY, READY_SECONDS, RESULT, build
from tests.vm.rescuedisks import (
    is_untouched,
    make_repository,
    restored_outside,
    same_bytes,
    seconds_of,
    slow_down,
)

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

HOST = "10.0.2.2"
RESTORE_SECONDS = 300


class Receiver(ThreadingHTTPServer):
    """Takes reports by POST."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.reports: SimpleQueue[Any] = SimpleQueue()

    def next(self) -> Any:
        try:
            return self.reports.get(timeout=30)
        except Empty:
            pytest.fail("no report came")


class _Post(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/json"
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.reports.put(json.loads(content))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("unattended"))


@pytest.fixture(scope="module")
def only(repository: Path, receiver: Receiver) -> Path:
    """Carries the image and restores it to the only disk that is large enough."""
    return build(
        repository.with_name("only.iso"),
        *("--repo", repository, "--image", "data@latest", "--unattended", "data@latest=only"),
        *("--then", "poweroff", "--countdown", "2"),
        *("--report-url", f"http://{HOST}:{receiver.server_port}/report"),
    )


def result_of(machine: Machine) -> tuple[int, str]:
    """The exit code and the whole line."""
    machine.expect(RESULT, timeout_seconds=READY_SECONDS + RESTORE_SECONDS)
    found = re.search(RESULT, machine.log)
    assert found
    return int(found[1]), found[0]


def test_only_disk(only: Path, repository: Path, receiver: Receiver, tmp_path: Path) -> None:
    small = make_sparse(tmp_path / "small.img", 64 * MIB)
    target = make_sparse(tmp_path / "target.img", 128 * MIB)
    disks = [Disk(small, "virtio", "small", keep=True), Disk(target, "virtio", "large", keep=True)]
    with (
        seconds_of("power-on to power-off"),
        Machine(cdrom=only, disks=disks, network=Network()) as machine,
    ):
        code, line = result_of(machine)
        assert code == 0, machine.log[-3000:]
        assert "target=/dev/vdb:serial=large reason=restored and read back" in line
        report = receiver.next()
        machine.wait_for_end(timeout_seconds=60)
    assert report["exit"] == 0
    assert report["image"] in line
    assert report["machine"]["macs"]
    assert same_bytes(target, restored_outside(repository, target))
    assert is_untouched(small)


def test_power_cut(only: Path, repository: Path, receiver: Receiver, tmp_path: Path) -> None:
    target = make_sparse(tmp_path / "target.img", 128 * MIB)
    disks = [Disk(target, "nvme", keep=True)]
    with seconds_of("power cut"), Machine(cdrom=only, disks=disks) as machine:
        machine.expect("This begins in", timeout_seconds=READY_SECONDS)
        slow_down(machine, "disc", "disk0")
        machine.expect(r"restoring \S+ +[2-8]\d%", timeout_seconds=RESTORE_SECONDS)
        machine.cut_power()
    outside = restored_outside(repository, target)
    assert not same_bytes(target, outside)
    with (
        seconds_of("again, to power-off"),
        Machine(cdrom=only, disks=disks, network=Network()) as machine,
    ):
        code, _ = result_of(machine)
        log = machine.wait_for_end(timeout_seconds=90)
    assert code == 0
    assert "it is gone on with" in log
    assert receiver.next()["exit"] == 0
    assert same_bytes(target, outside)


@pytest.mark.parametrize("other", ["virtio", "usb"])
def test_several_disks_fit(other: Bus, only: Path, receiver: Receiver, tmp_path: Path) -> None:
    """It is refused, and the menu follows for a person to choose. A USB disk comes a second later
    than the rest, and once was missed: the other disk was overwritten."""
    targets = [make_sparse(tmp_path / f"{n}.img", 128 * MIB) for n in range(2)]
    buses: tuple[Bus, Bus] = ("virtio", other)
    disks = [
        Disk(file, bus, file.stem, keep=True) for file, bus in zip(targets, buses, strict=True)
    ]
    with (
        seconds_of("ambiguous target"),
        Machine(cdrom=only, disks=disks, network=Network()) as machine,
    ):
        code, line = result_of(machine)
        machine.expect(READY, timeout_seconds=READY_SECONDS)
    assert code == receiver.next()["exit"] == 4
    assert "several disks are fit" in line
    assert all(map(is_untouched, targets))


@pytest.fixture(scope="module")
def served(repository: Path) -> Path:
    """The folder that the web server gives out; a copy, for it is to be tampered with."""
    return shutil.copytree(repository, repository.with_name("served"))


@pytest.fixture(scope="module")
def fetching(served: Path) -> Iterator[Path]:
    """Restores over HTTP to the disk with a certain serial number."""
    with range_server(served) as url:
        yield build(
            served.with_name("fetching.iso"),
            *("--repo", served, "--unattended", "data@latest=serial=right"),
            *("--countdown", "1", "--fetch", url.replace("127.0.0.1", HOST)),
        )


def test_fetched_to_serial(fetching: Path, repository: Path, tmp_path: Path) -> None:
    """It ends with a restart, which ends this machine."""
    wrong = make_sparse(tmp_path / "wrong.img", 128 * MIB)
    target = make_sparse(tmp_path / "target.img", 96 * MIB)
    disks = [Disk(wrong, "sata", "wrong", keep=True), Disk(target, "scsi", "right", keep=True)]
    with (
        seconds_of("over HTTP, to restart"),
        Machine(cdrom=fetching, disks=disks, network=Network()) as machine,
    ):
        code, line = result_of(machine)
        machine.wait_for_end(timeout_seconds=60)
    assert code == 0
    assert "serial=right" in line
    assert same_bytes(target, restored_outside(repository, target))
    assert is_untouched(wrong)


def test_changed_image(fetching: Path, served: Path, tmp_path: Path) -> None:
    """Somebody put another image into the place of the one that was named: all of it is
    consistent in itself, but it isn't what the medium pins. (The last test of this module: the
    repository stays changed.)"""
    older, newest = Repository.open(str(served)).image_ids()
    replace_image(served, newest, by=older)
    target = make_sparse(tmp_path / "target.img", 128 * MIB)
    with (
        seconds_of("changed image"),
        Machine(
            cdrom=fetching, disks=[Disk(target, "scsi", "right", keep=True)], network=Network()
        ) as machine,
    ):
        code, line = result_of(machine)
        machine.expect(READY, timeout_seconds=READY_SECONDS)
    assert code == 3
    assert "has changed since the medium was made" in line
    assert is_untouched(target)


def replace_image(folder: Path, image_id: str, *, by: str) -> None:
    repository = Repository.open(str(folder))
    document = repository.manifest(by).document | {"id": image_id}
    repository.remove(image_id)
    repository.commit(document)
