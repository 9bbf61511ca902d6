"""The ISO: read back by its own reader and by others, refused when it is damaged."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from bootmedia import iso as module
from bootmedia.iso import IsoFile, IsoPlan, read_iso_file, write_iso
from imager.errors import FormatError, IntegrityError, SourceError, UsageError
from imager.process import run
from tests.support.disks import MIB, make_random

LONG = "n" * 240


def plan_of(*files: IsoFile, created: int = 1_700_000_000) -> IsoPlan:
    return IsoPlan("IMAGER", "0123456789abcdef", files, None, created)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    large = make_random(tmp_path / "large", 9 * MIB + 5)
    files = {
        "boot/a": b"content",
        "empty": b"",
        f"a/b/c/d/e/f/{LONG}": b"deep and long",
        "Ünïcode name.tar.gz": b"unicode",
        **{f"many/{n:04}": str(n).encode() for n in range(300)},
    }
    plan = plan_of(
        IsoFile("large", large), *(IsoFile(name, content) for name, content in files.items())
    )
    path = tmp_path / "out.iso"
    info = write_iso(plan, path)
    assert info.size == path.stat().st_size
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [file.path for file in info.files] == [file.path for file in plan.files]
    for name, content in files.items():
        assert read_iso_file(path, name) == content
    assert read_iso_file(path, "large") == large.read_bytes()
    with pytest.raises(FormatError, match="at most 7 were expected"):
        read_iso_file(path, "large", limit=7)
    with pytest.raises(FormatError, match="has no nothing"):
        read_iso_file(path, "nothing")
    if shutil.which("xorriso"):
        listed = run(["xorriso", "-indev", str(path), "-find", "/", "-type", "f"]).stdout.decode()
        assert all(f"'/{name}'" in listed for name in files)
    again = tmp_path / "again.iso"
    assert write_iso(plan, again).sha256 == info.sha256
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_loses_bytes_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = module._settle

    def lose(output: int) -> None:
        end = module.os.lseek(output, 0, 2)
        module.os.pwrite(output, b"\xff", end - 160 * 2048)
        settle(output)

    monkeypatch.setattr(module, "_settle", lose)
    with pytest.raises(IntegrityError, match="large does not hold"):
        write_iso(plan_of(IsoFile("large", bytes(MIB))), tmp_path / "out.iso")
    assert not list(tmp_path.iterdir())


def test_sources_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        write_iso(plan_of(IsoFile("a", tmp_path / "none")), tmp_path / "out.iso")
    for names in (("a", "a"), ("../a",), ("a//b",), ("n" * 251,)):
        with pytest.raises(UsageError):
            write_iso(plan_of(*(IsoFile(name, b"") for name in names)), tmp_path / "out.iso")
    assert not list(tmp_path.iterdir())


def test_damaged_isos_end_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "out.iso"
    write_iso(plan_of(IsoFile("a/b", b"content"), IsoFile("c", b"d")), path)
    whole = path.read_bytes()
    other = tmp_path / "other.iso"
    for content in (b"", whole[:30000], whole[: 17 * 2048], bytes(len(whole))):
        other.write_bytes(content)
        with pytest.raises(FormatError):
            read_iso_file(other, "a/b")
    for at in range(16 * 2048, min(len(whole), 40 * 2048), 7):
        other.write_bytes(whole[:at] + b"\xff" * 4 + whole[at + 4 :])
        try:
            read_iso_file(other, "a/b")
        except FormatError:
            continue
