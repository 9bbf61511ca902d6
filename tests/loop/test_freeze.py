"""Freezing mounted filesystems, and thawing them whatever happens to the one that froze them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from imager.deviceuse import live_filesystems
from imager.errors import ImagerError
from imager.freeze import FreezeLost, frozen, written_here
from imager.freezewatch import FITHAW
from imager.loopdevice import loop_device
from tests.support.commandline import CHECKOUT
from tests.support.disks import MIB, make_file, make_filesystem, make_sparse, mounted, needs_loop

pytestmark = needs_loop

FIFREEZE = 0xC0045877
SIZE = {"ext4": 32 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}
PATIENCE = 60

# Freezes what it is told to, says so, and waits for its end.
FREEZER = """
import sys
from imager.deviceuse import live_filesystems
from imager.freeze import frozen
with frozen(live_filesystems(sys.argv[1:]), limit_seconds=3600):
    print("frozen", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A mounted filesystem: its device and its folder."""
    with (
        made(tmp_path / "disk.img", request.param) as device,
        mounted(device, tmp_path / "m") as at,
    ):
        yield device, at


def made(image: Path, kind: str) -> AbstractContextManager[str]:
    make_sparse(image, SIZE[kind])
    make_filesystem(image, kind)
    return loop_device(str(image))


def is_frozen(folder: Path) -> bool:
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FIFREEZE, 0)
    except OSError as error:
        assert error.errno == errno.EBUSY
        return True
    else:
        fcntl.ioctl(fd, FITHAW, 0)
        return False
    finally:
        os.close(fd)


def write_through(folder: Path) -> None:
    """In a process of its own, which a frozen filesystem would hold."""
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={folder}/new", "bs=4096", "count=1", "conv=fsync"],
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )


def test_frozen_for_a_while(live: tuple[str, Path]) -> None:
    device, folder = live
    (found,) = live_filesystems([device])
    assert found.points == (str(folder),)
    writer = threading.Thread(target=write_through, args=[folder])
    with frozen([found]) as freeze:
        assert is_frozen(folder)
        writer.start()
        assert (freeze.frozen, freeze.synced) == ([str(folder)], [])
    assert not is_frozen(folder)
    writer.join(PATIENCE)
    assert (folder / "new").stat().st_size == 4096


def test_an_end_before_the_end(live: tuple[str, Path]) -> None:
    device, folder = live
    with frozen(live_filesystems([device])) as freeze:
        freeze.end()
        write_through(folder)


def test_a_failure_thaws(live: tuple[str, Path]) -> None:
    device, folder = live
    with pytest.raises(ZeroDivisionError), frozen(live_filesystems([device])):
        raise ZeroDivisionError
    write_through(folder)


def test_after_kill_9_it_is_thawed(live: tuple[str, Path]) -> None:
    device, folder = live
    process = subprocess.Popen(
        [sys.executable, "-c", FREEZER, device],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"frozen\n"
        assert is_frozen(folder)
        os.killpg(process.pid, signal.SIGKILL)
    write_through(folder)


def test_after_the_limit_it_is_thawed(live: tuple[str, Path]) -> None:
    device, folder = live
    found = live_filesystems([device])
    lost = pytest.raises(FreezeLost, match="did not stay frozen")
    with lost, frozen(found, limit_seconds=0.5):
        write_through(folder)


def test_frozen_by_another(live: tuple[str, Path]) -> None:
    """It stays the other's."""
    device, folder = live
    with frozen(live_filesystems([device])):
        with (
            pytest.raises(ImagerError, match="cannot be frozen"),
            frozen(live_filesystems([device])),
        ):
            raise AssertionError
        assert is_frozen(folder)


def test_a_filesystem_in_a_file_of_another(tmp_path: Path) -> None:
    """The inner one first: its last writes have to reach the outer one."""
    with (
        made(tmp_path / "outer.img", "ext4") as outer,
        mounted(outer, tmp_path / "outer") as below,
        loop_device(str(make_file(below / "inner.img", 8 * MIB))) as inner,
    ):
        make_filesystem(inner, "ext2")
        with mounted(inner, tmp_path / "inner") as above, mounted(inner, tmp_path / "again"):
            found = live_filesystems([outer])
            assert [each.points[0] for each in found] == [str(above), str(below)]
            with frozen(found):
                assert is_frozen(above)
                assert is_frozen(below)
            write_through(above)
            assert written_here(found, str(above / "repo" / "x")) == [
                f"the repository {above}/repo/x lies on {each}" for each in (above, below)
            ]
            assert written_here(found, str(tmp_path)) == []
