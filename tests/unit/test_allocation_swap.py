"""Swap spaces, and what is no filesystem at all."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

from imager.allocation import Filesystem, Membership, allocation_map, identify
from imager.blocksource import FileSource
from imager.extents import Extents

UUID = bytes.fromhex("3e1f9f433fbb4d4f9f5139b0cd54bd33")


def swap_image(
    path: Path,
    *,
    page: int = 4096,
    order: str = "<",
    signature: bytes = b"SWAPSPACE2",
    pages: int = 64,
    bad: int = 0,
    version: int = 1,
) -> FileSource:
    header = bytearray(b"\xa5" * 1024 + bytes(page - 1024))
    struct.pack_into(f"{order}3I", header, 1024, version, pages - 1, bad)
    header[1036:1052] = UUID
    header[1052:1068] = b"swap label".ljust(16, b"\0")
    header[-10 : len(header) - 10 + len(signature)] = signature
    path.write_bytes(header + b"\xa5" * (page * (pages - 1)))
    return FileSource(path)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("page", [4096, 8192, 16384, 32768, 65536])
def test_header_page_is_all_that_counts(tmp_path: Path, page: int, order: str) -> None:
    with swap_image(tmp_path / "swap", page=page, order=order) as source:
        found, swap = allocation_map(source), identify(source)
    assert found.certainty == "exact"
    assert found.used == Extents([(0, page)])
    assert (swap.kind, swap.label, swap.size) == ("swap", "swap label", 64 * page)
    assert swap.uuid == "3e1f9f43-3fbb-4d4f-9f51-39b0cd54bd33"


def test_what_lies_behind_the_swap_space_is_kept(tmp_path: Path) -> None:
    swap_image(tmp_path / "swap").__exit__(None, None, None)
    with (tmp_path / "swap").open("ab") as file:
        file.write(b"?" * 1000)
    with FileSource(tmp_path / "swap") as source:
        assert allocation_map(source).used == Extents([(0, 4096), (64 * 4096, 1000)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({"signature": s}, "hibernated") for s in (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND")),
        ({"signature": b"LINHIB0001"}, "hibernated"),
        ({"signature": b"SWAP-SPACE"}, "old"),
        ({"version": 2}, "version"),
        ({"bad": 638}, "bad pages"),
    ],
)
def test_doubts_keep_all_of_it(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with swap_image(tmp_path / "swap", **change) as source:  # type: ignore[arg-type]
        found = allocation_map(source)
        assert identify(source).kind == "swap"
    assert found.certainty == "all" and said in (found.reason or "")
    assert found.used == Extents.whole(64 * 4096)


def test_header_that_claims_too_much(tmp_path: Path) -> None:
    swap_image(tmp_path / "swap").__exit__(None, None, None)
    with (tmp_path / "swap").open("r+b") as file:
        file.truncate(63 * 4096)
    with FileSource(tmp_path / "swap") as source:
        assert allocation_map(source).used == Extents.whole(63 * 4096)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1500, 2048, 4096, 70000, 1 << 20])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\xa5"])
def test_no_filesystem_is_used_whole(tmp_path: Path, size: int, fill: bytes) -> None:
    (tmp_path / "image").write_bytes(fill * size)
    with FileSource(tmp_path / "image") as source:
        assert identify(source).kind == "unknown"
        found = allocation_map(source)
    assert (found.certainty, found.reason) == ("all", "no filesystem")
    assert found.used == Extents.whole(size)


def test_two_signatures_are_a_doubt(tmp_path: Path) -> None:
    swap_image(tmp_path / "swap").__exit__(None, None, None)
    with (tmp_path / "swap").open("r+b") as file:
        file.seek(65536 + 0x40)
        file.write(b"_BHRfS_M")
    with FileSource(tmp_path / "swap") as source:
        found = allocation_map(source)
        assert any("swap" in note for note in identify(source).notes)
    assert found.certainty == "all" and found.reason == "signatures of btrfs, swap"


class UnreadableAt(FileSource):
    """A disk with one bad sector."""

    bad = 0

    def pread(self, offset: int, length: int) -> bytes:
        if offset <= self.bad < offset + length:
            raise OSError(errno.EIO, "Input/output error")
        return super().pread(offset, length)


@pytest.mark.parametrize("bad", [0, 1024, 4000, 65536, 140000, 300000])
def test_unreadable_sector_is_a_doubt(tmp_path: Path, bad: int) -> None:
    swap_image(tmp_path / "swap", pages=128).__exit__(None, None, None)
    with UnreadableAt(tmp_path / "swap") as source:
        source.bad = bad
        identify(source)
        found = allocation_map(source)
    if bad == 300000:  # nobody looks there
        assert found.certainty == "exact"
    else:
        assert found.certainty == "all" and "Input/output error" in (found.reason or "")


def test_filesystem_survives_json() -> None:
    member = Membership("btrfs", "set", "1", 2)
    full = Filesystem("btrfs", "label", "uuid", 1, 2, 3, member, ("note",))
    for filesystem in (full, Filesystem("unknown")):
        data = {**filesystem.to_json(), "later": "ignored"}
        assert Filesystem.from_json(data) == filesystem
