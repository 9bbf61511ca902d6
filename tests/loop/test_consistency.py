"""Captures of mounted filesystems while they are written: what was safe by then is in the image."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.loopdevice import loop_device
from tests.support.commandline import imager
from tests.support.disks import (
    MIB,
    check_filesystem,
    make_filesystem,
    make_sparse,
    mounted,
    needs_loop,
)

pytestmark = needs_loop

SIZE = {"ext4": 64 * MIB, "xfs": 320 * MIB}


@contextlib.contextmanager
def written(folder: Path) -> Iterator[None]:
    """Files come and go there until the block ends."""
    ended = threading.Event()

    def write() -> None:
        n = 0
        while not ended.is_set():
            path = folder / f"busy-{n % 50}"
            path.unlink(missing_ok=True)
            path.write_bytes(os.urandom(20000))
            n += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def save(path: Path, content: bytes) -> None:
    """As a mail server would: it is safe when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("kind", SIZE)
@pytest.mark.parametrize(("asked", "found"), [("freeze", "frozen"), ("track", "tracked")])
def test_a_filesystem_under_a_writer(
    repo: Path, tmp_path: Path, kind: str, asked: str, found: str
) -> None:
    source, target = make_sparse(tmp_path / "a.img", SIZE[kind]), tmp_path / "b.img"
    make_filesystem(source, kind)
    words = ["--name", "x", "--consistency", asked, "--repo", repo, "--json"]
    with loop_device(str(source)) as device, mounted(device, tmp_path / "mnt") as folder:
        with written(folder):
            for n in range(20):
                save(folder / f"safe-{n}", bytes([n]) * 30000)
            taken = imager("capture", device, *words).json
        assert taken["consistency"] == found
        assert taken["freeze"]["filesystems"] == [str(folder)]
        assert ("tracked" in taken) == (found == "tracked")
    assert f"{found}, frozen for " in imager("show", taken["id"], "--repo", repo).out
    imager("restore", taken["id"], target, "--yes", "--repo", repo)
    # without a replay: the journal has nothing that the filesystem lacks
    options = "ro,noload" if kind == "ext4" else "ro,norecovery"
    with loop_device(str(target)) as device:
        if kind == "ext4":
            check_filesystem(device, kind)
        with mounted(device, tmp_path / "copy", options) as copy:
            for n in range(20):
                assert (copy / f"safe-{n}").read_bytes() == bytes([n]) * 30000
        if kind == "xfs":
            # but for the superblock's counters, which XFS leaves to its log when it is frozen
            with mounted(device, tmp_path / "copy"):
                pass
            check_filesystem(device, kind)


def test_a_repository_on_what_would_be_frozen(repo: Path, tmp_path: Path) -> None:
    source = make_sparse(tmp_path / "a.img", SIZE["ext4"])
    make_filesystem(source, "ext4")
    with loop_device(str(source)) as device, mounted(device, tmp_path / "mnt") as folder:
        inside = folder / "images"
        words = ["capture", device, "--name", "x", "--init", "--repo", inside]
        outcome = imager(*words, "--consistency", "freeze", code=4)
        assert f"no freeze: the repository {inside} lies on {folder}" in outcome.err
        assert imager("list", "--repo", inside, "--json").json == []
        # what is read within the freeze is kept in memory
        assert imager(*words, "--consistency", "track", "--json").json["consistency"] == "tracked"


def test_hooks_run_around_the_freeze(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGER_CONFIG", str(tmp_path / "etc" / "imager.toml"))
    hooks, log = tmp_path / "etc" / "hooks.d", tmp_path / "log"
    hooks.mkdir(parents=True)
    hook = hooks / "10-log"
    hook.write_text(f'#!/bin/sh\necho "$1 $IMAGER_NAME" >>{log}\n')
    hook.chmod(0o755)
    source = make_sparse(tmp_path / "a.img", SIZE["ext4"])
    make_filesystem(source, "ext4")
    words = ["--name", "x", "--consistency", "freeze", "--repo", repo, "--json"]
    with loop_device(str(source)) as device, mounted(device, tmp_path / "mnt"):
        taken = imager("capture", device, *words).json
        assert log.read_text().split() == ["before", "x", "quiesce", "x", "thaw", "x", "after", "x"]
        assert [each["point"] for each in taken["hooks"]] == ["before", "quiesce", "thaw"]
        log.unlink()
        hook.write_text(f'#!/bin/sh\necho "$1" >>{log}\ntest "$1" != quiesce\n')
        outcome = imager("capture", device, *words, code=1)
        assert "no image was taken: hook 10-log, quiesce" in outcome.err
        assert log.read_text().split() == ["before", "quiesce", "thaw", "failed"]
    assert len(imager("list", "--repo", repo, "--json").json) == 1
