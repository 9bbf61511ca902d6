"""`imager media write`: what it refuses, what it writes, and that it reads it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imager.errors import IntegrityError
from imager.progress import NullProgress
from tests.support.commandline import imager
from tests.support.disks import (
    MIB,
    digest,
    loop_disk,
    make_file,
    make_filesystem,
    make_gpt,
    mounted,
    needs_loop,
    partitions_of,
    read_at,
)
from tests.support.media import make_iso

pytestmark = needs_loop


@pytest.fixture(scope="module")
def iso(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_iso(tmp_path_factory.mktemp("iso") / "rescue.iso", size=9 * MIB)


def write(iso: Path, device: object, code: int = 0) -> Any:
    return imager("media", "write", iso, device, "--yes", "--json", code=code).json


def refusal(iso: Path, device: object) -> str:
    return str(write(iso, device, 4)["error"]["message"])


def test_a_stick_begins_with_the_medium_and_has_no_stale_table(iso: Path, tmp_path: Path) -> None:
    stick = make_gpt(tmp_path / "stick.img", 64 * MIB)
    assert read_at(stick, 64 * MIB - 512, 8) == b"EFI PART"
    with loop_disk(stick) as device:
        result = write(iso, device)
    size = iso.stat().st_size
    assert (result["size"], result["target_size"]) == (size, 64 * MIB)
    assert [text.split(" ", 2)[0] for text in result["overwrites"]] == ["partition"] * 2
    assert read_at(stick, 0, size) == iso.read_bytes()
    assert read_at(stick, 64 * MIB - 512, 512) == bytes(512)
    assert read_at(stick, size, MIB) == b"\xa5" * MIB, "what is behind the medium stays"


def test_a_stick_of_exactly_the_right_size(iso: Path, tmp_path: Path) -> None:
    stick = make_file(tmp_path / "stick.img", iso.stat().st_size)
    with loop_disk(stick) as device:
        write(iso, device)
    assert digest(stick) == digest(iso)


def test_what_is_refused(iso: Path, tmp_path: Path) -> None:
    stick = make_file(tmp_path / "stick.img", iso.stat().st_size - 2048)
    before = digest(stick)
    with loop_disk(stick) as device:
        assert "the medium needs" in refusal(iso, device)
    with loop_disk(stick, sector_size=4096) as device:
        assert "sectors of 4096 bytes" in refusal(iso, device)
    assert "is not a disk" in refusal(iso, stick)
    assert digest(stick) == before


def test_a_disk_in_use_is_refused(iso: Path, tmp_path: Path) -> None:
    stick = make_file(tmp_path / "stick.img", 64 * MIB)
    with loop_disk(stick) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "mnt") as folder:
            assert "is mounted at" in refusal(iso, device)
            own = make_iso(folder / "own.iso")
            assert "holds" in refusal(own, device)


def test_a_partition_is_refused(iso: Path, tmp_path: Path) -> None:
    with (
        loop_disk(make_gpt(tmp_path / "stick.img")) as device,
        partitions_of(device) as (_, root),
    ):
        assert "is a partition" in refusal(iso, root)


def test_the_name_must_be_typed(iso: Path, tmp_path: Path) -> None:
    stick = make_file(tmp_path / "stick.img", 16 * MIB)
    before = digest(stick)
    with loop_disk(stick) as device:
        outcome = imager("media", "write", iso, device, code=4)
        assert "no terminal to ask on" in outcome.err
        assert device in outcome.out
    assert digest(stick) == before


def test_another_file_is_no_medium(tmp_path: Path) -> None:
    stick = make_file(tmp_path / "stick.img", 16 * MIB)
    with loop_disk(stick) as device:
        other = make_file(tmp_path / "other.iso", MIB)
        assert "other.iso" in imager("media", "write", other, device, code=3).err


def test_a_stick_that_loses_bytes_is_found_out(
    iso: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sticks that say they are larger than they are take writes and forget them."""
    from bootmedia import write as module

    stick = make_file(tmp_path / "stick.img", 16 * MIB)
    lost_at = 5 * MIB + 7

    class Forgetful(module.Target):
        def write(self, offset: int, content: memoryview) -> None:
            if offset <= lost_at < offset + len(content):
                content[lost_at - offset] ^= 1
            super().write(offset, content)

    monkeypatch.setattr(module, "Target", Forgetful)
    with (
        loop_disk(stick) as device,
        pytest.raises(IntegrityError, match=f"byte {lost_at} differs"),
    ):
        module.write_medium(module.plan_write(str(iso), device), NullProgress())
