"""The python layer: whole (each library is there), the same each time, and it runs by itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bootmedia import tools
from bootmedia.closure import PythonLayer, python_layer
from bootmedia.cpio import File, LayerInfo, Link, write_layer
from bootmedia.elf import is_elf, read_elf
from bootmedia.pythonfiles import library_path
from imager.errors import ImagerError
from imager.process import find_tool

Chroot = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def layer() -> PythonLayer:
    found = python_layer()
    print(*found.warnings, sep="\n")
    return found


@pytest.fixture(scope="module")
def written(layer: PythonLayer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LayerInfo]:
    path = tmp_path_factory.mktemp("layer") / "python.img"
    info = write_layer(layer.tree, path, sentinel="python", epoch=0)
    print(f"python layer: {info.size / 1e6:.1f} MB, unpacked {info.unpacked_size / 1e6:.1f} MB")
    return path, info


@pytest.fixture(scope="module")
def unpacked(written: tuple[Path, LayerInfo], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(written[0].read_bytes())
    busybox = find_tool("busybox")
    assert busybox
    subprocess.run([busybox, "cpio", "-idm"], input=raw, cwd=folder, check=True)
    return folder


@pytest.fixture
def inside(unpacked: Path) -> Chroot:
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/usr/sbin/chroot", str(unpacked), *command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_it_is_small(written: tuple[Path, LayerInfo]) -> None:
    _, info = written
    assert info.size < 24e6
    assert info.unpacked_size < 70e6


def test_every_library_is_there(unpacked: Path) -> None:
    names = {path.name for path in unpacked.rglob("*.so*")}
    for path in unpacked.rglob("*"):
        if path.is_file() and not path.is_symlink() and is_elf(path):
            missing = [name for name in read_elf(path).needed if name not in names]
            assert not missing, f"{path} needs {missing}"


def test_what_is_in_it(layer: PythonLayer) -> None:
    tree = layer.tree
    for path in ("init", "usr/share/udhcpc/default.script", "bin/sh", "usr/sbin/sfdisk"):
        assert path in tree
    for package in ("imager/restore", "bootmedia/guest/__init__", "parted/__init__", "tqdm/std"):
        assert f"{library_path()}/{package}.pyc" in tree
    paths = [entry.path for entry in tree]
    for unwanted in ("/rich/", "/numpy/", "/pycdlib/", "/test/", "__pycache__", ".dist-info"):
        assert not [path for path in paths if unwanted in path]
    assert not [path for path in paths if path.endswith(".py")]
    assert tree.get("bin/sh") == Link("bin/sh", "busybox")


def test_no_path_of_this_machine(layer: PythonLayer) -> None:
    """Compiled modules name their place in the rescue system."""
    here = str(Path(__file__).parents[2]).encode()
    for entry in layer.tree:
        if isinstance(entry, File) and isinstance(entry.content, bytes):
            assert here not in entry.content, entry.path


def test_same_input_same_bytes(written: tuple[Path, LayerInfo], tmp_path: Path) -> None:
    again = write_layer(python_layer().tree, tmp_path / "again", sentinel="python", epoch=0)
    assert again == written[1]


@pytest.mark.parametrize(
    "code",
    [
        "import imager.restore, imager.capture, imager.verify, imager.tableedit, bootmedia.guest",
        "import parted, isal.isal_zlib, blake3, zstandard, tqdm",
        "import ssl, hashlib, lzma, bz2, curses, readline, ctypes, urllib.request, http.client",
        "import sys; assert sys.stdout.encoding == 'utf-8' and not sys.flags.dev_mode",
    ],
)
def test_python_runs(inside: Chroot, code: str) -> None:
    done = inside("python3", "-I", "-B", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", [[], ["restore"], ["inspect"], ["repo", "init"]])
def test_help_works_without_rich(inside: Chroot, command: list[str]) -> None:
    done = inside("imager", *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: imager" in done.stdout


def test_fuse_is_found(inside: Chroot) -> None:
    words = inside("cat", "/usr/bin/imager").stdout.split()
    setting = next(word for word in words if word.startswith("FUSE_LIBRARY_PATH="))
    done = inside("env", setting, "python3", "-I", "-c", "import mfusepy")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_runs(inside: Chroot, unpacked: Path) -> None:
    (unpacked / "tmp/disk").write_bytes(bytes(1 << 20))
    done = inside("imager", "inspect", "/tmp/disk")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    ["sfdisk --version", "partx --version", "losetup --version", "blkid --version", "e2fsck -V"],
)
def test_tools_run(inside: Chroot, command: str) -> None:
    done = inside(*command.split())
    assert done.returncode == 0, done.stderr


def lose(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(tools, "find_tool", lambda n: None if n in names else find_tool(n))


def test_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch, "mdadm", "xfs_growfs", "dropbear", "dropbearkey")
    warnings = python_layer(ssh=True).warnings
    for name, package in (("mdadm", "mdadm"), ("xfs_growfs", "xfsprogs"), ("dropbear", "dropbear")):
        assert [text for text in warnings if text.startswith(name) and package in text]
    lose(monkeypatch, "sfdisk")
    with pytest.raises(ImagerError, match="sfdisk") as caught:
        python_layer()
    assert caught.value.hint == "install fdisk"
