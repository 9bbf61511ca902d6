"""The guest has what its tests need."""

from __future__ import annotations

import pytest

from imager.process import run

MODULES = "dm-mod dm-mirror dm-thin-pool dm-snapshot dm-crypt raid1 vfat exfat f2fs xfs btrfs"


@pytest.mark.parametrize("name", MODULES.split())
def test_module(name: str) -> None:
    run(["modprobe", name])
