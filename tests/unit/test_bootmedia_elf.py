"""The ELF reader against the machine's own tools, and against damage."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootmedia.elf import Elf, LibraryFinder, is_elf, read_cache, read_elf
from imager.errors import FormatError, NotRecognized, ToolError
from imager.process import find_tool

PROGRAMS = ("sfdisk", "e2fsck", "btrfs", "mount", "bash")


def program(name: str) -> Path:
    found = find_tool(name)
    assert found, f"{name} is not installed"
    return Path(found).resolve()


def closure(path: Path) -> set[str]:
    """Names of all libraries that a program needs."""
    finder = LibraryFinder()
    found: set[str] = set()
    todo = [read_elf(path)]
    while todo:
        elf = todo.pop()
        for name in set(elf.needed) - found:
            found.add(name)
            todo.append(read_elf(finder.find(name, elf)))
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_libraries_are_those_that_ldd_finds(name: str) -> None:
    path = program(name)
    said = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    expected = set(re.findall(r"^\s*(\S+) => /", said, re.MULTILINE))
    assert {n for n in closure(path) if not n.startswith("ld-")} == expected


def test_interpreter_and_machine() -> None:
    elf = read_elf(program("bash"))
    assert elf.interpreter and Path(elf.interpreter).exists()
    assert elf.bits == (64 if sys.maxsize > 2**32 else 32)
    assert 0 < elf.loaded_size <= elf.path.stat().st_size


def test_origin_and_runpath() -> None:
    elf = Elf(Path("/a/b/x.so"), 64, 62, 0, rpath=("/old",), runpath=("$ORIGIN/../y.libs", "rel"))
    assert elf.search_folders() == ("/a/y.libs",)
    assert Elf(Path("/a/x"), 64, 62, 0, rpath=("${ORIGIN}", "/$LIB")).search_folders() == ("/a",)


def test_missing_library_is_named() -> None:
    with pytest.raises(ToolError, match=r"needs libnone\.so\.1"):
        LibraryFinder().find("libnone.so.1", read_elf(program("bash")))


def test_works_without_a_cache(tmp_path: Path) -> None:
    assert list(read_cache(tmp_path / "none")) == []
    for content in (b"", b"glibc-ld.so.cache1.1", b"glibc-ld.so.cache1.1" + b"\xff" * 60):
        (tmp_path / "cache").write_bytes(content)
        assert list(read_cache(tmp_path / "cache")) == []


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\n")
    assert not is_elf(tmp_path / "script")
    with pytest.raises(NotRecognized):
        read_elf(tmp_path / "script")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_and_nothing_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(program("mount").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        elf = read_elf(path)
    except (FormatError, NotRecognized):
        return
    assert elf.loaded_size <= path.stat().st_size
