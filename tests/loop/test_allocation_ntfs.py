"""The map of NTFS against real filesystems, filled and read through ntfs-3g."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.allocation import AllocationMap, allocation_map
from imager.allocation.ntfs.boot import BootSector
from imager.allocation.ntfs.record import ATTRIBUTE_LIST, DATA, attributes, runs
from imager.allocation.ntfs.volume import CLUSTER_BITMAP, LOG_FILE, MFT, VOLUME, Volume
from imager.blocksource import FileSource, PartSource
from imager.process import find_tool, run
from tests.loop import allocation_lab
from tests.loop.allocation_lab import MIB, fill, make_image, manifest, patch, poison, read_map
from tests.support.disks import unmount
from tests.support.sources import MemorySource

pytestmark = [
    pytest.mark.loop,
    pytest.mark.skipif(find_tool("ntfs-3g") is None, reason="ntfs-3g is not installed"),
]
memory_path = allocation_lab.memory_path  # the fixture

CRASHES = max(1, int(os.environ.get("IMAGER_CRASH_POINTS", "10")) // 2)
DAMAGES = int(os.environ.get("IMAGER_FUZZ_ROUNDS", "300"))

# Options of mkfs.ntfs, size in MiB.
MATRIX = {
    "4k": ("", 64),
    "512": ("-c 512", 64),
    "1k": ("-c 1024", 40),
    "64k": ("-c 65536", 96),
    "2m": ("-c 2097152", 512),
    "4k-sectors": ("-s 4096", 64),
    "1k-sectors-16k": ("-s 1024 -c 16384", 64),
}


def _make(path: Path, name: str = "4k", size: int | None = None) -> Path:
    options, megabytes = MATRIX[name]
    command = ["mkfs.ntfs", "-q", "-F", "-f", *options.split()]
    return make_image(path, command, size or megabytes * MIB)


@contextlib.contextmanager
def _mounted(image: Path, options: str = "", *, alive: float | None = None) -> Iterator[Path]:
    """Mounted by ntfs-3g, which is waited for: it still writes after the unmount. It is killed
    when it has been ``alive`` for so many seconds."""
    folder = image.with_name(f"{image.name}.mnt")
    folder.mkdir(exist_ok=True)
    program = find_tool("ntfs-3g")
    assert program is not None
    own = f"no_detach,permissions,streams_interface=xattr,compression{options}"
    with subprocess.Popen(
        [program, str(image), str(folder), "-o", own],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as driver:
        while not folder.is_mount():
            assert driver.stderr and driver.poll() is None, driver.stderr and driver.stderr.read()
            time.sleep(0.02)
        timer = threading.Timer(alive or 0, driver.kill)
        if alive is not None:
            timer.start()
        try:
            yield folder
        finally:
            if alive is not None:
                timer.join()
                driver.wait()
            unmount(folder)


def _files(image: Path) -> dict[str, object]:
    with _mounted(image, ",ro") as folder:
        return manifest(folder)


def _check(image: Path) -> None:
    """ntfsresize compares $Bitmap with all runs; what it only would do is not done."""
    run(["ntfsresize", "--info", "--force", str(image)])
    run(["ntfsfix", "--no-action", str(image)])


def _boot(image: Path) -> BootSector:
    boot = BootSector.parse(image.read_bytes()[:512])
    assert boot is not None
    return boot


@contextlib.contextmanager
def _volume(image: Path) -> Iterator[Volume]:
    with FileSource(image) as source:
        yield Volume(source, _boot(image))


@pytest.mark.parametrize("name", MATRIX)
def test_nothing_unused_is_missed(memory_path: Path, name: str) -> None:
    image = _make(memory_path / "image", name)
    boot = _boot(image)
    with _mounted(image) as folder:
        fill(folder, len(name), files=60 if name == "2m" else 160)
        if boot.cluster_size <= 4096:
            _write_compressed(folder)
    before = _files(image)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    assert found.used.covers(boot.size, image.stat().st_size - boot.size)  # the boot sector's copy
    free = found.used.complement(image.stat().st_size)
    assert all(extent.length % boot.cluster_size == 0 for extent in free)
    assert poison(image, found.used) > image.stat().st_size // 8
    _check(image)
    assert _files(image) == before
    print(f"{len(found.used)} ranges, {found.used.total} of {image.stat().st_size} bytes used")


def _write_compressed(folder: Path) -> None:
    packed = folder / "compressed"
    packed.mkdir()
    os.setxattr(packed, "system.ntfs_attrib_be", struct.pack(">I", 0x810))
    for n in range(12):
        content = random.Random(n).randbytes(3000) + b"the same again " * 20_000
        (packed / f"file{n}").write_bytes(content)
    assert (packed / "file3").stat().st_blocks * 512 < 200_000


def test_fragmented_mft(memory_path: Path) -> None:
    """The $MFT grows into what a full disk has left, until it needs an attribute list."""
    image = _make(memory_path / "image", "1k", size=12 * MIB)
    with _mounted(image) as folder:
        _fill_completely(folder)
        for path in sorted(folder.glob("small*"))[::2]:
            path.unlink()
        _fill_with_empty_files(folder)
    with _volume(image) as volume:
        base = volume.record(MFT)
        assert ATTRIBUTE_LIST in {item.kind for item in base}
        print(f"{volume.record_count} records")
    before = _files(image)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    print(f"{len(found.used)} ranges, free: {poison(image, found.used)}")
    _check(image)
    assert _files(image) == before


def _fill_completely(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for n in range(100_000):
            (folder / f"small{n:05}").write_bytes(bytes([n % 256]) * 1000)


def _fill_with_empty_files(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for n in range(100_000):
            (folder / f"e{n}").touch()


def test_clusters_of_files_outside_of_the_bitmap(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    with _mounted(image) as folder:
        (folder / "victim").write_bytes(b"important" * 10_000)
    offset = image.read_bytes().find(b"important" * 100)
    clean, boot = read_map(image), _boot(image)
    with _volume(image) as volume:
        bits = volume.record(CLUSTER_BITMAP)
        place = next(runs(item, boot.clusters) for item in bits if item.kind == DATA)[0].cluster
    assert place is not None
    marks = place * boot.cluster_size + offset // boot.cluster_size // 8
    patch(image, marks, b"\0\0")
    found = read_map(image)
    assert found.certainty == "union" and "free in its $Bitmap" in (found.reason or "")
    assert found.used.covers(offset, 90_000)
    assert clean.used.subtract(found.used).total < 16 * boot.cluster_size


def _patch_volume_flags(image: Path, flags: int) -> None:
    boot = _boot(image)
    record = boot.mft_cluster * boot.cluster_size + VOLUME * boot.record_size
    raw = image.read_bytes()[record : record + boot.record_size]
    at = raw.index(b"\3\1", raw.index(struct.pack("<I", 0x70)) + 24)
    patch(image, record + at + 2, struct.pack("<H", flags))


def test_marked_dirty(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    clean = read_map(image)
    _patch_volume_flags(image, 1)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("union", "ntfs: it is marked dirty")
    assert found.used == clean.used
    _patch_volume_flags(image, 0x4000)
    assert "chkdsk" in (read_map(image).reason or "")


def _restart_page(number: int, client: int, flags: int) -> bytes:
    page = bytearray(4096)
    page[:4] = b"RSTR"
    struct.pack_into("<HH", page, 4, 0x1E, 9)
    struct.pack_into("<IIHHH", page, 16, 4096, 4096, 0x30, 1, 1)
    struct.pack_into("<QHHHH", page, 0x30, number, 1, 0xFFFF, client, flags)
    page[0x1E:0x20] = b"\7\0"
    for end in range(512, 4097, 512):
        page[end - 2 : end] = b"\7\0"
    return bytes(page)


@pytest.mark.parametrize(
    ("pages", "said"),
    [
        ([(5, 0, 0), (6, 0xFFFF, 0)], None),
        ([(6, 0, 2), (5, 0, 0)], None),
        ([(5, 0xFFFF, 0), (6, 0, 0)], "waits to be replayed"),
        ([(6, 0, 0), (5, 0xFFFF, 0)], "waits to be replayed"),
    ],
)
def test_log(memory_path: Path, pages: list[tuple[int, int, int]], said: str | None) -> None:
    image = _make(memory_path / "image")
    at = _log_offset(image)
    patch(image, at, b"".join(_restart_page(*page) for page in pages))
    found = read_map(image)
    assert found.certainty == ("all" if said else "exact"), found.reason
    assert (said or "") in (found.reason or "")


def test_damaged_log(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    at = _log_offset(image)
    for damage, said in ((b"RCRD", "restart page"), (_restart_page(1, 0, 2)[:4000], "whole")):
        patch(image, at, damage)
        found = read_map(image)
        assert found.certainty == "all" and said in (found.reason or "")
    patch(image, at, b"\xff" * 4096)
    assert read_map(image).certainty == "exact"
    patch(image, at + 100_000, b"RCRD")
    assert read_map(image).certainty == "all"


def _log_offset(image: Path) -> int:
    boot = _boot(image)
    with _volume(image) as volume:
        data = next(item for item in volume.record(LOG_FILE) if item.kind == DATA)
        place = runs(data, boot.clusters)[0].cluster
    assert place is not None
    return place * boot.cluster_size


@pytest.mark.parametrize(
    ("start", "awake"),
    [(b"hibr", False), (b"HIBR", False), (b"wake", True), (b"\0\0\0\0", True), (b"", False)],
)
def test_hibernated_windows(memory_path: Path, start: bytes, awake: bool) -> None:
    image = _make(memory_path / "image")
    with _mounted(image) as folder:
        (folder / "Hiberfil.sys").write_bytes(start + bytes(10_000) if start else b"")
    found = read_map(image)
    assert found.certainty == ("exact" if awake else "all")
    assert awake or "hiber" in (found.reason or "")


def test_copy_taken_while_mounted(memory_path: Path) -> None:
    """Whatever its flags say: what a mount of the copy shows must survive the poison."""
    image = _make(memory_path / "image")
    copy, poisoned = memory_path / "copy", memory_path / "poisoned"
    with _mounted(image) as folder:
        for seed in range(3):
            fill(folder / ".", seed, files=40)
            copy.write_bytes(image.read_bytes())
            found = read_map(copy)
            print(found.certainty, found.reason)
            poisoned.write_bytes(copy.read_bytes())
            poison(poisoned, found.used)
            assert _files(poisoned) == _files(copy)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("seed", range(CRASHES))
def test_killed_driver(memory_path: Path, seed: int) -> None:
    image = _make(memory_path / "image", "1k" if seed % 2 else "4k")
    chance = random.Random(seed)
    with _mounted(image) as folder:
        fill(folder, seed, files=30)
    with (
        _mounted(image, alive=chance.uniform(0.05, 0.4)) as folder,
        contextlib.suppress(OSError),
    ):
        _write_until_the_end(folder, chance)
    found = read_map(image)
    print(found.certainty, found.reason)
    poisoned = memory_path / "poisoned"
    poisoned.write_bytes(image.read_bytes())
    assert poison(poisoned, found.used) > 8 * MIB
    assert _readable(poisoned) == _readable(image)


def _readable(image: Path) -> dict[str, object]:
    """What a mount shows, with the errors of what a killed driver left unreadable."""
    with _mounted(image, ",ro") as folder:
        return {str(path.relative_to(folder)): _seen(path) for path in sorted(folder.rglob("*"))}


def _seen(path: Path) -> object:
    try:
        content = path.read_bytes() if path.is_file() else b""
        return path.lstat().st_size, hashlib.sha256(content).hexdigest()
    except OSError as error:
        return error.errno


def _write_until_the_end(folder: Path, chance: random.Random) -> None:
    for n in range(1_000_000):
        files = [path for path in folder.glob("[dn]*/*") if path.is_file()]
        if len(files) > 20:
            for path in chance.sample(files, 5):
                path.unlink()
        path = folder / f"new{n % 5}" / f"file{n}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(chance.randbytes(chance.randrange(100_000)))


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
        (510, b"\0\0", "signature"),
        (14, b"\1", "must be zero"),
        (64, b"\3", "size of MFT records"),
        (48, b"\xff" * 8, "outside of the filesystem"),
        (48, b"\5", "where the boot sector says"),
    ],
)
def test_every_doubt_is_all_of_it(memory_path: Path, offset: int, data: bytes, said: str) -> None:
    image = _make(memory_path / "image")
    patch(image, offset, data)
    found = read_map(image)
    assert found.certainty == "all"
    assert said in (found.reason or "")
    assert found.used.covers(0, image.stat().st_size)


def _damaged_maps(content: bytes, boot: BootSector, rounds: int) -> Iterator[AllocationMap]:
    mft = boot.mft_cluster * boot.cluster_size
    places = [0, *(mft + n * boot.record_size for n in (0, 0, 2, 3, 6, 6, 30, 40, 50))]
    chance = random.Random(1)
    damaged = bytearray(content)
    for _ in range(rounds):
        spots = [
            chance.choice(places) + chance.randrange(512) for _ in range(chance.choice((1, 3, 30)))
        ]
        for spot in spots:
            damaged[spot] = chance.choice((0, 0xFF, damaged[spot] ^ 1, chance.randrange(256)))
        bad = [chance.choice(places) // 512] if chance.random() < 0.1 else []
        source = MemorySource(damaged, bad=bad)
        found = allocation_map(source)
        assert found.used.end <= source.size
        assert found.certainty == "all" or not bad
        for spot in spots:
            damaged[spot] = content[spot]
        yield found


def test_random_damage_is_never_a_traceback(memory_path: Path) -> None:
    image = _make(memory_path / "image", size=16 * MIB)
    with _mounted(image) as folder:
        fill(folder, 1, files=30)
    clean = read_map(image)
    certainties: dict[str, int] = {}
    for found in _damaged_maps(image.read_bytes(), _boot(image), DAMAGES):
        assert not clean.used.subtract(found.used)
        certainties[found.certainty] = certainties.get(found.certainty, 0) + 1
    print(certainties)
    assert certainties["all"] and certainties["exact"]


def test_records_are_checked(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    with _volume(image) as volume:
        record = next(volume.records_in_use())
    assert {item.kind for item in attributes(record)} >= {DATA}
    boot = _boot(image)
    at = boot.mft_cluster * boot.cluster_size + 5 * boot.record_size
    for offset, said in ((0, "record 5 is damaged"), (510, "not written whole")):
        saved = image.read_bytes()[at + offset : at + offset + 2]
        patch(image, at + offset, b"??")
        found = read_map(image)
        assert found.certainty == "all" and said in (found.reason or "")
        patch(image, at + offset, saved)
    assert read_map(image).certainty == "exact"


def test_speed(memory_path: Path) -> None:
    """Printed, not asserted."""
    image = _make(memory_path / "image", size=256 * MIB)
    with _mounted(image) as folder:
        for n in range(4000):
            (folder / f"file{n}").touch()
    start = time.perf_counter()
    found = read_map(image)
    print(f"NTFS with 4000 files: {time.perf_counter() - start:.3f} s, {len(found.used)} ranges")
    assert found.certainty == "exact"
