"""The map of exFAT against real filesystems, filled and read through exfat-fuse."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.allocation import allocation_map
from imager.allocation.exfat.layout import Geometry, boot_checksum
from imager.blocksource import FileSource, PartSource
from imager.process import find_tool, run
from tests.loop import allocation_lab
from tests.loop.allocation_lab import MIB, make_image, patch, poison, read_map
from tests.support.disks import unmount
from tests.support.sources import MemorySource

pytestmark = [
    pytest.mark.loop,
    pytest.mark.skipif(find_tool("mkfs.exfat") is None, reason="exfatprogs is not installed"),
]
needs_driver = pytest.mark.skipif(
    find_tool("mount.exfat-fuse") is None, reason="exfat-fuse is not installed"
)
memory_path = allocation_lab.memory_path  # the fixture

DAMAGES = int(os.environ.get("IMAGER_FUZZ_ROUNDS", "300"))

# Options of mkfs.exfat, size in MiB.
MATRIX = {
    "default": ("", 64),
    "512": ("-c 512", 32),
    "128k": ("-c 128K", 128),
    "1m": ("-c 1M", 256),
    "small": ("-c 512 -b 64K", 8),
    "odd": ("-c 2K -b 64K", 33),
}


def _make(path: Path, name: str = "default") -> Path:
    options, size = MATRIX[name]
    return make_image(path, ["mkfs.exfat", *options.split()], size * MIB)


@contextlib.contextmanager
def _mounted(image: Path) -> Iterator[Path]:
    folder = image.with_name(f"{image.name}.mnt")
    folder.mkdir(exist_ok=True)
    device = run(["losetup", "-f", "--show", str(image)]).stdout.decode().strip()
    program = find_tool("mount.exfat-fuse")
    assert program is not None
    try:
        with subprocess.Popen(
            [program, "-d", device, str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as driver:
            while not folder.is_mount():
                assert driver.poll() is None
                time.sleep(0.02)
            try:
                yield folder
            finally:
                unmount(folder)
    finally:
        run(["losetup", "-d", device])


def _fill(folder: Path, seed: int, room: int) -> None:
    """Interleaved appends, deletions, then larger files into the holes."""
    chance = random.Random(seed)
    paths = [folder / f"d{n % 5}" / "sub" / f"a file name {n}" for n in range(80)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(3):
        for path in chance.sample(paths, len(paths)):
            with path.open("ab") as file:
                file.write(chance.randbytes(chance.randrange(room // 2000)))
    for path in chance.sample(paths, 30):
        path.unlink()
    (folder / "large").write_bytes(chance.randbytes(room // 8))
    for path in chance.sample([path for path in paths if path.exists()], 20):
        path.unlink()
    (folder / "empty").touch()
    (folder / "many").mkdir()
    for n in range(200):
        (folder / "many" / f"{'name' * 20}{n}").touch()


def _files(image: Path) -> dict[str, tuple[object, ...]]:
    with _mounted(image) as folder:
        return {
            str(path.relative_to(folder)): (
                path.stat().st_mode,
                path.stat().st_mtime_ns,
                hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
            )
            for path in folder.rglob("*")
        }


def _geometry(image: Path) -> Geometry:
    with image.open("rb") as file:
        geometry = Geometry.parse(file.read(512))
    assert geometry is not None
    return geometry


def _sum_up(image: Path) -> None:
    """A new checksum for a changed boot sector."""
    sector = _geometry(image).sector_size
    region = image.read_bytes()[: 11 * sector]
    patch(image, 11 * sector, struct.pack("<I", boot_checksum(region)) * (sector // 4))


@needs_driver
@pytest.mark.parametrize("name", MATRIX)
def test_nothing_unused_is_missed(memory_path: Path, name: str) -> None:
    image = _make(memory_path / "image", name)
    geometry = _geometry(image)
    with _mounted(image) as folder:
        _fill(folder, len(name), image.stat().st_size)
    before = _files(image)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    free = found.used.complement(image.stat().st_size)
    assert len(free) > 3
    assert all(extent.length % geometry.cluster_size == 0 for extent in free)
    assert poison(image, found.used) > image.stat().st_size // 4
    run(["fsck.exfat", "-n", str(image)])
    assert _files(image) == before
    print(f"{len(found.used)} ranges, {found.used.total} of {image.stat().st_size} bytes used")


@needs_driver
def test_dirty(memory_path: Path) -> None:
    """Directory entries may be on the disk before the bitmap has their clusters."""
    image = _make(memory_path / "image")
    with _mounted(image) as folder:
        _fill(folder, 5, image.stat().st_size)
    clean, before = read_map(image), _files(image)
    patch(image, 106, b"\2\0")
    found = read_map(image)
    assert (found.certainty, found.reason) == ("union", "exfat: it was not unmounted")
    assert found.used == clean.used
    geometry = _geometry(image)
    bitmap = geometry.cluster_offset(2)
    patch(image, bitmap + 8, bytes((geometry.clusters + 7) // 8 - 8))  # metadata lies before
    found = read_map(image)
    assert found.used == clean.used
    poison(image, found.used)
    assert _files(image) == before
    patch(image, 106, b"\0\0")
    assert clean.used.subtract(read_map(image).used)


def test_an_empty_one(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    geometry = _geometry(image)
    found = read_map(image)
    assert found.certainty == "exact"
    assert found.used.covers(0, geometry.heap_offset)
    run(["fsck.exfat", "-n", str(image)])
    assert poison(image, found.used) > 50 * MIB
    run(["fsck.exfat", "-n", str(image)])


def test_partition_bigger_and_smaller_than_its_filesystem(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    alone = read_map(image)
    with image.open("r+b") as file:
        file.truncate(80 * MIB)
    found = read_map(image)
    assert found.certainty == "exact"
    assert found.used.covers(64 * MIB, 16 * MIB)
    assert found.used.clip(0, 64 * MIB) == alone.used
    with FileSource(image) as whole:
        found = allocation_map(PartSource(whole, 0, 63 * MIB))
    assert found.certainty == "all" and "only" in (found.reason or "")


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (110, b"\2", "TexFAT"),
        (106, b"\1", "TexFAT"),
        (106, b"\4", "unreadable sectors"),
        (104, b"\0\2", "unknown revision 2.0"),
        (92, b"\xff\xff\xff\0", "add up"),
        (84, b"\1\0\0\0", "add up"),
        (96, b"\xff\xff\0\0", "add up"),
        (96, b"\3\0\0\0", "not one bitmap"),
    ],
)
def test_every_doubt_is_all_of_it(memory_path: Path, offset: int, data: bytes, said: str) -> None:
    image = _make(memory_path / "image")
    patch(image, offset, data)
    if said == "not one bitmap":  # the root directory made the bitmap's neighbour
        patch(image, _geometry(image).fat_offset + 12, b"\xff" * 4)
        patch(image, _geometry(image).cluster_offset(3), bytes(512))
    _sum_up(image)
    found = read_map(image)
    assert found.certainty == "all"
    assert said in (found.reason or "")
    assert found.used.covers(0, image.stat().st_size)


def testboot_checksum_and_metadata(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    geometry = _geometry(image)
    root = geometry.cluster_offset(geometry.root_cluster)
    for offset, data, said in (
        (200, b"?", "checksum of the boot region"),
        (geometry.fat_offset, b"?", "media type"),
        (geometry.fat_offset + 4 * geometry.root_cluster, b"\1\0\0\0", "chain"),
        (geometry.cluster_offset(2), b"\0", "metadata free"),
        (root + 32 + 24, b"\0", "size that it should have"),
        (root + 96, b"\x99", "unknown directory entry 0x99"),
    ):
        with image.open("rb") as file:
            file.seek(offset)
            saved = file.read(len(data))
        patch(image, offset, data)
        found = read_map(image)
        assert found.certainty == "all" and said in (found.reason or ""), found
        patch(image, offset, saved)
    assert read_map(image).certainty == "exact"


@needs_driver
def test_random_damage_is_never_a_traceback(memory_path: Path) -> None:
    image = _make(memory_path / "image", "small")
    with _mounted(image) as folder:
        _fill(folder, 1, 2 * MIB)
    clean, geometry = read_map(image), _geometry(image)
    patch(image, 106, b"\2")
    content, root = image.read_bytes(), geometry.cluster_offset(geometry.root_cluster)
    places = [0, geometry.fat_offset, root, root + 512, geometry.heap_offset + 40_000]
    chance = random.Random(1)
    certainties: dict[str, int] = {}
    for _ in range(DAMAGES):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 3, 30))):
            damaged[chance.choice(places) + chance.randrange(512)] = chance.randrange(256)
        if chance.random() < 0.5:
            region = bytes(damaged[: 11 * 512])
            damaged[11 * 512 : 12 * 512] = struct.pack("<I", boot_checksum(region)) * 128
        bad = [chance.choice(places) // 512] if chance.random() < 0.1 else []
        source = MemorySource(bytes(damaged), bad=bad)
        found = allocation_map(source)
        assert found.used.end <= source.size
        assert found.certainty == "all" or not bad or bad == [places[-1] // 512]
        assert not clean.used.subtract(found.used)
        certainties[found.certainty] = certainties.get(found.certainty, 0) + 1
    print(certainties)
    assert certainties["all"] and certainties["union"]
