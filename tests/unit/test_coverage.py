"""The coverage proof without FUSE and mounts: the view's bytes, and what is judged of what."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager import checkers
from imager.allocation import AllocationMap, Filesystem, Membership
from imager.checkers import CHECKERS, Opinion
from imager.coverage import Holding, proof, prove_layouts
from imager.coverage.files import Reading
from imager.coverage.view import SparseView, ViewUnavailable
from imager.extents import Extent, Extents
from imager.layout import DiskLayout, Proof, Volume
from imager.mapproof import all_hold, proof_lines, unproved
from imager.partitions import PartitionTable
from tests.support.commandline import imager
from tests.support.sources import MemorySource, memory_disk

SIZE = 4096
CONTENT = bytes(range(1, 256)) * 17
TOKEN = bytes(range(0x60, 0x70))


def prove(source: MemorySource, filesystem: Filesystem, allocation: AllocationMap) -> Proof:
    return proof.prove(Holding(source, filesystem, allocation, source))


ranges = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 700)), max_size=6)


def clipped(extents: list[tuple[int, int]]) -> Extents:
    return Extents(extents).clip(0, SIZE)


@given(ranges, ranges, st.sets(st.integers(0, 7), max_size=3), st.integers(0, SIZE - 1))
def test_a_view_is_exact_to_the_byte(
    used: list[tuple[int, int]], filler: list[tuple[int, int]], written: set[int], offset: int
) -> None:
    expected: list[int | None] = [None] * SIZE
    for extent in clipped(filler):
        for at in range(extent.offset, extent.end):
            expected[at] = TOKEN[at % len(TOKEN)]
    for extent in clipped(used):
        expected[extent.offset : extent.end] = CONTENT[extent.offset : extent.end]
    view = SparseView(MemorySource(CONTENT[:SIZE]), clipped(used), clipped(filler), TOKEN)
    for sector in written:
        assert view.write(sector * 512, bytes([sector]) * 512) == 512
        expected[sector * 512 : sector * 512 + 512] = [sector] * 512
    for length in (1, 511, 1024, 2 * SIZE):
        wanted = expected[offset : offset + length]
        until = wanted.index(None) if None in wanted else len(wanted)
        if until == 0:
            with pytest.raises(OSError) as failure:
                view.read(offset, length)
            assert failure.value.errno == errno.EIO
            assert view.misses[-1].offset == offset
        else:
            assert list(view.read(offset, length)) == wanted[:until]


def test_a_view_ends_like_a_file() -> None:
    view = SparseView(MemorySource(CONTENT[:SIZE]), Extents.whole(SIZE), Extents(), TOKEN)
    assert view.read(SIZE - 3, 100) == CONTENT[SIZE - 3 : SIZE]
    assert view.read(SIZE, 100) == b"" == view.read(SIZE + 1, 1)
    assert not view.misses


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 100), (SIZE - 512, 1024)])
def test_only_whole_sectors_are_written(offset: int, length: int) -> None:
    view = SparseView(MemorySource(CONTENT[:SIZE]), Extents.whole(SIZE), Extents(), TOKEN)
    with pytest.raises(OSError) as failure:
        view.write(offset, bytes(length))
    assert failure.value.errno == errno.EINVAL


def test_what_is_written_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imager.coverage.view._MAX_WRITTEN_SECTORS", 2)
    view = SparseView(MemorySource(CONTENT[:SIZE]), Extents.whole(SIZE), Extents(), TOKEN)
    view.write(0, bytes(1024))
    with pytest.raises(OSError) as failure:
        view.write(1024, bytes(512))
    assert failure.value.errno == errno.ENOSPC


PART = Extents.whole(1024)
SET = Membership("btrfs", "id", "1", 2)


@pytest.mark.parametrize(
    ("filesystem", "allocation", "verdict", "said"),
    [
        (
            Filesystem("ext4"),
            AllocationMap(Extents.whole(SIZE), "all", "doubt"),
            "nothing to prove",
            "all of it",
        ),
        (
            Filesystem("ext4"),
            AllocationMap(Extents.whole(SIZE), "exact"),
            "nothing to prove",
            "all of it",
        ),
        (Filesystem("swap"), AllocationMap(PART, "exact"), "nothing to prove", "keeps nothing"),
        (Filesystem("jfs"), AllocationMap(PART, "exact"), "not proved", "no checker for jfs"),
        (Filesystem("lvm2"), AllocationMap(PART, "exact"), "failed", "lvm2 cannot be read"),
        (
            Filesystem("btrfs", member_of=SET),
            AllocationMap(PART, "exact"),
            "not proved",
            "several devices",
        ),
    ],
)
def test_what_is_not_tried(
    filesystem: Filesystem, allocation: AllocationMap, verdict: str, said: str
) -> None:
    found = prove(MemorySource(CONTENT[:SIZE]), filesystem, allocation)
    assert found.verdict == verdict and said in found.text


@pytest.mark.parametrize("kind", CHECKERS)
def test_a_missing_checker_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "find_tool", lambda _: None)
    found = prove(MemorySource(CONTENT[:SIZE]), Filesystem(kind), AllocationMap(PART, "exact"))
    assert found.verdict == "not proved" and not found.holds
    assert CHECKERS[kind].command[0] in found.text and CHECKERS[kind].package in found.text


def test_without_fuse_nothing_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ViewUnavailable("FUSE does not work here: no reason")

    monkeypatch.setattr(proof, "open_view", refuse)
    monkeypatch.setattr(checkers, "find_tool", lambda name: name)
    found = prove(MemorySource(CONTENT[:SIZE]), Filesystem("ext4"), AllocationMap(PART, "exact"))
    assert found == Proof("not proved", "FUSE does not work here: no reason")


CLEAN, FAULTY = Opinion(True, "clean\n"), Opinion(False, "a fault\n")
READ, UNREAD = Reading(7, set()), Reading(7, {"/file: Input/output error"})


@pytest.mark.parametrize(
    ("sparse", "whole", "verdict", "said"),
    [
        ((CLEAN, READ), None, "proved", "and 7 files read"),
        ((FAULTY, READ), (CLEAN, READ), "failed", "the checker says: a fault"),
        ((FAULTY, READ), (FAULTY, READ), "not proved", "finds faults, with the unused bytes too"),
        (
            (Opinion(False, "a fault\nanother\n"), READ),
            (FAULTY, READ),
            "failed",
            "says: another",
        ),
        ((CLEAN, UNREAD), (CLEAN, READ), "failed", "unreadable: /file: Input/output error"),
        ((CLEAN, UNREAD), (CLEAN, UNREAD), "not proved", "1 files are unreadable"),
        ((CLEAN, None), (CLEAN, READ), "failed", "it cannot be mounted: the reason"),
        ((CLEAN, None), (CLEAN, None), "not proved", "the files cannot be read: the reason"),
    ],
)
def test_only_what_differs_counts(
    sparse: tuple[Opinion, Reading | None],
    whole: tuple[Opinion, Reading | None] | None,
    verdict: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def examine(_: object, *, whole: bool) -> proof._Evidence:
        found = baseline if whole else sparse
        assert found is not None, "what held is not compared"
        check, sweep = proof._Check(found[0], []), proof._Sweep(found[1], "the reason", [])
        return proof._Evidence((check,), sweep)

    baseline = whole
    monkeypatch.setattr(proof, "_examine", examine)
    monkeypatch.setattr(checkers, "find_tool", lambda name: name)
    found = prove(MemorySource(CONTENT[:SIZE]), Filesystem("ext4"), AllocationMap(PART, "exact"))
    assert found.verdict == verdict and said in found.text


def test_an_error_that_a_checker_swallows_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(_: object, *, whole: bool) -> proof._Evidence:
        check = proof._Check(CLEAN, [] if whole else [Extent(512, 512)])
        return proof._Evidence((check,), proof._Sweep(READ, "", []))

    monkeypatch.setattr(proof, "_examine", examine)
    monkeypatch.setattr(checkers, "find_tool", lambda name: name)
    source, allocation = MemorySource(CONTENT[:SIZE]), AllocationMap(PART, "exact")
    found = prove(source, Filesystem("btrfs"), allocation)
    assert found.verdict == "failed" and "byte 512 of the partition" in found.text
    assert prove(source, Filesystem("ext4"), allocation).verdict == "proved"  # it reads ahead


def layout(*verdicts: str, monkeypatch: pytest.MonkeyPatch) -> DiskLayout:
    """A proved layout of volumes of 1 KiB that use 512 bytes each."""
    proofs = [Proof(verdict, "the reason") for verdict in verdicts]  # type: ignore[arg-type]
    allocation = AllocationMap(Extents.whole(512), "exact")
    volumes = [
        Volume(None, n * 1024, 1024, Filesystem("ext4"), allocation) for n in range(len(proofs))
    ]
    before = DiskLayout(PartitionTable("none", 512), tuple(volumes), SIZE)
    monkeypatch.setattr(proof, "prove", lambda *_: proofs.pop(0))
    (after,) = prove_layouts([(MemorySource(CONTENT[:SIZE]), before)])
    return after


def test_a_failed_map_is_given_up_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = ("proved", "failed", "not proved", "nothing to prove")
    found = layout(*verdicts, monkeypatch=monkeypatch)
    assert [volume.allocation.used.total for volume in found.volumes] == [512, 1024, 512, 512]
    assert [volume.to_json()["proof"] for volume in found.volumes] == [
        {"verdict": verdict, "text": "the reason"} for verdict in verdicts
    ]
    failed = found.volumes[1].allocation
    assert (failed.certainty, failed.reason) == ("all", "the map failed its proof")


def test_what_does_not_hold_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    good = layout("proved", "nothing to prove", monkeypatch=monkeypatch)
    bad = layout("failed", "not proved", monkeypatch=monkeypatch)
    assert all_hold([good]) and not all_hold([good, bad])
    assert proof_lines(good, holding=True) == [
        "the disk: map proved: the reason",
        "the disk: nothing to prove: the reason",
    ]
    disk = memory_disk(MemorySource(CONTENT[:SIZE]))
    assert unproved([disk]) == []
    assert unproved([type(disk)("sda", disk.source, bad, disk.identity)]) == [
        "sda: the disk: PROOF FAILED, all of it counts as used: the reason",
        "sda: the disk: map NOT PROVED: the reason",
    ]


def test_without_a_proof_the_manifest_says_nothing_of_it() -> None:
    volume = memory_disk(MemorySource(CONTENT[:SIZE])).layout.volumes[0]
    assert "proof" not in volume.to_json()


@pytest.mark.parametrize("other", [("--all-blocks",), ("--consistency", "none")])
def test_contradictions_are_refused(other: tuple[str, ...], tmp_path: Path) -> None:
    words = ("capture", tmp_path / "disk.img", "--prove-map", *other, "--repo", tmp_path / "repo")
    assert "--prove-map" in imager(*words, code=2).err
