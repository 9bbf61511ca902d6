"""LUKS containers are taken whole, and it is said why."""

from __future__ import annotations

import pytest

from imager.allocation import allocation_map, identify
from imager.extents import Extents
from tests.support.sources import MemorySource

UUID = b"3e1f9f43-3fbb-4d4f-9f51-39b0cd54bd33"


@pytest.mark.parametrize("version", [1, 2])
def test_all_of_it(version: int) -> None:
    header = b"LUKS\xba\xbe" + version.to_bytes(2, "big")
    header = header.ljust(168, b"\0") + UUID
    source = MemorySource(header.ljust(1 << 20, b"\0"))
    assert identify(source).notes == (f"LUKS version {version}",)
    found = allocation_map(source)
    assert (found.used, found.certainty) == (Extents.whole(1 << 20), "all")
    assert "can't be thinned offline" in (found.reason or "")
    assert "the mapped device can be captured" in (found.reason or "")
