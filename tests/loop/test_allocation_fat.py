"""The map of FAT12/16/32 against real filesystems, filled and read with mtools."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from imager.allocation import AllocationMap, allocation_map
from imager.allocation.vfat.layout import Geometry
from imager.blocksource import FileSource, PartSource
from imager.process import find_tool, run
from tests.loop import allocation_lab
from tests.loop.allocation_lab import MIB, make_image, patch, poison, read_map
from tests.support.sources import MemorySource

pytestmark = [
    pytest.mark.loop,
    pytest.mark.skipif(find_tool("mcopy") is None, reason="mtools is not installed"),
]
memory_path = allocation_lab.memory_path  # the fixture

DAMAGES = int(os.environ.get("IMAGER_FUZZ_ROUNDS", "300"))

# Options of mkfs.vfat, size in MiB.
MATRIX = {
    "fat12-floppy": ("-F 12 -s 1", 1),
    "fat12": ("-F 12 -s 8", 8),
    "fat12-one-fat": ("-F 12 -s 16 -f 1", 16),
    "fat16": ("-F 16 -s 4", 32),
    "fat16-three-fats": ("-F 16 -s 8 -f 3 -r 1024", 64),
    "fat16-2k-sectors": ("-F 16 -S 2048", 64),
    "fat32-small": ("-F 32 -s 1", 40),
    "fat32": ("-F 32 -s 2 -R 77 -b 9", 80),
    "fat32-4k-sectors": ("-F 32 -S 4096", 270),
    "fat32-one-fat": ("-F 32 -s 1 -f 1", 40),
}


def _make(path: Path, name: str) -> Path:
    options, size = MATRIX[name]
    return make_image(path, ["mkfs.vfat", *options.split()], size * MIB)


def _fill(image: Path, work: Path, seed: int) -> None:
    """Interleaved files of which every other is deleted, then larger ones into the holes."""
    chance = random.Random(seed)
    room = image.stat().st_size
    work.mkdir()
    for round_, largest in enumerate((room // 400, room // 60)):
        folder = work / f"round{round_}"
        (folder / "sub" / "deep").mkdir(parents=True)
        for n in range(60 if round_ == 0 else 12):
            path = folder / ("sub" if n % 3 else "sub/deep") / f"a long file name {n}.data"
            path.write_bytes(chance.randbytes(chance.randrange(largest)))
        (folder / "sub" / "empty").touch()
        (folder / "sub" / "short").write_bytes(b"one cluster")
        run(["mcopy", "-Q", "-s", "-i", str(image), str(folder), "::"])
        if round_ == 0:
            run(
                [
                    "mdel",
                    "-i",
                    str(image),
                    *[
                        f"::round0/sub/a long file name {n}.data"
                        for n in range(60)
                        if n % 3 and n % 2
                    ],
                ]
            )


def _files(image: Path, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    run(["mcopy", "-Q", "-s", "-m", "-i", str(image), "::", str(folder)])
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _geometry(image: Path) -> Geometry:
    geometry = Geometry.parse(image.read_bytes()[:512])
    assert geometry is not None
    return geometry


@pytest.mark.parametrize("name", MATRIX)
def test_nothing_unused_is_missed(memory_path: Path, name: str) -> None:
    image = _make(memory_path / "image", name)
    _fill(image, memory_path / "work", len(name))
    before = _files(image, memory_path / "before")
    assert len(before) > 40
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    free = found.used.complement(image.stat().st_size)
    assert all(extent.length % _geometry(image).cluster_size == 0 for extent in free)
    assert poison(image, found.used) > image.stat().st_size // 4
    if _geometry(image).fats <= 2:  # fsck.vfat knows no more
        said = run(["fsck.vfat", "-n", str(image)]).stdout.decode()
        assert f", {_used_clusters(image, found)}/{_geometry(image).clusters} clusters" in said
    assert _files(image, memory_path / "after") == before
    print(f"{len(found.used)} ranges, {found.used.total} of {image.stat().st_size} bytes used")


def _used_clusters(image: Path, found: AllocationMap) -> int:
    geometry = _geometry(image)
    first, size = geometry.cluster_offset(2), geometry.clusters * geometry.cluster_size
    return found.used.clip(first, size).total // geometry.cluster_size


def _entry_at(geometry: Geometry, copy: int, number: int) -> int:
    return geometry.fat_offset(copy) + number * geometry.bits // 8


@pytest.mark.parametrize("copy", [0, 1])
def test_any_copy_of_the_fat_counts(memory_path: Path, copy: int) -> None:
    image = _make(memory_path / "image", "fat16")
    geometry = _geometry(image)
    patch(image, _entry_at(geometry, copy, 5000), b"\xff\xff")
    found = read_map(image)
    assert (found.certainty, found.reason) == ("union", "vfat: the copies of its FAT differ")
    assert found.used.covers(geometry.cluster_offset(5000), geometry.cluster_size)


def test_bad_clusters_are_used(memory_path: Path) -> None:
    image = _make(memory_path / "image", "fat32-one-fat")
    geometry = _geometry(image)
    patch(image, _entry_at(geometry, 0, 700), struct.pack("<I", 0x0FFFFFF7))
    patch(image, _entry_at(geometry, 0, 800), struct.pack("<I", 0xF0000000))  # reserved bits
    found = read_map(image)
    assert found.certainty == "exact"
    assert found.used.covers(geometry.cluster_offset(700), geometry.cluster_size)
    assert not found.used.covers(geometry.cluster_offset(800), 1)


@pytest.mark.parametrize("target", [401, 900])
def test_a_chain_that_breaks_off(memory_path: Path, target: int) -> None:
    """The next cluster is not in the FAT yet, but a driver would read it."""
    image = _make(memory_path / "image", "fat32-one-fat")
    geometry = _geometry(image)
    patch(image, _entry_at(geometry, 0, 400), struct.pack("<I", target))
    found = read_map(image)
    assert found.certainty == "union" and "free in its FAT" in (found.reason or "")
    assert found.used.covers(geometry.cluster_offset(target), geometry.cluster_size)


@pytest.mark.parametrize("name", ["fat12", "fat16", "fat32"])
def test_dirty(memory_path: Path, name: str) -> None:
    """Directory entries may be on the disk before the FAT has their clusters."""
    image = _make(memory_path / "image", name)
    _fill(image, memory_path / "work", 5)
    geometry = _geometry(image)
    clean = read_map(image)
    patch(image, 65 if geometry.is_fat32 else 37, b"\1")
    found = read_map(image)
    assert found.certainty == "union" and "not unmounted" in (found.reason or "")
    assert found.used == clean.used
    number = _first_cluster(image, "round1/sub/short")
    for copy in range(geometry.fats):
        _clear_entry(image, geometry, copy, number)
    assert not read_entry_used(read_map_without_dirt(image, geometry), geometry, number)
    found = read_map(image)
    assert "free in its FAT" in (found.reason or "")
    assert read_entry_used(found, geometry, number)


def read_entry_used(found: AllocationMap, geometry: Geometry, number: int) -> bool:
    return found.used.covers(geometry.cluster_offset(number), geometry.cluster_size)


def read_map_without_dirt(image: Path, geometry: Geometry) -> AllocationMap:
    at = 65 if geometry.is_fat32 else 37
    patch(image, at, b"\0")
    found = read_map(image)
    patch(image, at, b"\1")
    return found


def _first_cluster(image: Path, path: str) -> int:
    shown = run(["mshowfat", "-i", str(image), f"::{path}"]).stdout.decode()
    return int(shown.split("<")[1].split(">")[0].split("-")[0])


def _clear_entry(image: Path, geometry: Geometry, copy: int, number: int) -> None:
    at = _entry_at(geometry, copy, number)
    raw = bytearray(image.read_bytes()[at : at + 4])
    if geometry.bits == 12:
        value = int.from_bytes(raw[:2], "little")
        raw[:2] = (value & (0xF if number % 2 else 0xF000)).to_bytes(2, "little")
    else:
        raw[: geometry.bits // 8] = bytes(geometry.bits // 8)
    patch(image, at, bytes(raw))


def test_flags_in_the_fat(memory_path: Path) -> None:
    image = _make(memory_path / "image", "fat16")
    for value in (0x7FFF, 0xBFFF):
        for copy in (0, 1):
            patch(image, _entry_at(_geometry(image), copy, 1), struct.pack("<H", value))
        found = read_map(image)
        assert found.certainty == "union" and "not unmounted" in (found.reason or "")


def test_partition_bigger_than_its_filesystem(memory_path: Path) -> None:
    image = _make(memory_path / "image", "fat16")
    alone = read_map(image)
    with image.open("r+b") as file:
        file.truncate(40 * MIB)
    found = read_map(image)
    assert found.certainty == "exact"
    assert found.used.covers(32 * MIB, 8 * MIB)
    assert found.used.clip(0, 32 * MIB) == alone.used


BITLOCKER = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")


@pytest.mark.parametrize(
    ("name", "offset", "data", "said"),
    [
        ("fat32", 42, b"\1\0", "unknown version"),
        ("fat32", 44, b"\1\0\0\0", "root directory"),
        ("fat32", 44, b"\0\xff\xff\0", "root directory"),
        ("fat32", 50, b"\0\4", "outside of the reserved"),
        ("fat32", 424, BITLOCKER, "BitLocker"),
        ("fat16", 22, b"\1\0", "shorter"),
        ("fat16", 17, b"\1\2", "root directory"),
        ("fat16", 32, b"\xff\xff\xff\0", "impossible cluster count"),
        ("fat16", 13, b"\x10", "leaves open"),
    ],
)
def test_every_doubt_is_all_of_it(
    memory_path: Path, name: str, offset: int, data: bytes, said: str
) -> None:
    image = _make(memory_path / "image", name)
    if said == "impossible cluster count":
        with image.open("r+b") as file:
            file.truncate(0xFFFFFF * 512)
        patch(image, 19, b"\0\0")
    patch(image, offset, data)
    found = read_map(image)
    assert found.certainty == "all", found
    assert said in (found.reason or "")
    assert found.used.covers(0, image.stat().st_size)


@pytest.mark.parametrize(
    ("number", "entry", "said"),
    [
        (0, 0xFFF0, "media byte"),
        (900, 1, "links to outside"),
        (900, 0xFFF0, "links to outside"),
    ],
)
def test_impossible_entries(memory_path: Path, number: int, entry: int, said: str) -> None:
    image = _make(memory_path / "image", "fat16")
    patch(image, _entry_at(_geometry(image), 1, number), struct.pack("<H", entry))
    found = read_map(image)
    assert found.certainty == "all"
    assert said in (found.reason or "")


def test_partition_smaller_than_its_filesystem_is_used_whole(memory_path: Path) -> None:
    image = _make(memory_path / "image", "fat16")
    with FileSource(image) as whole:
        found = allocation_map(PartSource(whole, 0, 31 * MIB))
    assert found.certainty == "all" and "only" in (found.reason or "")


@pytest.mark.parametrize("name", ["fat12", "fat16", "fat32-small"])
def test_random_damage_is_never_a_traceback(memory_path: Path, name: str) -> None:
    """A map within the source, whatever the bytes; unreadable sectors are all of it."""
    image = _make(memory_path / "image", name)
    _fill(image, memory_path / "work", 7)
    patch(image, 65 if "32" in name else 37, b"\1")
    content, geometry = image.read_bytes(), _geometry(image)
    root = (geometry.first_data - geometry.root_sectors) * geometry.sector_size
    places = [0, geometry.fat_offset(0), geometry.fat_offset(0) + 512, root]
    certainties: dict[str, int] = {}
    chance = random.Random(name)
    damaged = bytearray(content)
    for _ in range(DAMAGES // 3):
        spots = [
            chance.choice(places) + chance.randrange(512) for _ in range(chance.choice((1, 3, 30)))
        ]
        for spot in spots:
            damaged[spot] = chance.randrange(256)
        bad = [chance.choice(places) // 512] if chance.random() < 0.1 else []
        source = MemorySource(damaged, bad=bad)
        found = allocation_map(source)
        assert found.used.end <= source.size
        assert found.certainty == "all" or not bad
        for spot in spots:
            damaged[spot] = content[spot]
        certainties[found.certainty] = certainties.get(found.certainty, 0) + 1
    print(certainties)
    assert certainties["all"] and certainties["union"]
