"""The examples of docs/examples that image before a change, run for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commandline import CHECKOUT, imager
from tests.support.disks import MIB, make_gpt, needs_loop

pytestmark = needs_loop

APT = CHECKOUT / "docs/examples/apt"


def test_an_image_before_apt(tmp_path: Path, repo: Path) -> None:
    """At most one in the time that is set, and none when it is told so."""
    stamp = tmp_path / "stamp"
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "IMAGER_REPO": str(repo),
        "IMAGER_DISK": str(make_gpt(tmp_path / "server.img", 32 * MIB)),
        "IMAGER_STAMP": str(stamp),
    }

    def run(code: int = 0, **more: str) -> int:
        done = subprocess.run(
            [APT / "imager-before-apt"],
            env={**variables, **more},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done
        return len(imager("list", "--repo", repo, "--json").json)

    assert run(IMAGER_SKIP="1") == 0
    assert run() == 1
    assert run() == 1
    os.utime(stamp, (1, 1))
    assert run() == 2
    stamp.unlink()
    assert run(1, IMAGER_DISK=str(tmp_path / "missing")) == 2
    assert not stamp.exists(), "it is tried again"


def test_apt_understands_its_hook() -> None:
    if shutil.which("apt-config") is None:
        pytest.skip("needs apt-config")
    said = subprocess.run(
        ["apt-config", "-c", APT / "80imager", "dump"], capture_output=True, text=True, check=True
    ).stdout
    assert 'DPkg::Pre-Invoke:: "/usr/local/sbin/imager-before-apt";' in said
