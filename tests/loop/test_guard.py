"""imager guard: an image, a command, checks, and the way back."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from imager.repository import Repository
from tests.support.commandline import CHECKOUT, Outcome, command, imager, imager_alone
from tests.support.disks import (
    MIB,
    digest,
    loop_disk,
    make_file,
    make_filesystem,
    make_gpt,
    needs_loop,
    unmount,
)

pytestmark = needs_loop

SPOIL = ["dd", "if=/dev/zero", "bs=1M", "count=2", "seek=4", "conv=notrunc,fsync", "status=none"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_gpt(tmp_path / "server.img", 32 * MIB)


def guard(repo: Path, disk: Path, *words: object, code: int = 0) -> Outcome:
    return imager_alone("guard", "--repo", repo, "--disk", disk, *words, code=code)


def spoiling(disk: Path, then: str = "exit 3") -> list[str]:
    """A command that changes the disk, then fails."""
    spoil = " ".join([*SPOIL, f"of={disk}"])
    return ["--", "sh", "-c", f"{spoil}; echo it was said; {then}"]


def pinned(repo: Path) -> int:
    return len(Repository.open(str(repo)).pins())


def test_a_change_that_works(repo: Path, disk: Path) -> None:
    before = digest(disk)
    outcome = guard(repo, disk, "--check", "true", *spoiling(disk, "exit 0"))
    assert outcome.out == "it was said\n"
    assert digest(disk) != before
    assert pinned(repo) == 0
    (image,) = imager("list", "--repo", repo, "--json").json
    assert image["note"].startswith("before: sh -c ")


def test_a_change_that_fails_is_kept_unless_told_otherwise(repo: Path, disk: Path) -> None:
    """Without a terminal nobody is asked, and nothing is done silently."""
    before = digest(disk)
    outcome = guard(repo, disk, *spoiling(disk), code=1)
    assert "imager: exit code 3 from: sh -c" in outcome.err
    assert digest(disk) != before
    assert pinned(repo) == 1
    (image,) = imager("list", "--repo", repo, "--json").json
    words = ["rollback", image["id"], str(disk)]
    assert f"imager {' '.join(words)}" in outcome.err
    imager(*words, "--yes", "--repo", repo)
    assert digest(disk) == before


def test_the_way_back(repo: Path, disk: Path) -> None:
    before = digest(disk)
    outcome = guard(repo, disk, "--on-failure", "rollback", "--json", *spoiling(disk), code=1)
    assert outcome.json["done"] == "rolled back"
    assert outcome.json["failure"].startswith("exit code 3 from: ")
    assert "it was said" in outcome.err
    assert digest(disk) == before
    assert pinned(repo) == 0


def test_a_check_that_fails(repo: Path, disk: Path) -> None:
    before = digest(disk)
    options = ["--check", "true", "--check", "sh -c 'exit 7'", "--on-failure", "rollback"]
    outcome = guard(repo, disk, *options, *spoiling(disk, "exit 0"), code=1)
    assert "the check failed, exit code 7 from: sh -c 'exit 7'" in outcome.err
    assert "the disk is what it was before" in outcome.err
    assert digest(disk) == before


def test_a_check_that_takes_a_while(repo: Path, disk: Path, tmp_path: Path) -> None:
    """A service comes up at the third look."""
    seen = tmp_path / "seen"
    check = f"sh -c 'echo >>{seen}; test $(wc -l <{seen}) = 3'"
    guard(repo, disk, "--check", check, "--check-within", "60", *spoiling(disk, "exit 0"))
    assert seen.read_text() == "\n\n\n"


def test_nothing_to_run(repo: Path, disk: Path) -> None:
    outcome = guard(repo, disk, "--", "no-such-command", code=1)
    assert "no-such-command is not installed" in outcome.err
    assert pinned(repo) == 0
    assert "--on-failure" in guard(repo, disk, "--on-failure", "x", "--", "true", code=2).err


def test_no_image_no_change(repo: Path, disk: Path, tmp_path: Path) -> None:
    before = digest(disk)
    missing = tmp_path / "missing.img"
    guard(repo, missing, *spoiling(disk), code=1)
    assert digest(disk) == before
    assert not missing.exists()


@pytest.mark.parametrize(("answer", "is_back"), [("r", True), ("", False)])
def test_a_person_is_asked(repo: Path, disk: Path, answer: str, is_back: bool) -> None:
    before = digest(disk)
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            command("guard", "--repo", repo, "--disk", disk, *spoiling(disk)),
            cwd=CHECKOUT,
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.write(ours, f"{answer}\n".encode())
        _, err = process.communicate(timeout=120)
    finally:
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 1, err
    assert "Roll back, or keep it as it is? [r/k]" in err
    assert (digest(disk) == before) is is_back
    assert pinned(repo) == (0 if is_back else 1)


def test_a_disk_in_use_is_not_rolled_back(repo: Path, tmp_path: Path) -> None:
    """Nor at the next start of this machine: the disk has nothing that it could be known by."""
    backing = make_file(tmp_path / "server.img", 64 * MIB)
    folder = tmp_path / "mnt"
    folder.mkdir()
    with loop_disk(backing) as device:
        make_filesystem(device, "ext4")
        try:
            change = f"mount {device} {folder} && exit 3"
            words = ["--name", "server", "--on-failure", "rollback", "--", "sh", "-c", change]
            outcome = guard(repo, Path(device), *words, code=1)
            assert f"is mounted at {folder}" in outcome.err
            assert "neither serial number, WWN nor partition table" in outcome.err
            assert "the image is pinned" in outcome.err
            assert pinned(repo) == 1
        finally:
            unmount(folder)


def test_ctrl_c_is_for_the_command(repo: Path, disk: Path) -> None:
    """The terminal sends it to both; imager waits for what the command makes of it."""
    outcome = guard(repo, disk, "--", "sh", "-c", "kill -INT $PPID; exit 4", code=1)
    assert "exit code 4 from: sh" in outcome.err and "the image is pinned" in outcome.err
