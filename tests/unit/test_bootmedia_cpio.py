"""Layers of an initramfs: written, read by another program, and foreign bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import subprocess
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bootmedia.cpio import Entry, File, Folder, Link, Node, Tree, write_layer
from imager.errors import FormatError, ImagerError, SourceError, UnsupportedError, UsageError
from imager.initramfs import CpioMember, read_cpio
from imager.process import find_tool


def tree_of(*entries: Entry) -> Tree:
    tree = Tree()
    for entry in entries:
        tree.add(entry)
    return tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 9001)
    return tree_of(
        File("usr/bin/tool", 0o755, source),
        File("etc/text", 0o640, b"odd"),
        Link("bin", "usr/bin"),
        Folder("tmp", 0o1777),
        Node("dev/console", stat.S_IFCHR | 0o600, 5, 1),
        File("usr-beside", 0o644, b""),
    )


def members(path: Path) -> list[CpioMember]:
    with path.open("rb") as file:
        return list(read_cpio(file))


def archive(tree: Tree, folder: Path) -> bytes:
    """The archive of a layer, uncompressed."""
    write_layer(tree, folder / "layer", sentinel="x", epoch=0)
    return zstandard.ZstdDecompressor().decompressobj().decompress((folder / "layer").read_bytes())


def test_what_is_written_is_read(tree: Tree, tmp_path: Path) -> None:
    info = write_layer(tree, tmp_path / "layer", sentinel="python", epoch=1_700_000_000)
    found = members(tmp_path / "layer")
    names = [member.name for member in found]
    assert names == [
        *("bin", "dev", "dev/console", "etc", "etc/text", "tmp", "usr", "usr/bin", "usr/bin/tool"),
        *("usr-beside", "sentinel", "sentinel/python"),
    ]
    by_name = {member.name: member for member in found}
    assert by_name["usr/bin/tool"].content == bytes(range(256)) * 9001
    assert by_name["usr/bin/tool"].mode == stat.S_IFREG | 0o755
    assert by_name["bin"].content == b"usr/bin" and stat.S_ISLNK(by_name["bin"].mode)
    assert by_name["tmp"].mode == stat.S_IFDIR | 0o1777
    assert info.size == (tmp_path / "layer").stat().st_size
    longer = 4  # the other's sentinel has a shorter name
    assert info.unpacked_size == len(archive(tree, tmp_path)) + longer


def test_busybox_unpacks_it(tree: Tree, tmp_path: Path) -> None:
    busybox = find_tool("busybox")
    assert busybox, "apt-get install busybox-static"
    folder = tmp_path / "unpacked"
    folder.mkdir()
    command = [busybox, "cpio", "-idm"]
    subprocess.run(command, input=archive(tree, tmp_path), cwd=folder, check=True)
    assert (folder / "usr/bin/tool").read_bytes() == bytes(range(256)) * 9001
    assert (folder / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert (folder / "sentinel/x").read_bytes() == b""
    assert (folder / "etc/text").stat().st_mtime == 0


def test_same_tree_same_bytes(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one processor and with many, also beyond the size of one job."""
    noise = tmp_path / "noise"
    noise.write_bytes(b"".join(i.to_bytes(4, "big") for i in range(5 << 20)))
    tree.add(File("noise", 0o644, noise))
    found = set()
    for processors in (1, 2, 5):
        monkeypatch.setattr("os.cpu_count", lambda count=processors: count)
        found.add(write_layer(tree, tmp_path / "layer", sentinel="x", epoch=7))
    assert len(found) == 1


def test_window_is_one_that_the_kernel_takes(tree: Tree, tmp_path: Path) -> None:
    for level in (1, 19, 22):
        write_layer(tree, tmp_path / "layer", level=level, sentinel="x", epoch=0)
        frame = zstandard.get_frame_parameters((tmp_path / "layer").read_bytes())
        assert frame.window_size <= 8 << 20


def test_a_path_holds_one_thing() -> None:
    tree = tree_of(File("a/b", 0o644, b"1"), File("a/b", 0o644, b"1"), Folder("a", 0o700))
    assert tree.get("a") == Folder("a", 0o700)
    for other in (File("a/b", 0o644, b"2"), Link("a", "x"), File("a/b/c", 0o644, b"")):
        with pytest.raises(ImagerError):
            tree.add(other)
    assert len(tree) == 2


@pytest.mark.parametrize("path", ["", "/", "a/../b", "a\0", "x" * 4096, "TRAILER!!!"])
def test_names_that_can_not_be(path: str) -> None:
    with pytest.raises(UsageError):
        tree_of(Folder(path))


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="can't read"):
        write_layer(
            tree_of(File("a", 0o644, tmp_path / "none")), tmp_path / "l", sentinel="x", epoch=0
        )


COMPRESSIONS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda raw: lzma.compress(raw, lzma.FORMAT_ALONE),
    "zstd": lambda raw: zstandard.ZstdCompressor().compress(raw),
    "none": lambda raw: raw,
}


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_archives_one_after_another(kind: str, tree: Tree, tmp_path: Path) -> None:
    """As a distribution does: microcode first, uncompressed; zeros between; then the rest."""
    early = archive(tree_of(File("kernel/x86/microcode", 0o644, b"code")), tmp_path)
    packed = COMPRESSIONS[kind](archive(tree, tmp_path))
    joined = early + bytes(512) + packed + bytes(512) + packed + bytes(3)
    found = list(read_cpio(io.BytesIO(joined), want=lambda name: "text" in name))
    assert [m.content for m in found if m.name == "etc/text"] == [b"odd", b"odd"]
    assert {m.content for m in found if m.name != "etc/text"} == {None}
    assert len(found) == 5 + 2 * 12


@pytest.mark.parametrize("magic", [b"\x02\x21\x4c\x18", b"\x89LZO\0"])
def test_unknown_compressions_are_named(magic: bytes) -> None:
    with pytest.raises(UnsupportedError, match=r"lz[4o]"):
        list(read_cpio(io.BytesIO(magic + bytes(100))))


def test_large_content_is_skipped() -> None:
    """A member of more zeros than are handed out: it is skipped, not held."""
    header = b"070701" + b"".join(
        b"%08X" % v for v in (1, 0o100644, 0, 0, 1, 0, 257 << 20, 0, 0, 0, 0, 2, 0)
    )
    raw = header + b"a\0" + bytes(257 << 20)
    packed = zstandard.ZstdCompressor().compress(raw)
    del raw
    with pytest.raises(FormatError, match="ends at byte"):
        for member in read_cpio(io.BytesIO(packed)):
            assert (member.size, member.content) == (257 << 20, None)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_and_nothing_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(archive(tree_of(File("a", 0o644, b"x" * 99)), tmp_path_factory.getbasetemp()))
    kind = data.draw(st.sampled_from(sorted(COMPRESSIONS)))
    packed = bytearray(COMPRESSIONS[kind](bytes(raw)))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packed)))
    try:
        found = list(read_cpio(io.BytesIO(bytes(packed[:cut]))))
    except (FormatError, UnsupportedError):
        return
    assert len(found) <= 3
