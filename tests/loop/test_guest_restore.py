"""Restores as the rescue system does them: partitioned disks, loop devices, nobody watching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bootmedia.guest import restoring, unattended
from bootmedia.guest.restoring import carry_out, describe, prepare
from bootmedia.guest.session import Found, Session
from bootmedia.guest.targets import Candidate
from bootmedia.job import Job, TargetRule, Unattended
from imager.compatibility import Comparison, Reason
from imager.diskidentity import disk_identity
from imager.errors import RefusedError
from imager.loopdevice import loop_device
from imager.manifest import Manifest
from imager.plan import RestoreOptions
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
    make_gpt,
    make_sparse,
    mounted,
    needs_loop,
    read_at,
)
from tests.support.watcher import Watcher

pytestmark = needs_loop

SIZE = 64 * MIB
ROOT = 40960 * 512


class Bench:
    """An image of a disk with a root filesystem, and loop devices as this machine's disks."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.source = make_gpt(folder / "source", SIZE)
        root_size = SIZE - ROOT - 2048 * 512
        with loop_device(str(self.source), ROOT, root_size) as device:
            make_filesystem(device, "ext4")
            with mounted(device, folder / "mnt") as root:
                (root / "etc").mkdir()
                (root / "etc/fstab").write_text("# nothing\n")
        self.root_size = root_size
        imager("capture", self.source, "--repo", folder / "repo", "--init", "--name", "web1")
        self.repository = Repository.open(str(folder / "repo"))
        self.manifest: Manifest = self.repository.manifest(self.repository.image_ids()[0])
        self.disks: list[str] = []
        self.announced: list[str] = []
        monkeypatch.setattr(unattended.system, "announce", self.announced.append)
        monkeypatch.setattr(unattended, "candidates", self.candidates)

    def add_disk(self, size: int = SIZE, **options: Any) -> str:
        path = make_file(self.folder / f"disk{len(self.disks)}", size)
        device = self.stack.enter_context(loop_disk(path, **options))
        self.disks.append(device)
        return device

    def candidates(self, session: Session) -> list[Candidate]:
        return [Candidate(path, disk_identity(path), session.reserved(path)) for path in self.disks]

    def session(self, unattended: Unattended | None = None) -> Session:
        job = Job(
            "0123456789abcdef",
            created=0,
            tool_version="1.0",
            kernel="6.1",
            least_memory=0,
            layers=(),
            repositories=(str(self.folder / "repo"),),
            unattended=unattended,
        )
        return self.stack.enter_context(Session(job))

    def find(self, session: Session) -> Found:
        return session.find(self.manifest.id)

    def run(self, watcher: Watcher, rule: str = "only", **settings: Any) -> int:
        rules = (TargetRule(self.manifest.disks[0].name, rule),)
        what = Unattended(self.manifest.id, rules, countdown=0, **settings)
        return unattended.run(self.session(what), [watcher])

    @property
    def line(self) -> str:
        return self.announced[-1]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, monkeypatch, stack)


def is_restored(bench: Bench, device: str) -> bool:
    with loop_device(device, ROOT, bench.root_size) as root:
        check_filesystem(root, "ext4")
    return read_at(device, 0, ROOT) == read_at(bench.source, 0, ROOT)


def test_the_only_disk_that_is_large_enough(bench: Bench) -> None:
    small, large = bench.add_disk(SIZE // 2), bench.add_disk()
    before, watcher = digest(small), Watcher()
    assert bench.run(watcher) == 0, bench.line
    assert is_restored(bench, large)
    assert digest(small) == before
    assert f"target={large} " in bench.line


def test_it_is_grown(bench: Bench) -> None:
    large, watcher = bench.add_disk(2 * SIZE), Watcher()
    assert bench.run(watcher, grow=True) == 0, bench.line
    assert "was grown to" in watcher.written
    with loop_device(large, ROOT, 2 * SIZE - ROOT - MIB) as root:
        check_filesystem(root, "ext4")


def test_ambiguous_until_the_rule_says_which(bench: Bench) -> None:
    first, second = bench.add_disk(), bench.add_disk()
    before = digest(first), digest(second)
    watcher = Watcher()
    assert bench.run(watcher) == 4
    assert (digest(first), digest(second)) == before
    for device in (first, second):
        assert f"{device} " in watcher.written
    assert bench.run(Watcher(), second) == 0, bench.line
    assert is_restored(bench, second)
    assert digest(first) == before[0]


def test_too_small(bench: Bench) -> None:
    bench.add_disk(SIZE // 2)
    watcher = Watcher()
    assert bench.run(watcher) == 4
    assert "too small: the image needs" in watcher.written


def test_other_sectors(bench: Bench) -> None:
    device = bench.add_disk(sector_size=4096)
    before = digest(device)
    assert bench.run(Watcher()) == 4
    assert "sectors of 4096 bytes" in bench.line
    assert digest(device) == before


def test_a_disk_that_is_mounted(bench: Bench, tmp_path: Path) -> None:
    device = bench.add_disk()
    make_filesystem(device, "ext4")
    with mounted(device, tmp_path / "in use"):
        assert bench.run(Watcher()) == 4
    assert "mounted at" in bench.line


def test_the_disk_that_holds_the_repository(bench: Bench, tmp_path: Path) -> None:
    bench.disks.append(bench.stack.enter_context(loop_disk(make_sparse(tmp_path / "b", SIZE))))
    (device,) = bench.disks
    make_filesystem(device, "ext4")
    folder = bench.stack.enter_context(mounted(device, tmp_path / "backup"))
    imager("capture", bench.source, "--repo", folder / "repo", "--init", "--name", "web2")
    session = bench.session()
    session.job = Job(**{**vars(session.job), "repositories": (str(folder / "repo"),)})
    found = session.find("web2@latest")
    assert session.reserved(device) == "holds a repository"
    with pytest.raises(RefusedError, match="holds a repository"):
        prepare(session, found, found.manifest.disks[0], device, RestoreOptions())


def test_it_says_what_it_would_do(bench: Bench) -> None:
    device = bench.add_disk()
    make_filesystem(device, "ext4")
    session = bench.session()
    disk = bench.manifest.disks[0]
    prepared = prepare(session, bench.find(session), disk, device, RestoreOptions())
    text = "\n".join(describe(prepared))
    print(text)
    for part in (bench.manifest.id, "web1", f"Target: {device} 64", "ext4", "In this machine: "):
        assert part in text
    assert "Refused:" not in text
    assert not prepared.refusals


def test_a_machine_that_it_will_not_boot_in(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = Reason("blocker", "firmware", "another one")
    monkeypatch.setattr(restoring, "compare", lambda *_: Comparison("will not boot", (blocker,)))
    device, session = bench.add_disk(), bench.session()
    before = digest(device)
    disk = bench.manifest.disks[0]
    prepared = prepare(session, bench.find(session), disk, device, RestoreOptions())
    assert "In this machine: will not boot." in describe(prepared)
    with pytest.raises(RefusedError, match="firmware: another one"):
        carry_out(session, prepared, NullProgress())
    assert digest(device) == before
    lines = carry_out(session, prepared, NullProgress(), despite_hardware=True)
    assert "is restored to" in lines[0]
    assert is_restored(bench, device)


def test_a_cut_restore_is_gone_on_with(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bootmedia.guest.console._REDRAW_SECONDS", 0)
    device = bench.add_disk()
    assert bench.run(Watcher(ctrl_c="restoring")) == 130
    watcher = Watcher()
    assert bench.run(watcher) == 0, bench.line
    assert "it is gone on with" in watcher.written
    assert is_restored(bench, device)
