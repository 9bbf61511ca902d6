"""A disk that brings Python and this checkout's imager into a machine that has neither.

An ext4 filesystem, made without a mount: ``bin/python3``, ``lib`` with the shared libraries, and
``lib/python3.11`` with the standard library, imager and what it imports. In the machine:

    mount LABEL=toolbox /opt/tool
    echo /opt/tool/lib > /etc/ld.so.conf.d/toolbox.conf; ldconfig
    /opt/tool/bin/python3 -m imager --help

The machine must have the C library of this one, or a newer one.
"""

from __future__ import annotations

import compileall
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = "/opt/tool"
ENTER = (
    f"mkdir -p {FOLDER} && mount LABEL=toolbox {FOLDER} && "
    f"echo {FOLDER}/lib > /etc/ld.so.conf.d/toolbox.conf && ldconfig"
)
IMAGER = f"{FOLDER}/bin/python3 -m imager"

_CHECKOUT = Path(__file__).resolve().parents[2]
_TOOLS = ("_pytest", "hypothesis", "mypy", "mypyc", "pip", "pytest", "ruff", "setuptools", "xdist")
_LEFT_OUT = ("test", "site-packages", "dist-packages", "idlelib", "tkinter", "ensurepip", "lib2to3")

# The C library's own, which must be the machine's.
_LIBC = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|util|resolv|crypt))\.so")


def make_toolbox(image: Path, *, free_mib: int = 256) -> Path:
    """Write the disk's image file, with so much room for a repository."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _fill(folder)
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        with image.open("wb") as file:
            file.truncate((int(used * 1.3) >> 20 << 20) + (free_mib << 20))
        _run("mkfs.ext4", "-q", "-L", "toolbox", "-d", str(folder), str(image))
    return image


def _fill(folder: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = folder / "lib" / version
    skipped = shutil.ignore_patterns("config-*", *_LEFT_OUT)
    shutil.copytree(Path(sys.base_prefix) / "lib" / version, library, ignore=skipped)
    (folder / "bin").mkdir()
    shutil.copy(Path(sys.executable).resolve(), folder / "bin/python3")
    shutil.copytree(_CHECKOUT / "imager", library / "imager", ignore=skipped)
    shutil.copytree(_CHECKOUT / "bootmedia", library / "bootmedia", ignore=skipped)
    found = Path(next(path for path in sys.path if path.endswith("site-packages")))
    for item in found.iterdir():
        if item.name in _TOOLS or item.name.endswith((".dist-info", ".pth")):
            continue
        if item.is_dir():
            shutil.copytree(item, library / item.name, ignore=skipped, dirs_exist_ok=True)
        else:
            shutil.copy(item, library / item.name)
    # An emulated machine would take minutes to compile what is not compiled yet.
    compileall.compile_dir(library, quiet=2, maxlevels=20)
    for needed in sorted(set(_libraries([folder / "bin/python3", *library.rglob("*.so*")]))):
        shutil.copy(needed, folder / "lib" / needed.name)


def _libraries(objects: list[Path]) -> Iterator[Path]:
    for path in objects:
        said = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False)
        for name, where in re.findall(r"(\S+) => (/\S+)", said.stdout):
            if not _LIBC.match(name):
                yield Path(where)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
