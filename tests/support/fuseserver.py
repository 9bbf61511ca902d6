"""A test's FUSE server: a program of its own that serves one file, and its end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commandline import CHECKOUT

SERVED_NAME = "disk.img"
_LIBRARY = "libfuse3.so.3"


@contextlib.contextmanager
def served_file(module: str, backing: Path, *arguments: str) -> Iterator[Path]:
    """The path of the file that ``python -m module BACKING FOLDER ARGUMENTS...`` serves."""
    if not Path("/dev/fuse").exists():
        pytest.skip("no FUSE here: /dev/fuse is missing")
    folder = backing.with_name(f"{backing.name}.fuse")
    folder.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", module, str(backing), str(folder), *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "FUSE_LIBRARY_PATH": _LIBRARY},
        stderr=subprocess.PIPE,
    )
    try:
        _wait_for(folder / SERVED_NAME, server)
        yield folder / SERVED_NAME
    finally:
        subprocess.run(["umount", str(folder)], check=False, capture_output=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(5)
        server.kill()
        server.communicate()
        folder.rmdir()


def _wait_for(path: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60  # the machine may be busy
    while not path.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            _, said = server.communicate()
            pytest.skip(f"FUSE does not work here: {said.decode(errors='replace').strip()[-300:]}")
        time.sleep(0.02)
