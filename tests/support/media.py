"""A small ISO with a medium's record, for tests that need no boot loaders."""

from __future__ import annotations

import io
from pathlib import Path

import pycdlib

from bootmedia.medium import Medium
from tests.support.disks import MIB

MEDIUM = Medium(
    id="0123456789abcdef",
    created=1_700_000_000,
    tool_version="0.1.0",
    kernel="6.1.0-1-amd64",
    modules="all",
    least_memory=512 * MIB,
    secure_boot=True,
)


def make_iso(path: Path, *, size: int = 5 * MIB, medium: Medium = MEDIUM) -> Path:
    """An ISO of a bit more than ``size`` bytes, nearly all of them one file without zeros."""
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, rock_ridge="1.09")
    iso.add_directory("/IMAGER", rr_name=".imager")
    for name, rr_name, content in (
        ("/IMAGER/MEDIUM.JSN;1", "medium.json", medium.to_bytes()),
        ("/FILLING.;1", "filling", b"\xa5" * size),
    ):
        iso.add_fp(io.BytesIO(content), len(content), name, rr_name=rr_name)
    iso.write(str(path))
    iso.close()
    return path
