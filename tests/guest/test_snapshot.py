"""A mounted logical volume is captured through a snapshot, while it is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imager.process import run
from tests.guest.lab import said
from tests.guest.test_lvm2 import CONFIG, active, create, new_group
from tests.support.commandline import imager
from tests.support.disks import MIB, make_file, mounted


@pytest.fixture(autouse=True)
def lvm_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lvm").mkdir()
    (tmp_path / "lvm" / "lvm.conf").write_text(CONFIG)
    monkeypatch.setenv("LVM_SYSTEM_DIR", str(tmp_path / "lvm"))


def save(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())


@pytest.mark.timeout(900)  # restoring there takes minutes on a loaded machine
def test_volumes_in_use_by_snapshots(tmp_path: Path) -> None:
    image, repo, restored = tmp_path / "a.img", tmp_path / "repo", tmp_path / "b.img"
    make_file(image, 160 * MIB)
    with new_group([image]) as (device,):
        root, data = create("root", 40), create("data", 24)
        for volume in (root, data):
            run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", volume])
        with mounted(root, tmp_path / "root") as one, mounted(data, tmp_path / "data") as two:
            save(one / "safe", b"root" * 100000)
            save(two / "safe", b"data" * 100000)
            words = ["capture", device, "--name", "x", "--init", "--repo", repo, "--json"]
            taken = imager(*words).json
            assert taken["consistency"] == "snapshot"
            assert sorted(taken["snapshots"]) == ["vg/data", "vg/root"]
            assert said(["lvs", "--noheadings", "-o", "lv_name", "vg"]).split() == ["data", "root"]
    imager("restore", taken["id"], restored, "--yes", "--repo", repo)
    with active([restored]):
        assert said(["lvs", "--noheadings", "-o", "lv_name", "vg"]).split() == ["data", "root"]
        for name in ("root", "data"):
            run(["e2fsck", "-f", "-n", f"/dev/vg/{name}"])
            with mounted(f"/dev/vg/{name}", tmp_path / name, "ro,noload") as copy:
                assert (copy / "safe").read_bytes() == name.encode() * 100000
