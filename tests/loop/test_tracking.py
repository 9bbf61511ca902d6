"""Capture while the server writes: mounted filesystems on loop devices, under load."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.blocktrace import TRACEFS, remove_stale
from imager.capture import CaptureJob, SourceDisk, capture
from imager.deviceuse import live_filesystems
from imager.diskidentity import disk_identity
from imager.extents import Extents
from imager.freeze import Freeze, frozen
from imager.layout import read_layout
from imager.livecapture import Frozen
from imager.manifest import Manifest
from imager.plan import RestoreOptions, plan_restore
from imager.process import run
from imager.progress import NullProgress
from imager.repository import Repository
from imager.restore import restore
from imager.trackcapture import DiskTracker
from imager.tracking import UNIT, WriteTracker
from tests.support.disks import (
    MIB,
    check_filesystem,
    loop_disk,
    make_filesystem,
    make_sparse,
    mounted,
    needs_loop,
)

pytestmark = needs_loop

SIZE = {"ext4": 256 * MIB, "xfs": 320 * MIB}
PATIENCE = 120


@pytest.fixture(params=["ext4", "xfs"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """A mounted filesystem: its kind, its disk and its folder."""
    kind = request.param
    image = make_sparse(tmp_path / "disk.img", SIZE[kind])
    make_filesystem(image, kind)
    with loop_disk(image) as device, mounted(device, tmp_path / "m") as folder:
        (folder / "still").write_bytes(os.urandom(8 * MIB))
        yield kind, device, folder


class Checked:
    """A freeze that before its end reads all that is used: what the image must be."""

    def __init__(self, freeze: Freeze, device: str, folder: Path) -> None:
        self._freeze = freeze
        self._device = device
        self._folder = folder
        self.root = ""

    @property
    def milliseconds(self) -> int:
        return self._freeze.milliseconds

    def end(self) -> None:
        with (
            FileSource(self._device) as source,
            tempfile.TemporaryDirectory(dir=self._folder) as repo,
        ):
            block_size = Repository.open(str(self._folder / "repo")).block_size
            repository = Repository.create(f"{repo}/quiet", block_size=block_size)
            disk = SourceDisk("disk", source, read_layout(source), disk_identity(self._device))
            job = CaptureJob((disk,), name="quiet")
            self.root = capture(job, repository, NullProgress()).disks[0].root
        self._freeze.end()


def take(
    device: str, repo: Path, *, buffer_kib: int | None = None, check: Path | None = None
) -> Manifest:
    """An image of a mounted disk, by tracking; all of it is compared with what the disk has during
    the freeze, when there is a folder for that on another disk."""
    checked: list[Checked] = []

    @contextmanager
    def still() -> Iterator[Frozen]:
        with frozen(live_filesystems([device]), limit_seconds=600) as freeze:
            if check is None:
                yield freeze
            else:
                checked.append(Checked(freeze, device, check))
                yield checked[-1]

    with FileSource(device) as source:
        disk = SourceDisk("disk", source, read_layout(source), disk_identity(device))
        job = CaptureJob((disk,), name="test", consistency="tracked")
        tracker = DiskTracker(buffer_kib=buffer_kib)
        manifest = tracker.capture(job, still, Repository.open(str(repo)), NullProgress())
    if checked:
        assert manifest.disks[0].root == checked[-1].root
    return manifest


@contextmanager
def restored(repo: Path, manifest: Manifest, kind: str, folder: Path) -> Iterator[Path]:
    """The image on a disk of its own, sound, ext4 without a replay, and mounted."""
    target = folder / "restored.img"
    repository = Repository.open(str(repo))
    disk = manifest.disks[0]
    plan = plan_restore(repository, manifest, disk, str(target), RestoreOptions())
    assert restore(repository, manifest, disk, plan, NullProgress()).missing == []
    twin = ",nouuid" if kind == "xfs" else ""  # the disk itself is mounted too
    with loop_disk(target) as device:
        if kind == "xfs":  # a freeze always leaves it a log to replay (xfs_fs_freeze)
            with mounted(device, folder / "restored", f"noatime{twin}"):
                pass
        check_filesystem(device, kind)
        with mounted(device, folder / "restored", f"ro{twin}") as at:
            yield at
    target.unlink()


class Load:
    """Programs that write until they are told to stop; each says when it has begun."""

    def __init__(self, *programs: str) -> None:
        self._programs = programs
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Load:
        for program in self._programs:
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._processes.append(process)
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "begun"
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


# Each line of `log` was written by fsync(2) of a file of its own before; the log is not on the disk
# that is captured, so what it says when the capture begins must be in the image.
FSYNCER = """
import os, sys, time
folder, log = {folder!r}, open({log!r}, "a", buffering=1)
n = 0
while True:
    name = f"{{folder}}/synced-{{n % 400}}"
    fd = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.write(fd, f"{{n}} ".encode() * 3000)
    os.fsync(fd)
    os.close(fd)
    log.write(f"{{n}}\\n")
    if n == 20:
        print("begun", flush=True)
    n += 1
    time.sleep(0.02)
"""

SQLITE = """
import sqlite3, random, time
base = sqlite3.connect({path!r})
base.execute("pragma journal_mode=wal")
base.execute("create table t (id integer primary key, text)")
n = 0
while True:
    with base:
        for _ in range(20):
            base.execute("insert into t (text) values (?)", (random.randbytes(900).hex(),))
        base.execute("delete from t where id % 7 = 3")
    if n == 3:
        print("begun", flush=True)
    n += 1
    time.sleep(0.02)
"""

GIT = """
import subprocess, random, pathlib, time
folder = pathlib.Path({folder!r})
def git(*words):
    subprocess.run(["git", "-C", str(folder), "-c", "core.fsync=all", "-c", "user.name=t",
                    "-c", "user.email=t@t", *words], check=True, capture_output=True)
folder.mkdir()
git("init", "-q")
n = 0
while True:
    for k in range(5):
        (folder / f"f{{random.randrange(60)}}").write_text(str(random.random()) * 500)
    git("add", "-A")
    git("commit", "-q", "-m", str(n))
    if n == 1:
        print("begun", flush=True)
    n += 1
    time.sleep(0.1)
"""


def fsynced(log: Path) -> int:
    """The number of the last write that had ended."""
    return int(log.read_text().split("\n")[-2])


def test_under_load_nothing_that_was_synced_is_missing(
    live: tuple[str, str, Path], repo: Path, tmp_path: Path
) -> None:
    kind, device, folder = live
    log = tmp_path / "log"
    load = Load(
        FSYNCER.format(folder=str(folder), log=str(log)),
        SQLITE.format(path=f"{folder}/base.sqlite"),
        GIT.format(folder=f"{folder}/git"),
    )
    with load:
        before = fsynced(log)
        manifest = take(device, repo, check=tmp_path)
    with restored(repo, manifest, kind, tmp_path) as at:
        check_restored(at, before)
    tracked = manifest.document["tracked"]
    assert tracked["passes"] >= 2
    assert tracked["reread_bytes"] > 0
    assert tracked["unfrozen_bytes"] == 0


def check_restored(at: Path, synced: int) -> None:
    for n in range(max(synced - 399, 0), synced + 1):
        words = (at / f"synced-{n % 400}").read_text().split()
        # a later write of the same file may have begun: it is empty or newer then
        assert not words or int(words[0]) >= n
    copy = at.parent / "base.sqlite"  # of a filesystem that is mounted read-only
    for end in ("", "-wal"):
        shutil.copy(at / f"base.sqlite{end}", f"{copy}{end}")
    with closing(sqlite3.connect(copy)) as base:
        assert base.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert base.execute("select count(*) from t").fetchone()[0] > 0
    run(["git", "-c", "safe.directory=*", "-C", str(at / "git"), "fsck", "--full", "--strict"])
    run(["git", "-c", "safe.directory=*", "-C", str(at / "git"), "log", "-1"])


def test_a_quiet_disk(live: tuple[str, str, Path], repo: Path, tmp_path: Path) -> None:
    kind, device, folder = live
    manifest = take(device, repo, check=tmp_path)
    assert manifest.document["tracked"]["since"] == [None]
    with restored(repo, manifest, kind, tmp_path) as at:
        assert (at / "still").read_bytes() == (folder / "still").read_bytes()


def test_a_tiny_buffer_loses_events_and_all_is_read_again(
    live: tuple[str, str, Path], repo: Path, tmp_path: Path
) -> None:
    kind, device, folder = live
    log = tmp_path / "log"
    with Load(FSYNCER.format(folder=str(folder), log=str(log))):
        ended = threading.Event()
        flood = threading.Thread(target=write_much, args=(folder / "flood", ended))
        flood.start()
        try:
            before = fsynced(log)
            manifest = take(device, repo, buffer_kib=4, check=tmp_path)
        finally:
            ended.set()
            flood.join(PATIENCE)
        with restored(repo, manifest, kind, tmp_path) as at:
            words = (at / f"synced-{before % 400}").read_text().split()
            assert not words or int(words[0]) >= before


def write_much(path: Path, ended: threading.Event) -> None:
    """Many small writes that go to the disk at once."""
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        n = 0
        while not ended.is_set():
            for _ in range(64):
                os.pwrite(file.fileno(), os.urandom(4096), n * 8192 % (4 * MIB))
                n += 1
            os.fsync(file.fileno())
            ended.wait(0.01)


def test_a_lost_event_is_told(tmp_path: Path) -> None:
    """With a buffer of a page, and nobody who reads it meanwhile."""
    image = make_sparse(tmp_path / "disk.img", 64 * MIB)
    with loop_disk(image) as device:
        tracker = WriteTracker(device, 64 * MIB, buffer_kib=4)
        try:  # without its thread
            write_directly(device, [n * 8192 for n in range(4000)])
            assert tracker.take().lost
            assert not tracker.take().lost
            write_directly(device, [8192])
            assert not (taken := tracker.take()).lost
            assert taken.extents == Extents([(0, UNIT)])
        finally:
            tracker._trace.__exit__()


def write_directly(device: str, offsets: Sequence[int]) -> None:
    import mmap

    with mmap.mmap(-1, 4096) as page:
        fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
        try:
            for offset in offsets:
                os.pwrite(fd, page, offset)
        finally:
            os.close(fd)


def test_what_is_written_is_seen(tmp_path: Path) -> None:
    """Written directly, through the cache, discarded, zeroed: to a device that nothing mounts."""
    image = make_sparse(tmp_path / "disk.img", 64 * MIB)
    with loop_disk(image) as device, WriteTracker(device, 64 * MIB) as tracker:
        tracker.take()
        write_directly(device, [5 * MIB, 5 * MIB + 8192])
        assert tracker.take().extents == Extents([(5 * MIB, UNIT)])
        run(["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "seek=9", "count=2", "conv=fsync"])
        assert tracker.take().extents == Extents([(9 * MIB, 2 * MIB)])
        run(["blkdiscard", "-o", str(20 * MIB), "-l", str(4 * MIB), device])
        assert tracker.take().extents == Extents([(20 * MIB, 4 * MIB)])
        run(["blkdiscard", "-z", "-o", str(40 * MIB), "-l", str(MIB), device])
        assert tracker.take().extents == Extents([(40 * MIB, MIB)])
        with FileSource(device) as source:
            source.pread(0, 8 * MIB)
        assert tracker.take().extents == Extents()


def test_the_repository_may_lie_on_the_disk(live: tuple[str, str, Path], tmp_path: Path) -> None:
    kind, device, folder = live
    repo = folder / "repo"
    Repository.create(str(repo))
    log = tmp_path / "log"
    with Load(FSYNCER.format(folder=str(folder), log=str(log))):
        before = fsynced(log)
        manifest = take(device, repo)
    with restored(repo, manifest, kind, tmp_path) as at:
        words = (at / f"synced-{before % 400}").read_text().split()
        assert not words or int(words[0]) >= before


def test_nothing_is_left_of_a_killed_process() -> None:
    """Its instance goes when the next one begins."""
    code = (
        "import os, signal, sys; from imager.blocktrace import BlockTrace;"
        "trace = BlockTrace('259:77'); print(trace._folder.name, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    folder = TRACEFS / "instances" / done.stdout.strip()
    assert folder.name.startswith("imager-")
    remove_stale(TRACEFS)
    assert not folder.exists()
