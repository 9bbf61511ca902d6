"""imager prove, boot and commit: wrong usage, and what cannot be tried here."""

from __future__ import annotations

from pathlib import Path

import pytest

from imager import prove
from imager.proofs import latest_proofs
from imager.repository import Repository
from tests.support.commandline import imager
from tests.support.disks import make_random


@pytest.fixture
def image(repo: Path, tmp_path: Path) -> str:
    disk = make_random(tmp_path / "disk.img", 200_000)
    made: str = imager("capture", disk, "--repo", repo, "--json").json["image"]
    return made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sign", "ping"], "login, target=NAME"),
        (["--sign", "port=0"], "1 to 65535"),
        (["--firmware", "coreboot"], "bios, uefi, secureboot"),
        (["--memory", "16M"], "64 MiB"),
        (["--memory", "much"], "not a size"),
        (["--network", "all"], "none, isolated, user"),
        (["--user", "root"], "--password-file"),
        (["--accel", "hvf"], "auto, kvm, tcg"),
    ],
)
def test_prove_wrongly(repo: Path, image: str, words: list[str], said: str) -> None:
    assert said in imager("prove", image, "--repo", repo, *words, code=2).err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--display", "wall"], "none, window or vnc:N"),
        (["--forward", "22"], "8022:22"),
        (["--forward", "0:22"], "8022:22"),
        (["--firmware", "coreboot"], "bios, uefi, secureboot"),
    ],
)
def test_boot_wrongly(repo: Path, image: str, words: list[str], said: str) -> None:
    assert said in imager("boot", image, "--repo", repo, *words, code=2).err


def test_boot_over_another_image(repo: Path, image: str, tmp_path: Path) -> None:
    overlay = tmp_path / "a file"
    overlay.write_bytes(b"no overlay at all, but as long as a header has to be" * 2)
    words = ("--overlay", overlay, "--accel", "tcg")
    assert "no overlay" in imager("boot", image, "--repo", repo, *words, code=2).err


def test_there_is_no_such_image(repo: Path) -> None:
    for words in (("prove", "web1@latest"), ("boot", "web1@latest"), ("commit", "nothing")):
        assert "there is no" in imager(*words, "--repo", repo, code=1).err


@pytest.mark.parametrize("missing", ["qemu-system-x86_64", "qemu-img"])
def test_not_tried(repo: Path, image: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no proof, and none is kept."""
    monkeypatch.setattr(prove, "find_tool", lambda name: None if name == missing else name)
    shown = imager("prove", image, "--accel", "tcg", "--repo", repo, "--json", code=5).json
    assert shown["verdict"] == "not tried"
    assert missing in shown["reason"]
    assert shown["evidence"] == []
    assert latest_proofs(Repository.open(str(repo))) == {}


def test_a_firmware_that_is_not_here(
    repo: Path, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "find_tool", lambda name: name)
    monkeypatch.setattr(prove, "firmware_missing", lambda name: f"no {name} here")
    words = ("--accel", "tcg", "--firmware", "uefi")
    shown = imager("prove", image, *words, "--repo", repo, code=5)
    assert "NOT TRIED: no uefi here" in shown.out
