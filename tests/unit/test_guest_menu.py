"""The menu of the rescue system, typed by a script on a terminal that only remembers."""

from __future__ import annotations

import os
import random
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bootmedia.guest import (
    capturing,
    console,
    datascreen,
    diskscreen,
    imagechoice,
    menu,
    restorescreen,
    restoring,
    volumes,
)
from bootmedia.guest.attached import Volume
from bootmedia.guest.choosing import Back, Choice, choose, show
from bootmedia.guest.console import Terminal, TerminalLost
from bootmedia.guest.medium import Medium
from bootmedia.guest.network import Card, Network
from bootmedia.guest.session import Session
from bootmedia.guest.targets import Candidate
from bootmedia.job import Job, NetworkSetup, PinnedDisk, PinnedImage
from imager.capture import CaptureJob, capture
from imager.compatibility import Comparison, Reason, Verdict
from imager.deviceuse import Use
from imager.diskidentity import DiskIdentity, disk_identity
from imager.errors import ImagerError, ObjectMissing
from imager.manifest import Manifest
from imager.progress import NullProgress
from imager.repository import Repository
from tests.support.sources import MemorySource, memory_disk

MIB = 1 << 20
CONTENT = random.Random(4).randbytes(2 * MIB)

Answer = str | BaseException


class FakeTerminal(Terminal):
    """Answers by a script; at its end the line breaks off."""

    def __init__(self, *answers: Answer) -> None:
        self.path, self.name = "/dev/fake", "fake"
        self.answers = list(answers)
        self.written = ""
        self.shells = 0

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, text: str) -> None:
        self.written += text

    def ask(self, prompt: str) -> str:
        self.write(prompt)
        if not self.answers:
            raise TerminalLost("fake: hung up")
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        self.write("\n")
        return answer

    def check_interrupt(self) -> None:
        pass

    def shell(self) -> int:
        self.shells += 1
        return 0


class FakeNetwork(Network):
    def __init__(self) -> None:
        self.setups: list[NetworkSetup] = []
        self.error: ImagerError | None = None

    def cards(self) -> list[Card]:
        return [Card("eth0", "52:54:00:00:00:01", "by DHCP", ["192.0.2.7/24"])]

    def set_up(self, setup: NetworkSetup) -> None:
        if self.error:
            raise self.error
        self.setups.append(setup)


class Bench:
    """A session with one repository of one image, and its menu."""

    def __init__(self, folder: Path, repo: Path, announced: list[str]) -> None:
        self.folder, self.repo, self.announced = folder, repo, announced
        self.repository = Repository.open(str(repo))
        self.manifest = self.capture()
        self.network = FakeNetwork()
        self.session = Session(self.job())
        self.target = folder / "target"
        self.target.write_bytes(bytes(len(CONTENT)))

    def capture(self, content: bytes = CONTENT, **options: Any) -> Manifest:
        job = CaptureJob(disks=(memory_disk(MemorySource(content)),), name="web1", **options)
        return capture(job, self.repository, NullProgress())

    def job(self, **values: Any) -> Job:
        values = {"repositories": (str(self.repo),), "volumes": 0} | values
        return Job("0123456789abcdef", 1_700_000_000, "1.0", "6.1", 256 * MIB, (), **values)

    def run(self, *answers: Answer) -> str:
        """Type these in the menu, then break the line off; what was on the screen."""
        terminal = FakeTerminal(*answers)
        with pytest.raises(TerminalLost):
            menu.run(self.session, terminal, self.network)
        return self.check(terminal)

    def end(self, *answers: Answer) -> tuple[str, str]:
        """The same until the menu ends by itself: its result, and the screen."""
        terminal = FakeTerminal(*answers)
        result = menu.run(self.session, terminal, self.network)
        return result, self.check(terminal)

    @staticmethod
    def check(terminal: FakeTerminal) -> str:
        """Every line fits, and there is nothing but text."""
        for line in terminal.written.split("\n"):
            assert len(line.rpartition("\r")[2]) < 80, line
        assert terminal.written.replace("\n", "").replace("\r", "").isprintable()
        assert "\x1b" not in terminal.written
        assert not terminal.answers, "not all of the script was asked for"
        return " ".join(terminal.written.split())


def squeezed(text: str) -> str:
    """Without blanks: a long path is broken at the end of a line."""
    return "".join(text.split())


@pytest.fixture
def bench(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    announced: list[str] = []
    monkeypatch.setattr(menu.system, "announce", announced.append)
    monkeypatch.setattr(menu, "_to_announce", threading.Lock())
    return Bench(tmp_path, repo, announced)


# --- the menu ---


def test_the_head_says_what_this_is(bench: Bench) -> None:
    pinned = PinnedImage(bench.manifest.id, "web1")
    bench.session = Session(bench.job(images=(pinned,)))
    screen = bench.run()
    assert "imager 1.0 rescue system, kernel" in screen
    assert "medium 0123456789abcdef, made" in screen
    assert f"images: web1 {bench.manifest.id}" in screen
    assert "memory: " in screen
    assert "network: eth0 52:54:00:00:00:01 192.0.2.7/24" in screen
    for item in menu.SCREENS:
        assert f"{item.key} {item.title}" in screen


def test_it_is_announced_once(bench: Bench) -> None:
    bench.run()
    bench.run("", "x")
    (line,) = bench.announced
    assert line.startswith("imager-rescue: ready version=1.0 kernel=")
    assert line.endswith(" medium=0123456789abcdef")


def test_the_machine_is_ended(bench: Bench) -> None:
    assert bench.end("9", "", "9", "1")[0] == "reboot"
    assert bench.end("9", "2")[0] == "poweroff"


def test_it_is_not_ended_while_another_terminal_works(bench: Bench) -> None:
    with at_work(bench.session):
        assert "another terminal is at work: something long" in bench.run("9", "1")


def test_errors_lead_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.network.error = ImagerError("the cable is gone", hint="plug it in")
    screen = bench.run("4", "1", "4", KeyboardInterrupt(), KeyboardInterrupt())
    assert "error: the cable is gone hint: plug it in" in screen
    assert any("the cable is gone (plug it in)" in line for line in bench.session.log.lines())
    bench.network.error = None
    monkeypatch.setattr(menu, "show_disks", fail)
    screen = bench.run("3")
    assert "unexpected ZeroDivisionError: details are in the log" in screen
    assert any("in fail" in line for line in bench.session.log.lines())
    assert screen.count("menu, 1 to 9") == 2


def test_the_shell_and_the_log(bench: Bench) -> None:
    terminal = FakeTerminal("8", "7")
    bench.session.log.add("\n".join(f"line {n}" for n in range(15)))
    with pytest.raises(TerminalLost):
        menu.run(bench.session, terminal, bench.network)
    assert terminal.shells == 1
    assert "line 14\n" in terminal.written
    assert "line 0\n" in terminal.written
    bench.session.log.add("\n".join(f"line {n}" for n in range(15, 90)))
    screen = bench.run("7", "", "q")
    assert screen.index("line 70") < screen.index("line 89") < screen.index("line 50")
    assert "line 49" not in screen


def fail(*_: object) -> None:
    raise ZeroDivisionError


@contextmanager
def at_work(session: Session) -> Iterator[None]:
    """Another thread works meanwhile."""
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        with session.work("something long"):
            begun.set()
            done.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(30)
    try:
        yield
    finally:
        done.set()
        thread.join()


# --- questions ---


def test_choose() -> None:
    terminal = FakeTerminal("0", "x", "m", "2", "10", "", "s")
    choices = [Choice(f"item {n}", n, "not free" if n == 2 else None) for n in range(1, 13)]
    choices.append(Choice("search", 99, key="s"))
    assert choose(terminal, "Items", choices) == 10
    assert "there is no x here" in terminal.written
    assert "this one cannot be chosen: not free" in terminal.written
    with pytest.raises(Back):
        choose(terminal, "Items", choices)
    assert choose(terminal, "Items", choices) == 99


def test_show_wraps_and_keeps_escape_sequences_out() -> None:
    terminal = FakeTerminal()
    show(terminal, ["  word " + "word " * 40, "\x1b[2Jevil\ttab", ""])
    lines = terminal.written.split("\n")
    assert all(len(line) < 80 for line in lines)
    assert lines[1].startswith("  word")
    assert lines[-3:] == ["?[2Jevil?tab", "", ""]


# --- images ---


def test_images_newest_first(bench: Bench) -> None:
    second = bench.capture(note="after the update")
    screen = bench.run("6", "2")
    assert screen.index(second.id) < screen.index(bench.manifest.id)
    assert "UTC (0 hours ago) after the update" in screen
    assert "disk 2.0 MiB; named by this medium" in screen
    assert "no data backup was taken with this image" in screen


def test_what_cannot_be_opened_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(bench.folder / "missing")
    bench.session = Session(bench.job(repositories=(missing,)))
    monkeypatch.setattr(imagechoice.Session, "search_disks", lambda self: [])
    screen = bench.run("2", "s", "")
    assert squeezed(f"{missing} is not a repository") in squeezed(screen)
    assert "No image is at hand." in screen
    assert "there is no further repository on them" in screen


def test_a_damaged_manifest_is_said(bench: Bench) -> None:
    second = bench.capture()
    (bench.repo / "manifests" / f"{second.id}.json").write_bytes(b"{}")
    screen = bench.run("2", "")
    assert f"manifests/{second.id}.json" in screen
    assert bench.manifest.id in screen


def test_a_changed_image_is_refused(bench: Bench) -> None:
    pinned = PinnedImage(bench.manifest.id, "web1", (PinnedDisk("disk", "00" * 32),))
    bench.session = Session(bench.job(images=(pinned,)))
    assert "has changed since the medium was made" in bench.run("2", "1")


def test_age() -> None:
    assert imagechoice.age(3601) == "1 hour ago"
    assert imagechoice.age(47 * 3600) == "47 hours ago"
    assert imagechoice.age(30 * 86400) == "30 days ago"
    assert "clock" in imagechoice.age(-5)


# --- verify, disks, network, data backups ---


def test_verify(bench: Bench) -> None:
    assert "1 pack, 2.0 MiB of blocks: all sound" in bench.run("2", "1").replace(
        "2 packs", "1 pack"
    )
    pack = max(bench.repo.glob("packs/*/*"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    bench.session.forget(bench.session.origins()[0])
    screen = bench.run("2", "1")
    assert "DAMAGED" in screen and "1 damaged place" in screen
    assert any("DAMAGED" in line for line in bench.session.log.lines())


def test_one_terminal_works_at_a_time(bench: Bench) -> None:
    with at_work(bench.session):
        assert "another terminal is at work: something long" in bench.run("2", "1")


def test_disks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskscreen, "disks", lambda: [str(bench.target), "/nowhere"])
    monkeypatch.setattr(diskscreen, "disk_identity", identity_of_file)
    monkeypatch.setattr(Session, "reserved", lambda self, path: "this rescue medium")
    screen = bench.run("3")
    assert f"{bench.target} 2.0 MiB serial S-1" in screen
    assert "this rescue medium" in screen
    assert "partition table: none" in screen
    assert "cannot be read: " in screen
    monkeypatch.setattr(diskscreen, "disks", lambda: [])
    assert "no disk was found" in bench.run("3")


def test_network(bench: Bench) -> None:
    bench.run("4", "1", "4", "2", "1", "192.0.2.9/24", "192.0.2.1", "192.0.2.2, 192.0.2.3")
    bench.run("4", "2", "1", "192.0.2.9/24", "", "")
    assert bench.network.setups == [
        NetworkSetup("dhcp"),
        NetworkSetup("static", "eth0", "192.0.2.9/24", "192.0.2.1", ("192.0.2.2", "192.0.2.3")),
        NetworkSetup("static", "eth0", "192.0.2.9/24"),
    ]


def test_data_backups(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    document = bench.manifest.document | {
        "id": bench.manifest.id[:-1] + ("0" if bench.manifest.id[-1] != "0" else "1"),
        "data": [{"name": "db", "engine": "restic", "snapshot": "ab12", "restore": ["restic"]}],
    }
    bench.repository.commit(document)
    number = 1 if document["id"] > bench.manifest.id else 2
    screen = bench.run("6", str(number), "n")
    assert "data backup db, restic, ; by hand: restic" in screen
    monkeypatch.setattr(datascreen, "restored_systems", lambda note: [])
    screen = bench.run("6", str(number), "y")
    assert "no attached disk has a system" in screen


def identity_of_file(path: str) -> DiskIdentity:
    """As if it was a disk."""
    return replace(disk_identity(path), path=path, serial="S-1")


# --- volumes ---


def test_a_volume_is_asked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found, ejected = [None, None, Medium(bench.folder, "/dev/sr0")], []

    def find(medium_id: str, seconds: float, *, volume: int) -> Medium:
        assert (medium_id, volume) == ("0123456789abcdef", 2)
        if (medium := found.pop(0)) is None:
            raise ObjectMissing("not there")
        return medium

    monkeypatch.setattr(volumes, "find_medium", find)
    monkeypatch.setattr(volumes, "eject", ejected.append)
    bench.session.medium = first = Medium(bench.repo, "/dev/sr0")
    terminal = FakeTerminal("", "")
    with volumes.volumes_from(bench.session, terminal):
        assert bench.session.ask_for_volume(2) == bench.folder
    assert ejected == [first]
    assert bench.session.medium.folder == bench.folder
    assert "Put in volume 2 of the medium" in terminal.written
    assert "volume 2 was not found on any disk or drive" in terminal.written
    with pytest.raises(ObjectMissing, match="nobody is there"):
        bench.session.ask_for_volume(3)


# --- capture ---


@pytest.fixture
def spare(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a spare disk's filesystem; the machine's own disk is a file."""
    disk, volume, folder = (bench.folder / name for name in ("sda", "sdb", "mnt"))
    disk.write_bytes(CONTENT[: MIB // 2])
    volume.write_bytes(bytes(MIB))
    folder.mkdir()

    @contextmanager
    def mounted(volume: Volume, *, writable: bool) -> Iterator[Path]:
        assert writable
        yield folder

    monkeypatch.setattr(capturing, "disks", lambda: [str(disk)])
    monkeypatch.setattr(capturing, "volumes", lambda: [Volume(str(volume), "ext4", "spare", MIB)])
    monkeypatch.setattr(capturing, "mounted", mounted)
    return folder


def test_capture_into_a_new_repository(bench: Bench, spare: Path) -> None:
    screen = bench.run("5", "1", "1", "web1", "before", "y", "y")
    (manifest,) = Repository.open(str(spare / "imager")).manifests()
    assert (manifest.name, manifest.note) == ("web1", "before")
    assert manifest.disks[0].size == MIB // 2
    assert 'ext4"spare"1.0MiB' in squeezed(screen)
    assert f"image {manifest.id} of web1: 512 KiB read" in screen


def test_capture_into_a_repository_that_is_there(bench: Bench, spare: Path) -> None:
    Repository.create(str(spare / "backups/own"))
    screen = bench.run("5", "1", "1", "web1", "", "1", "y")
    assert "the repository in /backups/own" in screen
    assert len(Repository.open(str(spare / "backups/own")).image_ids()) == 1
    assert not (spare / "imager").exists()


def test_nothing_is_captured_without_a_yes(bench: Bench, spare: Path) -> None:
    for answers in ([""], ["1", ""], ["1", "1", ""], ["1", "1", "web1", "", "n"]):
        bench.run("5", *answers)
        assert not (spare / "imager").exists()
    bench.run("5", "1", "1", "web1", "", "y", "n")
    assert not Repository.open(str(spare / "imager")).image_ids()
    assert "letters, digits" in bench.run("5", "1", "1", "web/1")


def test_what_is_not_captured(bench: Bench, spare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "volumes", list)
        assert "no filesystem to write the image to" in bench.run("5")
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "uses_of", lambda path: [Use("sda1", "mounted at /mnt", True)])
        assert "cannot be chosen: sda1 is mounted at /mnt" in bench.run("5", "1", "1", "")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "reserved", lambda self, path: "this rescue medium")
        assert "cannot be chosen: this rescue medium" in bench.run("5", "1", "")
    volume = bench.folder / "sdb"
    monkeypatch.setattr(capturing, "disks", lambda: [str(volume)])
    monkeypatch.setattr(capturing, "device_numbers", lambda path: {path})
    assert "cannot be chosen: the image is written to it" in bench.run("5", "1", "1", "")


# --- restore ---


@pytest.fixture
def verdict(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[Verdict], None]:
    """Disks of this machine are files; sets what the comparison of machines says."""
    medium = Candidate("/dev/sdz", DiskIdentity(path="/dev/sdz"), "this rescue medium")
    path = str(bench.target)
    known = [Candidate(path, identity_of_file(path)), medium]
    monkeypatch.setattr(restorescreen, "candidates", lambda session: known)
    said: list[Verdict] = ["will work"]

    def judge(*_: object) -> Comparison:
        blocker = Reason("blocker", "firmware", "the image wants UEFI")
        return Comparison(said[0], (blocker,) if said[0] == "will not boot" else ())

    monkeypatch.setattr(restoring, "compare", judge)
    return lambda text: said.__setitem__(0, text)


def test_restore(bench: Bench, verdict: Callable[[Verdict], None]) -> None:
    screen = bench.run("1", "1", "2", "1", "", "", "", "target", "n")
    assert bench.target.read_bytes() == CONTENT
    assert "/dev/sdz of unknown size (this rescue medium)" in screen
    assert "this one cannot be chosen: this rescue medium" in screen
    assert f"All that is on {bench.target} will be overwritten." in screen
    assert "100%" in screen
    assert f"disk of {bench.manifest.id} is restored to {bench.target}" in screen
    assert "restart now? [y/N]" in screen
    assert any("is restored to" in line for line in bench.session.log.lines())


def test_restore_and_restart(bench: Bench, verdict: Callable[[Verdict], None]) -> None:
    assert bench.end("1", "1", "1", "y", "y", "y", str(bench.target), "y")[0] == "reboot"
    assert bench.target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "answers",
    [
        [""],
        ["1", ""],
        ["1", "1", KeyboardInterrupt()],
        ["1", "1", "", "", "", ""],
        ["1", "1", "", "", "", "Target"],
        ["1", "1", "", "", "", "sda"],
        ["1", "1", "", "", "", KeyboardInterrupt()],
    ],
)
def test_nothing_is_written_without_the_name(
    bench: Bench, verdict: Callable[[Verdict], None], answers: list[Answer]
) -> None:
    screen = bench.run("1", *answers)
    assert not any(bench.target.read_bytes())
    assert screen.count("menu, 1 to 9") == 2


def test_what_will_not_boot_needs_a_word(bench: Bench, verdict: Callable[[Verdict], None]) -> None:
    verdict("will not boot")
    screen = bench.run("1", "1", "1", "", "", "", "y")
    assert "firmware: the image wants UEFI" in screen
    assert "It will not boot in this machine. To go on, type anyway:" in screen
    bench.run("1", "1", "1", "", "", "", "anyway", "other")
    assert not any(bench.target.read_bytes())
    bench.run("1", "1", "1", "", "", "", "anyway", "target", "")
    assert bench.target.read_bytes() == CONTENT


def test_a_refused_plan_leads_back(bench: Bench, verdict: Callable[[Verdict], None]) -> None:
    bench.target.write_bytes(bytes(MIB))
    screen = bench.run("1", "1", "1", "", "", "")
    assert "Refused:" in screen
    assert "refused, nothing was written" in screen
    assert not any(bench.target.read_bytes())


def test_a_restore_is_stopped_and_gone_on_with(
    bench: Bench, verdict: Callable[[Verdict], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(console, "_REDRAW_SECONDS", 0)
        patch.setattr(FakeTerminal, "check_interrupt", interrupt)
        screen = bench.run("1", "1", "1", "", "", "", "target")
    assert screen.count("menu, 1 to 9") == 2
    assert bench.target.read_bytes() != CONTENT
    screen = bench.run("1", "1", "1", "", "", "", "target", "")
    assert "this restore was begun there before" in screen
    assert bench.target.read_bytes() == CONTENT


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_no_restore_while_another_terminal_works(
    bench: Bench, verdict: Callable[[Verdict], None]
) -> None:
    with at_work(bench.session):
        assert "another terminal is at work" in bench.run("1", "1", "1", "", "", "")


def test_an_image_of_two_disks(bench: Bench, verdict: Callable[[Verdict], None]) -> None:
    disks = tuple(memory_disk(MemorySource(CONTENT), name=name) for name in ("sda", "sdb"))
    capture(CaptureJob(disks=disks, name="pair"), bench.repository, NullProgress())
    screen = bench.run("1", "1", "1", "1", "l", "", "", "", "target", "")
    assert "this one cannot be chosen: chosen for sda" in screen
    assert bench.target.read_bytes() == CONTENT
    screen = bench.run("1", "1", "l", "l")
    assert "All that is on" not in screen


# --- a real terminal ---


def read_until(terminal: int, last: str) -> str:
    """The kernel hands it over in pieces, and on a loaded machine later."""
    screen = b""
    while last.encode() not in screen:
        assert select.select([terminal], [], [], 60)[0], screen.decode()
        screen += os.read(terminal, 1 << 16)
    return screen.decode()


def test_on_a_terminal(bench: Bench) -> None:
    """Typed ahead, with a slip that is rubbed out."""
    ours, theirs = os.openpty()
    try:
        with Terminal(os.ttyname(theirs)) as terminal:
            os.write(ours, b"4\x03" + b"7\x7f9\r" + b"2\r")
            assert menu.run(bench.session, terminal, bench.network) == "poweroff"
            screen = read_until(ours, "switch it off\r\n")
    finally:
        os.close(ours)
        os.close(theirs)
    assert "menu, 1 to 9 (Enter: show it)? 4^C\r\n\r\n" in screen
    assert "restart the machine\r\n  2  switch it off\r\n" in screen
