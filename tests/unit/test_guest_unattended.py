"""A restore that nobody watches: its codes, its line, its report; real restores, to files."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from bootmedia.guest import report, restoring, unattended
from bootmedia.guest.report import Result, post
from bootmedia.guest.session import Session
from bootmedia.guest.targets import Candidate
from bootmedia.job import Job, PinnedDisk, PinnedImage, TargetRule, Unattended
from imager.capture import CaptureJob, capture
from imager.compatibility import Comparison, Reason
from imager.diskidentity import DiskIdentity
from imager.errors import ImagerError
from imager.progress import NullProgress
from imager.repository import Repository
from tests.support.disks import make_file
from tests.support.sources import MemorySource, memory_disk
from tests.support.watcher import Watcher

MIB = 1 << 20
SIZE = 4 * MIB
CONTENT = random.Random(5).randbytes(SIZE)
BEFORE = b"\xa5"


class Bench:
    """A machine with one disk (a file), and an image that is to go there."""

    def __init__(self, folder: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repo = repo
        repository = Repository.open(str(repo))
        job = CaptureJob(disks=(memory_disk(MemorySource(CONTENT)),), name="web1")
        self.manifest = capture(job, repository, NullProgress())
        self.name = self.manifest.disks[0].name
        self.target = make_file(folder / "target", SIZE)
        self.disks = [self.candidate(self.target, serial="QM 1")]
        self.announced: list[str] = []
        self.pinned: tuple[PinnedImage, ...] = ()
        self.repositories: tuple[str, ...] = (str(repo),)
        monkeypatch.setattr(unattended.system, "announce", self.announced.append)
        monkeypatch.setattr(unattended, "candidates", lambda session: self.disks)
        monkeypatch.setattr(unattended, "_WAIT_SECONDS", 0)
        monkeypatch.setattr(report, "_PAUSE_SECONDS", 0)

    def candidate(self, path: Path, **known: Any) -> Candidate:
        return Candidate(str(path), DiskIdentity(str(path), size=path.stat().st_size, **known))

    def run(self, *terminals: Watcher, image: str | None = None, **settings: Any) -> int:
        with self.opened(image, **settings) as session:
            return unattended.run(session, terminals)

    def ending(self, *terminals: Watcher, **settings: Any) -> str | None:
        with self.opened(None, **settings) as session:
            return unattended.ending(session, terminals)

    @contextmanager
    def opened(self, image: str | None, **settings: Any) -> Iterator[Session]:
        rules = settings.pop("targets", (TargetRule(self.name, "only"),))
        wanted = {"countdown": 0, **settings}
        what = Unattended(image or self.manifest.id, rules, **wanted)
        job = Job("0123456789abcdef", 0, "1.0", "6.1", 0, (), unattended=what, images=self.pinned)
        with Session(Job(**{**vars(job), "repositories": self.repositories})) as self.session:
            yield self.session

    @property
    def line(self) -> str:
        (line,) = self.announced
        return line

    @property
    def is_untouched(self) -> bool:
        return self.target.read_bytes() == BEFORE * SIZE


class LastSecond(Watcher):
    """Something happens when the countdown is nearly over."""

    def __init__(self, happens: Callable[[], object]) -> None:
        super().__init__()
        self._happens = happens

    def write(self, text: str) -> None:
        super().write(text)
        if "begins in 1 s" in text:
            self._happens()


@pytest.fixture
def bench(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, repo, monkeypatch)


def test_done(bench: Bench) -> None:
    watcher = Watcher()
    assert bench.run(watcher) == 0
    assert bench.target.read_bytes() == CONTENT
    assert bench.line == (
        f"imager-rescue: result exit=0 image={bench.manifest.id} target={bench.target} "
        "reason=restored and read back"
    )
    assert "it was read back and is what the image says" in watcher.written
    assert "In this machine:" in watcher.written


def test_by_name_and_without_any_terminal(bench: Bench) -> None:
    assert bench.run(image="web1@latest") == 0
    assert f"image={bench.manifest.id} " in bench.line


def test_a_key_during_the_countdown(bench: Bench) -> None:
    bystander, watcher = Watcher(), Watcher("This begins in 2 s")
    assert bench.run(bystander, watcher, countdown=3) == 130
    assert bench.is_untouched
    assert "exit=130" in bench.line
    assert "begins in 3 s" in bystander.written
    assert "begins in 1 s" not in bystander.written


def test_a_terminal_that_breaks_off_stops_nothing(bench: Bench) -> None:
    assert bench.run(Watcher("restoring", is_lost=True), countdown=1) == 0
    assert bench.target.read_bytes() == CONTENT


def test_ctrl_c_while_it_is_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bootmedia.guest.console._REDRAW_SECONDS", 0)
    assert bench.run(Watcher(ctrl_c="restoring")) == 130
    assert "stopped by Ctrl-C: the target is not complete" in bench.line
    assert bench.run() == 0
    assert bench.target.read_bytes() == CONTENT


def test_a_disk_that_comes_during_the_countdown(bench: Bench, tmp_path: Path) -> None:
    """Two fit then, and the rule has to choose again."""
    late = bench.candidate(make_file(tmp_path / "late", 2 * SIZE))
    assert bench.run(LastSecond(lambda: bench.disks.append(late)), countdown=2) == 4
    assert bench.is_untouched
    assert "several disks are fit" in bench.line


def test_another_disk_in_the_place_of_the_one_that_was_shown(bench: Bench, tmp_path: Path) -> None:
    other = bench.candidate(make_file(tmp_path / "other", 2 * SIZE))
    assert bench.run(LastSecond(lambda: bench.disks.__setitem__(0, other)), countdown=2) == 4
    assert bench.is_untouched
    assert "changed during the countdown" in bench.line


def test_two_disks_that_fit(bench: Bench, tmp_path: Path) -> None:
    bench.disks.append(bench.candidate(make_file(tmp_path / "other", 2 * SIZE)))
    watcher = Watcher()
    assert bench.run(watcher, report_url=None) == 4
    assert bench.is_untouched
    assert "several disks are fit" in bench.line
    assert "target=none" in bench.line
    assert "the menu follows" in watcher.written


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ((), "no rule for a target"),
        ((TargetRule("sdq", "only"),), "no disk sdq"),
    ],
)
def test_rules_that_do_not_fit_the_image(
    bench: Bench, targets: tuple[TargetRule, ...], reason: str
) -> None:
    assert bench.run(targets=targets) == 4
    assert reason in bench.line


def test_one_target_for_two_disks(bench: Bench) -> None:
    rule = TargetRule(bench.name, "only")
    assert bench.run(targets=(rule, rule)) == 4
    assert "two disks of the image would go to one" in bench.line
    assert bench.is_untouched


def test_a_disk_without_a_rule_is_named(bench: Bench) -> None:
    """Whoever asked for one disk of two gets it, and reads that the other is as it was."""
    repository = Repository.open(str(bench.repo))
    document = bench.manifest.document
    disks = [*document["disks"], {**document["disks"][0], "name": "sdz"}]
    other = "20200101t000000z-00000000"
    repository.commit(document | {"id": other, "disks": disks})
    assert bench.run(image=other) == 0
    assert bench.target.read_bytes() == CONTENT
    assert bench.line.endswith("reason=restored and read back; left out, as told: sdz")


def test_how_the_machine_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own system comes up again when nothing was written, unless a person wants to see."""
    monkeypatch.setattr(unattended, "_BACK_SECONDS", 0)
    assert bench.ending(then="poweroff") == "poweroff"
    nobody, person = Watcher(), Watcher("its own system")
    bench.repositories = ()
    assert bench.ending(nobody, back=True) == "reboot"
    assert "Nothing was written" in nobody.written and "menu follows" not in nobody.written
    assert bench.ending(person, back=True) is None
    assert bench.ending(Watcher("press any key to stop"), back=True) is None
    stays = Watcher()
    assert bench.ending(stays) is None
    assert "the menu follows" in stays.written


def test_a_target_that_was_begun_is_not_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[str]:
        raise ImagerError("cannot write")

    monkeypatch.setattr(unattended, "carry_out", fail)
    watcher = Watcher()
    assert bench.ending(watcher, back=True) is None
    assert "the menu follows" in watcher.written


def test_a_rollback(bench: Bench) -> None:
    bench.target.write_bytes(CONTENT[:-512] + BEFORE * 512)
    watcher = Watcher()
    assert bench.ending(watcher, delta=True) == "reboot"
    assert bench.target.read_bytes() == CONTENT
    assert bench.line.endswith("reason=rolled back")
    assert "were there already" in watcher.written


def test_a_changed_image(bench: Bench) -> None:
    bench.pinned = (PinnedImage(bench.manifest.id, "web1", (PinnedDisk(bench.name, "0" * 64),)),)
    assert bench.run() == 3
    assert "has changed since the medium was made" in bench.line
    assert bench.is_untouched


def test_an_altered_manifest(bench: Bench) -> None:
    """One character of the file, on the medium or where it is fetched from."""
    (file,) = bench.repo.glob("manifests/*.json")
    file.write_text(file.read_text().replace('"web1"', '"web2"'))
    assert bench.run() == 3
    assert bench.is_untouched


def test_a_damaged_image(bench: Bench) -> None:
    for path in bench.repo.glob("packs/*/*.pack"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert bench.run() == 3


def test_no_such_image(bench: Bench) -> None:
    bench.repositories = ()
    assert bench.run() == 1
    assert f"image={bench.manifest.id} target=none reason=the image" in bench.line


def test_an_image_with_gaps(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*arguments: Any) -> restoring.Prepared:
        prepared = restoring.prepare(*arguments)
        return replace(prepared, plan=replace(prepared.plan, missing=("512 bytes at byte 0",)))

    monkeypatch.setattr(unattended, "prepare", prepare)
    watcher = Watcher()
    assert bench.run(watcher) == 5
    assert "could not be read when the image was made" in bench.line
    assert "not in the image, so zeros on the target: 512 bytes at byte 0" in watcher.written


def test_another_machine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = Reason("blocker", "firmware", "the image boots by UEFI only")
    comparison = Comparison("will not boot", (blocker,))
    monkeypatch.setattr(restoring, "compare", lambda *_: comparison)
    assert bench.run() == 4
    assert "it will not boot in this machine: firmware: the image boots by UEFI" in bench.line
    assert f"target={bench.target} " in bench.line
    assert bench.is_untouched


def test_an_error_of_the_program(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(unattended, "candidates", fail)
    assert bench.run() == 1
    assert "ZeroDivisionError" in bench.line
    assert any("in fail" in line for line in bench.session.log.lines())


# --- the report ---------------------------------------------------------------------------------


class Server(HTTPServer):
    """Keeps what is posted; ``failures``: how many posts are answered by an error first."""

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.posts = failures, list[Any]()
        super().__init__(("127.0.0.1", 0), Taker)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/result"


class Taker(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append(json.loads(content))
        is_failure = len(self.server.posts) <= self.server.failures
        self.send_response(503 if is_failure else 204)
        self.end_headers()

    def log_message(self, format: str, *_: object) -> None:
        pass


@contextmanager
def serving(failures: int = 0) -> Iterator[Server]:
    with Server(failures) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_it_is_reported(bench: Bench) -> None:
    with serving(failures=1) as server:
        assert bench.run(report_url=server.url) == 0
    first, second = server.posts
    assert first == second
    assert set(first.pop("machine")) == {"vendor", "product", "serial", "macs"}
    assert first == {
        "exit": 0,
        "image": bench.manifest.id,
        "targets": [str(bench.target)],
        "reason": "restored and read back",
        "medium": "0123456789abcdef",
    }


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "no address"])
def test_a_report_that_fails_changes_nothing(url: str, bench: Bench) -> None:
    assert bench.run(report_url=url) == 0
    assert any("the report to" in line for line in bench.session.log.lines())


def test_a_server_that_always_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_PAUSE_SECONDS", 0)
    notes: list[str] = []
    with serving(failures=9) as server:
        assert not post(server.url, Result(0, "", (), ""), "", notes.append)
    assert len(server.posts) == len(notes) == 3


def test_the_line_is_one_line() -> None:
    result = Result(4, "a b", ("/dev/sda:serial=A B,C\x1b", "/dev/sdb"), "refused:\n  - too\tsmall")
    assert result.line() == (
        "imager-rescue: result exit=4 image=a_b target=/dev/sda:serial=A_B_C_,/dev/sdb "
        "reason=refused: - too small"
    )
