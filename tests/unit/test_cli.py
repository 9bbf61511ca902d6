"""The command line: exit codes, JSON, settings, questions, and what people mistype."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import re
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest

from imager.format import seal
from imager.repository import Repository
from imager.units import parse_size
from tests.support.commandline import CHECKOUT, command, finish, imager, start
from tests.support.disks import MIB, digest, make_file, make_random, make_sparse
from tests.support.fusefile import faulty_file


@pytest.fixture
def images(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two images of a file of 2 MiB that changed in between; the ids, oldest first."""
    ids = []
    source = make_random(tmp_path / "web1.img", 2 * MIB)
    for second, note in enumerate(("before", "after")):
        image_id = f"20200101t00000{second}z-0000000{second}"  # real ones would need a pause
        monkeypatch.setattr("imager.capture.new_image_id", lambda image_id=image_id: image_id)
        ids.append(
            imager("capture", source, "--repo", repo, "--note", note, "--json").json["image"]
        )
        with source.open("r+b") as file:
            file.seek(MIB)
            file.write(b"changed")
    return ids


# --- every command's JSON ---


def test_json_of_every_command(repo: Path, tmp_path: Path, images: list[str]) -> None:
    first, second = images
    source, target = tmp_path / "web1.img", tmp_path / "restored.img"

    def run(*words: object, code: int = 0) -> Any:
        outcome = imager(*words, "--repo", repo, "--json", code=code)
        assert outcome.err == ""
        return outcome.json

    assert [item["id"] for item in run("list")] == images
    assert [item["note"] for item in run("list", "--name", "web1")] == ["before", "after"]
    assert run("list", "--name", "other") == []
    shown = run("show", first)
    assert (shown["id"], shown["name"], shown["disks"][0]["size"]) == (first, "web1", 2 * MIB)
    assert run("show", "web1@latest")["previous"] == first
    assert run("map", first) == {"used": 2 * MIB, "zero": 0, "unused": 0, "unreadable": 0}
    changes = run("diff", first, second)
    assert changes["changed_bytes"] == 64 << 10
    assert [item["offset"] for item in changes["changes"]] == [MIB]
    assert run("verify")["sound"] is True
    assert run("verify", first, "--quick")["images"] == 1
    (plan,) = run("plan", first, target)
    assert (plan["refusals"], plan["data_bytes"], plan["target_exists"]) == ([], 2 * MIB, False)
    (result,) = run("restore", first, target, "--yes")
    assert (result["written_bytes"], result["missing"]) == (2 * MIB, [])
    (refused,) = run("plan", first, make_file(tmp_path / "small", MIB), code=4)
    assert len(refused["refusals"]) == 1
    assert run("repo", "stats")["images"] == 2
    assert imager("inspect", source, "--json").json["size"] == 2 * MIB
    assert run("rm", first, "--yes") == {"removed": [first]}
    assert imager("repo", "init", "--repo", tmp_path / "new", "--json").json["block_size"] > 0


def test_text_of_every_command(repo: Path, tmp_path: Path, images: list[str]) -> None:
    first, second = images

    def run(*words: object) -> str:
        return imager(*words, "--repo", repo).out

    assert all(id in run("list") for id in images)
    assert "root digest" in run("show", f"{first}/web1")
    assert "used 2.0 MiB" in run("map", first)
    assert "64.0 KiB in 1 range" in run("diff", first, second)
    assert "all sound" in run("verify")
    assert "a new file" in run("plan", first, tmp_path / "new.img")
    assert "2.0 MiB written" in run("restore", first, tmp_path / "new.img", "--yes")
    assert "2 images" in run("repo", "stats")
    assert "a capture reads 2.0 MiB" in imager("inspect", tmp_path / "web1.img").out
    picture = tmp_path / "map.svg"
    assert str(picture) in run("map", first, "--svg", picture)
    assert picture.read_text().startswith("<svg ")
    assert "1 image" in run("rm", first, "--yes")
    assert first not in run("list")


def test_an_image_is_named_by_prefix_name_and_disk(repo: Path, images: list[str]) -> None:
    first, second = images
    for text in (second, second[:-1], "web1@latest", f"{second}/web1"):
        assert imager("show", text, "--repo", repo, "--json").json["id"] == second
    outcome = imager("show", "20200101t", "--repo", repo, code=2)
    assert first in outcome.err and second in outcome.err
    assert "has no disk sdz" in imager("show", f"{first}/sdz", "--repo", repo, code=1).err
    assert "only NAME@latest" in imager("show", "web1@newest", "--repo", repo, code=2).err


# --- what people mistype ---

SILLY = {
    "a missing source": (1, "capture {none} --repo {repo}"),
    "a folder as a source": (1, "capture {folder} --repo {repo}"),
    "an empty source": (1, "capture {empty} --repo {repo}"),
    "a character device as a source": (1, "capture /dev/null --repo {repo}"),
    "no source": (2, "capture --repo {repo}"),
    "sources and all disks": (2, "capture {file} --all-disks --repo {repo}"),
    "a source twice": (2, "capture {file} {file} --repo {repo}"),
    "a source twice in two ways": (2, "capture {file} {folder}/../file --repo {repo}"),
    "a silly name": (2, "capture {file} --name a/b --repo {repo}"),
    "an empty name": (2, "capture {file} --name= --repo {repo}"),
    "a level too high": (2, "capture {file} --level 77 --repo {repo}"),
    "a level that is no number": (2, "capture {file} --level high --repo {repo}"),
    "an unknown consistency": (2, "capture {file} --consistency often --repo {repo}"),
    "a repository that is no folder": (1, "capture {file} --repo {file}"),
    "a repository in a file": (1, "list --repo {file}"),
    "an empty folder as a repository": (1, "capture {file} --repo {folder}"),
    "no repository": (1, "list --repo {none}"),
    "an unknown kind of repository": (2, "list --repo gopher://host/x"),
    "an unknown image": (1, "show 2020 --repo {repo}"),
    "an unknown name": (1, "show web9@latest --repo {repo}"),
    "an empty image": (2, "show --repo {repo} -- {blank}"),
    "a disk where an image belongs": (2, "verify web1@latest/web1 --repo {repo}"),
    "an image to remove that is unknown": (1, "rm 2020 --yes --repo {repo}"),
    "a path as an image": (1, "show ../../etc/passwd --repo {repo}"),
    "a diff with nothing": (2, "diff web1@latest --repo {repo}"),
    "a block size too small": (2, "repo init --block-size 1 --repo {none}"),
    "a block size that is no power": (2, "repo init --block-size 96K --repo {none}"),
    "a block size that is no size": (2, "repo init --block-size big --repo {none}"),
    "a negative block size": (2, "repo init --block-size=-64K --repo {none}"),
    "a repository over a repository": (1, "repo init --repo {repo}"),
    "an unknown command": (2, "captuer {file}"),
    "an unknown option": (2, "list --repos {repo}"),
    "an unknown progress": (2, "verify --progress loud --repo {repo}"),
    "no target": (2, "restore web1@latest --yes --repo {repo}"),
    "two targets for one disk": (2, "restore web1@latest {none} {none}2 --yes --repo {repo}"),
    "a target in no folder": (1, "restore web1@latest {none}/x --yes --repo {repo}"),
    "a folder as a target": (4, "restore web1@latest {folder} --yes --repo {repo}"),
    "a character device as a target": (4, "restore web1@latest /dev/null --yes --repo {repo}"),
    "a partition that is not there": (2, "restore web1@latest {none} --partition 7 --repo {repo}"),
    "a partition of no number": (2, "restore web1@latest {none} --partition x --repo {repo}"),
    "a small target": (4, "restore web1@latest {file} --yes --repo {repo}"),
    "a missing file to inspect": (1, "inspect {none}"),
    "a folder to inspect": (1, "inspect {folder}"),
    "a picture in no folder": (1, "map web1@latest --svg {none}/x.svg --repo {repo}"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("silly")
    repo = folder / "repo"
    Repository.create(str(repo))
    imager("capture", make_file(folder / "web1.img", MIB), "--repo", repo)
    (folder / "folder").mkdir()
    return {
        "repo": str(repo),
        "none": str(folder / "none"),
        "folder": str(folder / "folder"),
        "empty": str(make_file(folder / "empty", 0)),
        "file": str(make_file(folder / "file", 5000)),
        "blank": "",
    }


@pytest.mark.parametrize("what", SILLY)
def test_silly_input(places: dict[str, str], what: str) -> None:
    code, line = SILLY[what]
    words = [word.format(**places) for word in line.split()]
    before = digest(places["file"])
    outcome = imager(*words, code=code)
    assert outcome.err.startswith("imager: ")
    assert "internal error" not in outcome.err
    assert "Errno" not in outcome.err, "the message of an exception is none for people"
    head, _, tail = line.partition(" -- ")
    words = [word.format(**places) for word in f"{head} --json".split()] + (
        ["--", ""] if tail else []
    )
    error = imager(*words, code=code).json["error"]
    assert (error["exit_code"], error["message"] in outcome.err) == (code, True)
    assert digest(places["file"]) == before
    assert not Path(places["none"]).exists()


def test_help_and_version() -> None:
    assert re.match(r"imager \d", imager("--version").out)
    for words in (
        ["--help"],
        ["-h"],
        ["capture", "-h"],
        ["repo", "--help"],
        ["repo", "init", "-h"],
    ):
        assert "Usage: imager" in imager(*words).out
    codes = re.findall(r"\d+", imager("--help").out)
    assert {"0", "1", "2", "3", "4", "5", "130"} <= set(codes)


@pytest.mark.parametrize(
    ("text", "size"),
    [("262144", 262144), ("256K", 262144), ("1MiB", MIB), ("0.5m", MIB // 2), (" 64kb ", 65536)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


# --- damaged repositories ---


def change_description(repo: Path, **values: object) -> None:
    path = repo / "repository.json"
    document = json.loads(path.read_bytes())
    document.pop("seal")
    path.chmod(0o600)
    path.write_bytes(seal({**document, **values}))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1]", b"null", b"{" * 5000])
def test_a_damaged_description(repo: Path, content: bytes) -> None:
    path = repo / "repository.json"
    path.chmod(0o600)
    path.write_bytes(content)
    source = make_file(path.with_name("source.img"), 1)
    for words in (["list"], ["verify"], ["capture", source]):
        outcome = imager(*words, "--repo", repo, code=3)
        assert "repository.json" in outcome.err


def test_one_changed_byte_in_the_description(repo: Path) -> None:
    path = repo / "repository.json"
    path.chmod(0o600)
    content = path.read_bytes()
    for at in random.Random(1).sample(range(len(content)), 20):
        path.write_bytes(content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :])
        assert "repository.json" in imager("list", "--repo", repo, code=3).err


def test_a_newer_repository_is_refused_by_name(repo: Path, tmp_path: Path) -> None:
    change_description(repo, format=2)
    assert "2" in imager("list", "--repo", repo, code=1).err
    change_description(repo, format=1, features=["encryption-9"])
    outcome = imager("capture", make_file(tmp_path / "x.img", 1), "--repo", repo, code=1)
    assert "encryption-9" in outcome.err


def test_an_impossible_block_size(repo: Path) -> None:
    for size in (0, -1, 1 << 40, "64K", None):
        change_description(repo, block_size=size)
        imager("list", "--repo", repo, code=3)


def test_damage_is_listed_with_exit_code_3(repo: Path, images: list[str]) -> None:
    pack = max(repo.glob("packs/*/*.pack"), key=lambda path: path.stat().st_size)
    pack.chmod(0o600)
    content = bytearray(pack.read_bytes())
    content[len(content) // 4] ^= 1  # in a block that both images share
    pack.write_bytes(content)
    result = imager("verify", "--repo", repo, "--json", code=3).json
    assert result["sound"] is False
    assert {fault["image"] for fault in result["faults"]} == set(images)
    text = imager("verify", "--repo", repo, code=3).out
    assert f"DAMAGED {images[0]}/web1" in text and "at byte" in text
    assert imager("verify", "--quick", "--repo", repo).code == 0
    pack.unlink()
    imager("verify", "--quick", "--repo", repo, code=3)


def test_a_damaged_manifest_hides_no_other_image(repo: Path, images: list[str]) -> None:
    path = repo / "manifests" / f"{images[0]}.json"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-20])
    assert imager("show", images[1], "--repo", repo, "--json").json["id"] == images[1]
    assert imager("verify", images[1], "--repo", repo).code == 0
    assert images[0] in imager("verify", "--repo", repo, code=3).out
    assert images[0] in imager("list", "--repo", repo, code=3).err


def test_a_damaged_manifest_is_no_part_of_the_json(repo: Path, images: list[str]) -> None:
    path = repo / "manifests" / f"{images[0]}.json"
    path.chmod(0o600)
    path.write_bytes(b"nothing")
    outcome = imager("list", "--repo", repo, "--json", code=3)
    assert [item["id"] for item in outcome.json] == [images[1]]
    assert images[0] in outcome.err


def test_an_image_is_removed_once(repo: Path, images: list[str]) -> None:
    imager("rm", images[0], images[0], "--yes", "--repo", repo)
    assert images[0] in imager("rm", images[0], "--yes", "--repo", repo, code=1).err
    assert imager("list", "--repo", repo, "--json").json[0]["id"] == images[1]


# --- settings ---


def test_flag_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flag", "environment", "file"):
        Repository.create(str(tmp_path / name))
    config = tmp_path / "imager.toml"
    config.write_text(f'repo = "{tmp_path}/file"\n')

    def used(*words: str) -> str:
        return Path(imager("repo", "stats", "--json", *words).json["repository"]).name

    monkeypatch.setenv("IMAGER_CONFIG", str(config))
    assert used() == "file"
    monkeypatch.setenv("IMAGER_REPO", str(tmp_path / "environment"))
    assert used() == "environment"
    assert used("--repo", str(tmp_path / "flag")) == "flag"
    monkeypatch.setenv("IMAGER_REPO", "")
    assert used() == "file"


@pytest.mark.parametrize("content", [b"repo = 5", b"repo = ", b"\xff", b"repo = ['a']"])
def test_a_damaged_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    config = tmp_path / "imager.toml"
    config.write_bytes(content)
    monkeypatch.setenv("IMAGER_CONFIG", str(config))
    assert str(config) in imager("list", code=2).err


def test_a_new_repository_is_made_only_where_nothing_is(tmp_path: Path) -> None:
    """An empty folder may be the mount point of a backup disk that is not mounted."""
    source = make_file(tmp_path / "x.img", 5000)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "not a repository" in imager("capture", source, "--repo", empty, code=1).err
    assert list(empty.iterdir()) == []
    imager("capture", source, "--repo", empty, "--init")
    imager("capture", source, "--repo", tmp_path / "new")
    assert len(imager("list", "--repo", tmp_path / "new", "--json").json) == 1


# --- progress ---


def test_progress_as_json_lines(repo: Path, tmp_path: Path) -> None:
    source, target = make_random(tmp_path / "x.img", 3 * MIB), tmp_path / "y.img"
    for words, labels in (
        (["capture", source], ["capturing x"]),
        (
            ["restore", "x@latest", target, "--yes", "--read-back"],
            ["restoring x", "reading back x"],
        ),
    ):
        outcome = imager(*words, "--repo", repo, "--progress", "json", "--json")
        assert outcome.json
        lines = [json.loads(line) for line in outcome.err.splitlines()]
        assert list(dict.fromkeys(line["label"] for line in lines)) == labels
        for label in labels:
            mine = [line for line in lines if line["label"] == label]
            assert mine[0]["done"] == 0
            assert mine[-1]["done"] == mine[-1]["total"] >= 3 * MIB
            assert all(set(line) == {"label", "done", "total", "seconds"} for line in mine)


def test_progress_of_verify_reaches_its_total(repo: Path, images: list[str]) -> None:
    outcome = imager("verify", "--repo", repo, "--progress", "json")
    last = json.loads(outcome.err.splitlines()[-1])
    assert last["done"] == last["total"]


def test_no_progress_without_a_terminal(repo: Path, tmp_path: Path) -> None:
    for mode in ("auto", "none"):
        source = make_file(tmp_path / "x.img", MIB)
        assert imager("capture", source, "--repo", repo, "--progress", mode).err == ""


# --- questions ---


def converse(answer: str, *words: object, split: bool = False) -> tuple[int, str, str]:
    """Run with a terminal as standard input (and output, unless ``split``), type an answer.

    Returns the exit code, what the terminal showed, and standard output when it is split off.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("=HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        command(*words),
        cwd=CHECKOUT,
        stdin=slave,
        stdout=subprocess.PIPE if split else slave,
        stderr=slave,
        text=True,
    )
    os.close(slave)
    os.write(master, f"{answer}\n".encode())
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:  # the other side of the terminal was closed
        pass
    os.close(master)
    out, _ = process.communicate(timeout=30)
    return process.returncode, shown.decode(), out or ""


def test_without_a_terminal_nothing_is_overwritten(
    repo: Path, tmp_path: Path, images: list[str]
) -> None:
    target = make_file(tmp_path / "target", 3 * MIB)
    before = digest(target)
    outcome = imager("restore", images[0], target, "--repo", repo, code=4)
    assert "--yes" in outcome.err
    assert digest(target) == before
    assert "--yes" in imager("rm", images[0], "--repo", repo, code=4).err
    assert len(imager("list", "--repo", repo, "--json").json) == 2


def test_the_name_of_the_target_has_to_be_typed(
    repo: Path, tmp_path: Path, images: list[str]
) -> None:
    target = make_file(tmp_path / "target", 2 * MIB)
    before = digest(target)
    for wrong in ("yes", "", f"{target}x"):
        code, shown, _ = converse(wrong, "restore", images[0], target, "--repo", repo)
        assert code == 4
        assert "was not typed" in shown
        assert digest(target) == before
    code, shown, _ = converse(str(target), "restore", images[1], target, "--repo", repo)
    assert code == 0, shown
    assert f"Type {target} to overwrite it" in shown
    assert "2.0 MiB written" in shown
    assert digest(target) == digest(tmp_path / "web1.img") or digest(target) != before


def test_removing_asks(repo: Path, images: list[str]) -> None:
    assert converse("n", "rm", images[0], "--repo", repo)[0] == 4
    assert len(imager("list", "--repo", repo, "--json").json) == 2
    assert converse("y", "rm", images[0], "--repo", repo)[0] == 0
    assert len(imager("list", "--repo", repo, "--json").json) == 1


def test_a_question_is_no_part_of_the_json(repo: Path, tmp_path: Path, images: list[str]) -> None:
    target = make_file(tmp_path / "target", 2 * MIB)
    code, _, out = converse(
        str(target), "restore", images[0], target, "--repo", repo, "--json", split=True
    )
    assert code == 0
    assert json.loads(out)[0]["target"] == str(target)


def test_bars_on_a_terminal(repo: Path, tmp_path: Path) -> None:
    source = make_random(tmp_path / "x.img", 3 * MIB)
    code, shown, _ = converse("", "capture", source, "--repo", repo)
    assert code == 0
    assert "capturing x: 100%" in shown


# --- the shell ---


def test_completion_of_bash() -> None:
    script = finish(start("--show-completion")).out
    if "_imager_completion" not in script:
        pytest.skip(f"the shell that runs this is not known to typer: {script[:80]!r}")
    completed = subprocess.run(
        command(),
        cwd=CHECKOUT,
        env={
            **os.environ,
            "_IMAGER_COMPLETE": "complete_bash",
            "COMP_WORDS": "imager re",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"restore", "repo"} <= set(completed.stdout.split())


def test_a_reader_that_goes_away_is_no_traceback(repo: Path, images: list[str]) -> None:
    process = start("show", images[0], "--repo", repo, "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(30) in (0, 1)


# --- holes ---


def test_an_image_with_holes_says_so_everywhere(repo: Path, tmp_path: Path) -> None:
    with faulty_file(make_random(tmp_path / "old.img", 2 * MIB), bad=[(MIB + 512, 1024)]) as source:
        outcome = imager("capture", source, "--repo", repo, code=5)
    assert f"UNREADABLE 1024 bytes at byte {MIB + 512}" in outcome.out
    assert "PARTIAL" in imager("list", "--repo", repo).out
    shown = imager("show", "disk@latest", "--repo", repo).out
    assert "PARTIAL" in shown and f"unreadable: 1024 bytes at byte {MIB + 512}" in shown
    assert imager("map", "disk@latest", "--repo", repo, "--json").json["unreadable"] == 64 << 10
    assert "could not be read" in imager("plan", "disk@latest", tmp_path / "t", "--repo", repo).out
    outcome = imager("restore", "disk@latest", tmp_path / "t", "--yes", "--repo", repo, code=5)
    assert "MISSING: 1024 bytes" in outcome.out
    assert imager("verify", "--repo", repo).code == 0


def test_a_huge_empty_file_is_quick(repo: Path, tmp_path: Path) -> None:
    source = make_sparse(tmp_path / "huge.img", 1 << 40)
    shown = imager("capture", source, "--repo", repo, "--json").json
    assert shown["statistics"]["read_bytes"] == 0
    assert imager("map", "huge@latest", "--repo", repo, "--json").json["zero"] == 1 << 40
    imager("restore", "huge@latest", tmp_path / "back.img", "--yes", "--repo", repo)
    assert (tmp_path / "back.img").stat().st_size == 1 << 40
