"""imager mount and umount: what is shown, and that nothing is left, whatever is killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from imager.imagevolumes import open_disks
from imager.mounttable import mount_at, mounts
from imager.process import run
from imager.repository import Repository
from imager.unmounting import unmount
from tests.loop.allocation_lab import SHUTDOWN_LOGFLUSH, crash, make_image
from tests.loop.allocation_lab import mounted as mounted_image
from tests.support.commandline import command, imager, imager_alone
from tests.support.disks import MIB, make_gpt, needs_loop, read_at, write_at

pytestmark = needs_loop

BTRFS_SIZE = 128 * MIB
_TIMES = int(os.environ.get("IMAGER_MOUNT_ROUNDS", "3"))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited for: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the disk ``sda``, a clean and a crashed ext4 in it, and its image ``web``."""
    folder = tmp_path_factory.mktemp("mounting")
    disk = make_gpt(folder / "sda", 64 * MIB)
    for offset, size, name in ((MIB, 16 * MIB, "clean"), (20 * MIB, 40 * MIB, "dirty")):
        part = make_image(folder / name, ["mkfs.ext4", "-q", "-F", "-E", "nodiscard"], size)
        with mounted_image(part) as root:
            (root / "hello").write_text(f"from {name}\n")
            (root / "big").write_bytes(bytes(range(256)) * 4096)
            if name == "dirty":
                os.sync()
                (root / "late").mkdir()  # only in the journal
                crash(root, SHUTDOWN_LOGFLUSH)
        write_at(disk, offset, part.read_bytes())
        part.unlink()
    Repository.create(str(folder / "repo"), block_size=64 << 10)
    imager("capture", disk, "--name", "web", "--repo", folder / "repo")
    return folder


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, free of mounts at the end."""
    folder = tmp_path / "at"
    folder.mkdir()
    yield folder
    for _ in range(5):
        if mount_at(folder) is not None:
            with suppress(Exception):
                unmount(folder, lazy=True)


def mount(place: Path, at: Path, *words: object) -> tuple[int, list[Path]]:
    """Mounted; the server's process, and the mount points that it takes."""
    document = imager("mount", "web@latest", at, *words, "--repo", place / "repo", "--json").json
    pid = document["server"]
    points = [m.point for m in mounts() if m.point == at or m.source == f"imager-{pid}"]
    assert len(points) == (2 if words else 1)
    return pid, points


def is_running(pid: int) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def assert_nothing_left(pid: int, points: list[Path]) -> None:
    """Plain umount leaves some of it to be done by others, at their time."""
    wait_until(lambda: not is_running(pid), "the server's end")
    wait_until(lambda: not any(mount_at(point) for point in points), "mounts to go")
    for point in points:
        if point.name.startswith("mount-"):
            wait_until(lambda point=point: not point.exists(), f"{point} to go")
            backed = [
                path.read_text()
                for path in Path("/sys/block").glob("loop*/loop/backing_file")
                if path.exists()
            ]
            assert not [text for text in backed if str(point) in text]


# --- what is shown ---


def test_disks_and_partitions_are_files(place: Path, at: Path) -> None:
    pid, points = mount(place, at)
    assert sorted(path.name for path in at.iterdir()) == ["sda", "sda1", "sda2"]
    sizes = {path.name: path.stat().st_size for path in at.iterdir()}
    assert sizes["sda"] == 64 * MIB and sizes["sda1"] == 16 * MIB
    manifest = Repository.open(str(place / "repo")).find("web@latest")
    with open_disks(lambda: Repository.open(str(place / "repo")), manifest.disks) as disks:
        expected = disks[0].source.pread(0, 64 * MIB)
    assert (at / "sda").read_bytes() == expected
    assert (at / "sda1").read_bytes() == expected[MIB : 17 * MIB]
    assert (at / "sda1").stat().st_mode & 0o777 == 0o400
    with pytest.raises(OSError) as refused, (at / "sda").open("r+b"):
        pass
    assert refused.value.errno == errno.EROFS
    imager("umount", at)
    assert_nothing_left(pid, points)
    assert list(at.iterdir()) == []


def test_a_damaged_block_is_an_error_there_only(place: Path, at: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run(["cp", "-a", str(place), str(copy)])
    noise = os.urandom(256 << 10)
    disk = copy / "noise"
    disk.write_bytes(noise)
    imager("capture", disk, "--name", "web", "--repo", copy / "repo")
    manifest = Repository.open(str(copy / "repo")).find("web@latest")
    repository = Repository.open(str(copy / "repo"))
    third = list(repository.block_map(manifest.disks[0]).runs())[2]
    assert third.place is not None
    pack = repository.pack(third.place.pack)
    entry = pack.entries[third.place.ordinal]
    (path,) = (copy / "repo").rglob(f"{third.place.pack.hex()}*")
    raw = path.read_bytes()
    found = raw.find(noise[3 * 65536 - 1000 : 3 * 65536 - 900])
    assert found > 0 and entry.content_length == 65536
    write_at(path, found, b"\0" * 10)
    mount(copy, at)
    name = manifest.disks[0].name
    assert read_at(at / name, 0, 131072) == noise[:131072]
    assert read_at(at / name, 196608, 65536) == noise[196608:]
    for offset in (131072, 131072 + 40000):
        with pytest.raises(OSError) as failed:
            read_at(at / name, offset, 100)
        assert failed.value.errno == errno.EIO
    imager("umount", at)


def test_a_journal_is_replayed_in_memory(place: Path, at: Path) -> None:
    before = {path: path.read_bytes() for path in (place / "repo").rglob("*") if path.is_file()}
    pid, points = mount(place, at, "--filesystem", "2")
    assert (at / "late").is_dir()
    assert (at / "big").read_bytes() == bytes(range(256)) * 4096
    with pytest.raises(OSError) as refused:
        (at / "new").touch()
    assert refused.value.errno == errno.EROFS
    imager("umount", at)
    assert_nothing_left(pid, points)
    after = {path: path.read_bytes() for path in (place / "repo").rglob("*") if path.is_file()}
    assert before == after


def test_plain_umount_is_enough(place: Path, at: Path) -> None:
    for words in ((), ("--filesystem", "1")):
        pid, points = mount(place, at, *words)
        wait_until(lambda: not run(["umount", str(at)], accept=(0, 32)).returncode, "umount")
        assert_nothing_left(pid, points)


def test_again_and_again(place: Path, at: Path) -> None:
    for number in range(_TIMES):
        words = ("--filesystem", "1") if number % 2 else ()
        pid, points = mount(place, at, *words)
        assert list(at.iterdir())
        imager("umount", at)
        assert_nothing_left(pid, points)


# --- ends that are no clean ones ---


def test_busy_says_who(place: Path, at: Path) -> None:
    pid, points = mount(place, at, "--filesystem", "1")
    with subprocess.Popen(["sleep", "1000"], cwd=at) as user:
        try:
            outcome = imager("umount", at, code=1)
            assert f"sleep ({user.pid})" in outcome.err
            assert "--lazy" in outcome.err
            assert (at / "hello").read_text() == "from clean\n"
            imager("umount", "--lazy", at)
            assert not (at / "hello").exists()
            assert Path(f"/proc/{user.pid}/cwd/hello").read_text() == "from clean\n"
            assert is_running(pid)
        finally:
            user.kill()
    assert_nothing_left(pid, points)


@pytest.mark.alone
@pytest.mark.parametrize("words", [(), ("--filesystem", "1")], ids=["files", "filesystem"])
def test_a_killed_server(place: Path, at: Path, words: tuple[str, ...]) -> None:
    pid, points = mount(place, at, *words)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), "the server's end")
    with pytest.raises(OSError):
        (at / ("sda" if not words else "big")).read_bytes()
    imager("umount", at)
    assert_nothing_left(pid, points)


@pytest.mark.alone
def test_a_killed_mount_command(place: Path, at: Path) -> None:
    """Killed at different times, what it began goes by itself or by umount."""
    for wait in (0.2, 0.6, 1.0, 1.4):
        words = ("mount", "web@latest", at, "--filesystem", "1", "--repo", place / "repo")
        with subprocess.Popen(command(*words), stdout=subprocess.DEVNULL) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            process.kill()
        wait_until(lambda: _settled(at, place / "repo"), "a server that ended, or a mount")
        if mount_at(at) is not None:
            imager("umount", at)
        wait_until(lambda: not _servers_of(place / "repo"), "the server's end")


def _servers_of(repo: Path) -> list[str]:
    """Servers that read from a repository, which no other test uses at this time."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = os.fsdecode(file.read_bytes()).split("\0")
            if f"--repo={repo}" in words and any(word.startswith("--serve-to") for word in words):
                found.append(f"{file.parent.name} {words}")
    return found


def _settled(at: Path, repo: Path) -> bool:
    return mount_at(at) is not None or not _servers_of(repo)


def test_foreground_ends_with_an_interrupt(place: Path, at: Path) -> None:
    words = ("mount", "web@latest", at, "--foreground", "--repo", place / "repo", "--json")
    with subprocess.Popen(command(*words), stdout=subprocess.PIPE) as process:
        wait_until(lambda: mount_at(at) is not None, "the mount")
        wait_until((at / "sda").exists, "its files")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert_nothing_left(json.loads(out)["server"], [at])


def test_refusals(place: Path, at: Path) -> None:
    repo = ("--repo", place / "repo")
    assert "no 3" in imager("mount", "web@latest", at, "--filesystem", "3", *repo, code=1).err
    assert "no folder" in imager("mount", "web@latest", at / "no", *repo, code=2).err
    assert "not empty" in imager("mount", "web@latest", place, *repo, code=2).err
    assert "nothing is mounted" in imager("umount", at, code=2).err
    run(["mount", "-t", "tmpfs", "tmpfs", str(at)])
    try:
        assert "not mounted by imager" in imager("umount", at, code=2).err
        assert "mounted at" in imager("mount", "web@latest", at, *repo, code=2).err
    finally:
        run(["umount", str(at)])
    assert not [m for m in mounts() if m.source == "imager-view" and m.point == at]


def test_a_btrfs_whose_source_is_mounted(tmp_path: Path, at: Path, repo: Path) -> None:
    """The kernel knows a Btrfs by its id: the copy is refused, the source left alone."""
    image = make_image(tmp_path / "b", ["mkfs.btrfs", "-q", "-f", "-K"], BTRFS_SIZE)
    imager("capture", image, "--name", "web", "--repo", repo)
    with mounted_image(image, "loop,ro") as source:
        words = ("mount", "web@latest", at, "--filesystem", "b", "--repo", repo)
        outcome = imager_alone(*words, code=1)
        assert "is mounted on this machine" in outcome.err
        assert source.is_mount()
        wait_until(lambda: not _servers_of(repo), "the server's end")
