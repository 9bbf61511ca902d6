"""The map of XFS against real filesystems: losing no file, equal to the kernel's view, and
right before and after the recovery of a log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from imager.allocation.xfs.allocated import allocation_map
from imager.allocation.xfs.identity import probe
from imager.allocation.xfs.layout import BASIC_BLOCK, SMALLEST_SECTOR, GroupHeader, Superblock
from imager.allocation.xfs.log import Log
from imager.blocksource import FileSource
from imager.errors import ImagerError
from imager.extents import Extent
from imager.process import run
from tests.loop import allocation_lab
from tests.loop.allocation_lab import (
    MIB,
    SHUTDOWN_LOGFLUSH,
    SHUTDOWN_NOLOGFLUSH,
    crash,
    damaged,
    device_of,
    fill,
    free_by_kernel,
    frozen,
    make_image,
    manifest,
    mounted,
    poison,
    read_map,
)
from tests.support.writelog import Write, crashed, read_log, recorded_file

pytestmark = pytest.mark.loop
memory_path = allocation_lab.memory_path  # the fixture

CRASHES = int(os.environ.get("IMAGER_CRASH_POINTS", "12"))
DAMAGES = int(os.environ.get("IMAGER_FUZZ_ROUNDS", "300"))

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_PUNCH_HOLE = 0x4030582B  # linux/falloc.h: FS_IOC_UNRESVSP, _IOW('X', 43, struct space_resv)

MATRIX = {
    "default": "-L label -m uuid=3e1f9f43-3fbb-4d4f-9f51-39b0cd54bd33",
    "1k": "-b size=1024",
    "2k": "-b size=2048",
    "sectors-4k": "-s size=4096",
    "32-groups": "-d agsize=16m,size=512m",
    "last-group-short": "-d agsize=20m,size=119m -b size=1024",
    "rmap-reflink": "-m rmapbt=1,reflink=1",
    "no-reflink-no-finobt": "-m rmapbt=0,reflink=0,finobt=0,inobtcount=0",
    "no-sparse-inodes": "-i sparse=0",
    "sparse-inodes-512-in-1k": "-i sparse=1,size=512 -b size=1024",
    "no-bigtime": "-m bigtime=0,inobtcount=0",
    "nrext64": "-i nrext64=1",
    "wide-directories": "-n size=16384 -b size=1024",
    "striped": "-d su=64k,sw=4 -l su=64k",
}

# This kernel can't mount version 4, so mkfs fills it from a prototype.
VERSION_4 = {
    "default": "-m crc=0",
    "1k": "-m crc=0 -b size=1024",
    "512": "-m crc=0 -b size=512 -i size=256 -n ftype=0",
    "log-version-1": "-m crc=0 -l version=1",
    "no-lazy-counters": "-m crc=0 -l lazy-count=0",
    "many-groups": "-m crc=0 -b size=1024 -d agsize=16m,size=256m",
}


def _mkfs(line: str) -> list[str]:
    """The variables are for filesystems below 300 MiB, which are made for tests only."""
    small = ["env", "TEST_DIR=/", "TEST_DEV=/", "QA_CHECK_FS=1"]
    return [*small, "mkfs.xfs", "-q", "-f", "-K", *line.split()]


def _image(path: Path, line: str) -> Path:
    size = re.search(r"-d agsize=\d+m,size=(\d+)m", line)
    return make_image(path, _mkfs(line), int(size[1]) * MIB if size else 64 * MIB)


def _repair_finds_nothing(image: Path) -> None:
    run(["xfs_repair", "-n", str(image)])


def _special(folder: Path, chance: random.Random) -> None:
    """Shared extents, holes punched, preallocated and much fragmented files."""
    files = [p for p in sorted(folder.glob("d*/*")) if p.is_file() and p.stat().st_size > 20_000]
    for path in files[:20]:
        _clone(path, path.with_suffix(".clone"))
    for path in files[10:40]:
        _punch(path, chance)
    for path in files[15:25]:
        with path.open("r+b") as file:
            file.seek(chance.randrange(10_000))
            file.write(chance.randbytes(9_000))


def _clone(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new, contextlib.suppress(OSError):
        fcntl.ioctl(new, _FICLONE, old.fileno())  # not without the feature


def _punch(path: Path, chance: random.Random) -> None:
    start, length = chance.randrange(16) * 1024, 4096 * (1 + chance.randrange(4))
    with path.open("r+b") as file:
        fcntl.ioctl(file, _PUNCH_HOLE, struct.pack("=hh4xqqiI16x", 0, 0, start, length, 0, 0))


@pytest.mark.parametrize("line", MATRIX.values(), ids=MATRIX)
def test_nothing_unused_is_missed(memory_path: Path, line: str) -> None:
    image = _image(memory_path / "image", line)
    with mounted(image) as folder:
        fill(folder, seed=len(line), largest=150_000)
        _special(folder, random.Random(line))
    with mounted(image, "loop,ro") as folder:
        before = manifest(folder)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    assert poison(image, found.used) > 16 * MIB
    _repair_finds_nothing(image)
    with mounted(image, "loop,ro") as folder:
        assert manifest(folder) == before


@pytest.mark.parametrize("line", MATRIX.values(), ids=MATRIX)
def test_equals_the_kernels_own_map_while_frozen(memory_path: Path, line: str) -> None:
    image = _image(memory_path / "image", line)
    with mounted(image) as folder:
        fill(folder, seed=len(line), files=60)
        _special(folder, random.Random(line))
        with frozen(folder):
            found, free = read_map(device_of(folder)), free_by_kernel(folder)
    # A freeze leaves the log in use on purpose, with nothing in it to recover.
    assert found.certainty == "union", found.reason
    assert not free.intersect(found.used)
    with mounted(image) as folder, frozen(folder):
        found, free = read_map(device_of(folder)), free_by_kernel(folder)
    assert found.certainty == "union", found.reason
    assert found.used.complement(image.stat().st_size) == free


@pytest.mark.parametrize("line", VERSION_4.values(), ids=VERSION_4)
def test_version_4(memory_path: Path, line: str) -> None:
    chance = random.Random(line)
    tree = memory_path / "tree"
    tree.mkdir()
    contents = [chance.randbytes(1 + chance.randrange(60_000)) for _ in range(120)]
    lines = ["/boot", "0 0", "d--755 0 0"]
    for number, content in enumerate(contents):
        (tree / f"file{number}").write_bytes(content)
        lines.append(f"file{number} ---644 0 0 {tree}/file{number}")
    prototype = memory_path / "prototype"
    prototype.write_text("\n".join([*lines, "$", ""]))
    image = _image(memory_path / "image", f"{line} -p {prototype}")
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    assert poison(image, found.used) > 16 * MIB
    _repair_finds_nothing(image)
    raw = image.read_bytes()
    assert all(content in raw for content in contents)


# --- logs in use ----------------------------------------------------------------------------------

KINDS = (
    ("", "logbsize=32k"),
    ("-b size=1024 -m rmapbt=1", "logbsize=32k"),
    ("-m reflink=0,finobt=0 -l size=1368b", "logbsize=64k"),
    ("-d agsize=16m,size=96m -m rmapbt=1", "logbsize=256k"),
    ("-l su=32k", "logbsize=32k"),
    ("-b size=1024 -n size=8192 -i sparse=0 -m reflink=0", "logbsize=32k"),
    ("-d agsize=40m,size=120m -l su=256k -m bigtime=0", "logbsize=256k"),
)


@pytest.fixture(scope="module")
def bases() -> Iterator[Callable[[int], Path]]:
    """A filled filesystem of each kind, made once, whose log is close to its end: most tests
    then see it wrap."""
    made: dict[int, Path] = {}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:

        def base(kind: int) -> Path:
            if kind not in made:
                made[kind] = _base_image(Path(folder, f"base{kind}"), kind)
            return made[kind]

        yield base


def _base_image(path: Path, kind: int) -> Path:
    line, option = KINDS[kind]
    image = _image(path, line)
    chance = random.Random(kind)
    with mounted(image, f"loop,{option}") as folder:
        fill(folder, kind, files=60, largest=150_000)
        while _log_position(image) < 0.93:
            for n in range(8):
                _make_directory(folder / f"churn{n}", chance)
                shutil.rmtree(folder / f"churn{n}", ignore_errors=True)
            _write_back(folder)
    return image


def _log_position(image: Path) -> float:
    """Laps of the log that were written."""
    with FileSource(image) as source:
        superblock = Superblock.parse(source.pread(0, SMALLEST_SECTOR))
        cycle, block = divmod(Log(source, superblock).sequence, 1 << 32)
    return cycle - 1 + block * BASIC_BLOCK / (superblock.log_blocks * superblock.block_size)


def _log_extent(image: Path) -> Extent:
    with FileSource(image) as source:
        superblock = Superblock.parse(source.pread(0, SMALLEST_SECTOR))
    size = superblock.block_size
    return Extent(superblock.log_first_block * size, superblock.log_blocks * size)


def _dirty_image(bases: Callable[[int], Path], path: Path, seed: int) -> Path:
    """A filesystem that stopped in the middle of its work, half of them for the second time;
    of every third seed a copy of a disk that goes on."""
    chance = random.Random(seed)
    kind = seed % len(KINDS)
    image = Path(shutil.copy(bases(kind), path))
    if chance.random() < 0.5:
        with mounted(image, f"loop,{KINDS[kind][1]}") as folder:
            _work(folder, chance)
            crash(folder, SHUTDOWN_LOGFLUSH)
    with mounted(image, f"loop,{KINDS[kind][1]}") as folder:
        _work(folder, chance)
        if seed % 3 == 2:
            shutil.copy(image, path.with_name("copy"))
        else:
            crash(folder, chance.choice((SHUTDOWN_LOGFLUSH, SHUTDOWN_NOLOGFLUSH)))
    if seed % 3 == 2:
        path.with_name("copy").rename(image)
    return image


def _write_back(folder: Path) -> None:
    """All that is dirty goes to the disk."""
    with frozen(folder):
        pass


def _work(folder: Path, chance: random.Random) -> None:
    """Writes, truncates, renames, removes, clones; an fsync commits what came before."""
    files = [p for p in sorted(folder.glob("d*/file*")) if p.is_file()]
    for step in range(chance.randrange(20, 400)):
        path = chance.choice(files)
        if not path.exists():
            continue
        action = chance.randrange(11)
        if action <= 2:
            files.append(folder / f"d{step % 5}" / f"new{step}")
            _write(files[-1], chance)
        elif action == 3:
            os.truncate(path, chance.randrange(200_000))
        elif action == 4:
            path.rename(folder / f"moved{step}")
        elif action == 5:
            path.unlink()
        elif action == 6:
            _make_directory(folder / f"dir{step}", chance)
        elif action == 7:
            _clone(path, path.with_name(f"clone{step}"))
        elif action == 8:
            _punch(path, chance)
        elif action == 9:
            os.setxattr(path, "user.big", chance.randbytes(chance.randrange(1, 9000)))
        else:
            _write(path, chance)


def _make_directory(fresh: Path, chance: random.Random) -> None:
    fresh.mkdir(exist_ok=True)
    for n in range(chance.randrange(80)):
        (fresh / f"{'name' * 20}{n}").touch()
    if chance.random() < 0.6:
        shutil.rmtree(fresh)  # freed blocks cancel what the log has of them


def _write(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.randbytes(int(100_000 * chance.random() ** 2)))
        if chance.random() < 0.3:
            file.flush()
            os.fsync(file.fileno())


def _after_recovery(image: Path) -> dict[str, object]:
    """Files as the kernel shows them once it has recovered the log; checked by xfs_repair."""
    with mounted(image) as folder:
        files = manifest(folder)
    _repair_finds_nothing(image)
    return files


@pytest.mark.parametrize("seed", range(CRASHES))
def test_poisoned_copy_recovers_to_the_same_files(
    bases: Callable[[int], Path], memory_path: Path, seed: int
) -> None:
    image = _dirty_image(bases, memory_path / "image", seed)
    found = read_map(image)
    print(found.certainty, found.reason, found.used.total, _log_position(image))
    assert found.certainty == "union", found.reason
    poisoned = Path(shutil.copy(image, memory_path / "poisoned"))
    assert poison(poisoned, found.used) > 8 * MIB
    assert _after_recovery(poisoned) == _after_recovery(image)


@pytest.mark.parametrize("seed", range(100, 100 + CRASHES // 2))
def test_recovered_state_equals_the_kernels(
    bases: Callable[[int], Path], memory_path: Path, seed: int
) -> None:
    """What is free after the recovery in memory is what is free after the kernel's, but for
    what the kernel frees and allocates when it finishes intents."""
    image = _dirty_image(bases, memory_path / "image", seed)
    found = read_map(image)
    with mounted(image):
        pass
    later = read_map(image)
    assert later.certainty == "exact"
    missed = later.used.subtract(found.used)
    print(f"{found.used.total} bytes, {later.used.total} after, {missed.total} newly allocated")
    assert missed.total < 1 * MIB
    assert found.used.total - later.used.total < 16 * MIB


class _History(NamedTuple):
    """All that a mounted filesystem wrote, from its start on."""

    start: Path
    writes: list[Write]


@pytest.fixture(scope="module")
def histories(bases: Callable[[int], Path]) -> Iterator[Callable[[int], _History]]:
    made: dict[int, _History] = {}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:

        def history(kind: int) -> _History:
            if kind not in made:
                made[kind] = _recorded_work(bases(kind), Path(folder), kind)
            return made[kind]

        yield history


def _recorded_work(base: Path, folder: Path, kind: int) -> _History:
    image, log, link = Path(shutil.copy(base, folder / "image")), folder / "log", folder / "link"
    with recorded_file(image, log) as file:
        link.symlink_to(file)  # nothing can be mounted beside the file itself
        with mounted(link, f"loop,{KINDS[kind][1]}") as tree:
            for part in range(3):
                _work(tree, random.Random(3 * kind + part))
    writes = read_log(log)
    for path in (image, log, link):
        path.unlink()
    return _History(base, writes)


@pytest.mark.parametrize("seed", range(CRASHES))
def test_poisoned_copy_recovers_after_a_power_failure(
    histories: Callable[[int], _History], memory_path: Path, seed: int
) -> None:
    """Between any two writes, with part of what was not flushed. A write to the log may be torn;
    a torn write of a metadata block is more than XFS itself survives."""
    chance = random.Random(seed)
    start, writes = histories((0, 3, 4)[seed % 3])
    image = Path(shutil.copy(start, memory_path / "image"))
    log = _log_extent(image)
    to_log = [n for n, write in enumerate(writes) if log.offset <= write.offset < log.end]
    cut = chance.choice((chance.randrange(1, len(writes)), chance.choice(to_log[1:])))
    crashed(image, writes[:cut], chance)
    if cut in to_log:
        torn = writes[cut]
        with image.open("r+b") as file:
            file.seek(torn.offset)
            sectors = chance.randrange(len(torn.data) // BASIC_BLOCK)
            file.write(torn.data[: sectors * BASIC_BLOCK])
    found = read_map(image)
    print(found.certainty, found.used.total, cut in to_log)
    assert found.certainty in ("exact", "union"), found.reason
    poisoned = Path(shutil.copy(image, memory_path / "poisoned"))
    assert poison(poisoned, found.used) > 8 * MIB
    assert _after_recovery(poisoned) == _after_recovery(image)


# --- doubts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sb 0; write -d rblocks 1000", "realtime"),
        ("sb 0; write -d logstart 0", "another device"),
        ("sb 0; write -d inprogress 1", "did not finish"),
        ("sb 0; write -d features_incompat 0x4000000b", "incompat feature bits 0x40000000"),
        ("sb 0; write -d features_incompat 0x1b", "needing repair"),
        ("sb 0; write -d features_ro_compat 0x8f00000d", "ro_compat feature bits 0x8f000000"),
        ("sb 0; write -d features_log_incompat 0x10", "log_incompat feature bits 0x10"),
        ("sb 0; write -d versionnum 0xb6a5", "version feature bits 0x200"),
        ("sb 0; write -d versionnum 0xb4a6", "unknown version 6"),
        ("sb 0; write -d features2 0x18b", "features2 feature bits 0x1"),
        ("sb 0; write -d dblocks 16385", "impossible number of allocation groups"),
        ("sb 0; write -d agcount 5", "impossible number of allocation groups"),
        ("sb 0; write -d logblocks 90000", "log is not inside"),
        ("agf 1; write -d freeblks 5", "counts 5 free blocks"),
        ("agf 1; write -d longest 5", "its btree"),
        ("agf 1; write -d bnoroot 2", "no free space btree at block 2"),
        ("agf 1; write -d bnoroot 99999", "points outside"),
        ("agf 1; write -d bnolevel 2", "not in its btree's order"),
        ("agf 1; write -d seqno 2", "no free space header"),
        ("agf 1; write -d flcount 2", "another count"),
        ("agf 1; write -d lsn 0x7000000000", "newer than the log"),
        ("agf 1; write -c freeblks 5", "the checksum of the free space header"),
        ("agf 1; addr bnoroot; write -c numrecs 0", "the checksum of block"),
        ("agf 1; addr bnoroot; write -d numrecs 9999", "too many records"),
        ("agf 1; addr bnoroot; write -d numrecs 0", "its btree 0"),
        ("agf 1; addr bnoroot; write -d recs[1].startblock 0", "out of order"),
        ("agf 1; addr bnoroot; write -d owner 0", "says it is another"),
        ("agf 1; addr bnoroot; write -d leftsib 9", "not in its btree's order"),
        ("agf 1; addr bnoroot; write -d rightsib 9", "cut off"),
        ("agfl 1; write -d bno[2] 3000", "is called free"),
        ("agfl 1; write -d bno[2] 50000", "points outside"),
    ],
)
def test_every_doubt_is_all_of_it(memory_path: Path, command: str, said: str) -> None:
    image = _image(memory_path / "image", "")
    options = [part for step in command.split("; ") for part in ("-c", step)]
    output = run(["xfs_db", "-x", *options, str(image)])
    found = read_map(image)
    assert found.certainty == "all", output.stdout + output.stderr
    assert said in (found.reason or "")
    assert found.used.covers(0, image.stat().st_size)


@pytest.mark.parametrize(
    ("option", "said"), [("-l logdev=", "another device"), ("-r rtdev=", "realtime")]
)
def test_second_devices_are_a_doubt(memory_path: Path, option: str, said: str) -> None:
    other = memory_path / "other"
    with other.open("wb") as file:
        file.truncate(64 * MIB)
    image = _image(memory_path / "image", f"{option}{other}")
    found = read_map(image)
    assert found.certainty == "all" and said in (found.reason or "")


def test_partition_bigger_or_smaller_than_its_filesystem(memory_path: Path) -> None:
    image = _image(memory_path / "image", "")
    alone = read_map(image)
    with image.open("r+b") as file:
        file.truncate(100 * MIB + 512)
        grown = read_map(image)
        file.truncate(64 * MIB - 4096)
        cut = read_map(image)
    assert grown.certainty == "exact"
    assert grown.used.covers(64 * MIB, 36 * MIB + 512)
    assert grown.used.clip(0, 64 * MIB) == alone.used
    assert cut.certainty == "all" and "only" in (cut.reason or "")


def test_a_growing_filesystem_is_a_doubt(memory_path: Path) -> None:
    image = _image(memory_path / "image", "")
    with image.open("r+b") as file:
        file.truncate(96 * MIB)
    with mounted(image) as folder:
        run(["xfs_growfs", str(folder)])
        crash(folder, SHUTDOWN_LOGFLUSH)
    found = read_map(image)
    assert found.certainty == "all" and "size or features" in (found.reason or "")


# --- damage ---------------------------------------------------------------------------------------


def _interesting_places(image: Path) -> list[tuple[int, int]]:
    """(offset, length) in bytes of what the map is read from."""
    with FileSource(image) as source:
        superblock = Superblock.parse(source.pread(0, SMALLEST_SECTOR))
        sector = superblock.sector_size
        places = [(0, 272)]
        for group in range(superblock.group_count):
            start = superblock.group_start(group)
            header = GroupHeader.parse(source.pread(start + sector, sector), superblock, group)
            places += [(start + sector, 224), (start + 3 * sector, 200)]
            for root in (header.by_block_root, header.by_size_root):
                places.append((start + root * superblock.block_size, 400))
    return places


def _log_places(image: Path) -> list[tuple[int, int]]:
    with FileSource(image) as source:
        superblock = Superblock.parse(source.pread(0, SMALLEST_SECTOR))
        head = Log(source, superblock).sequence & 0xFFFFFFFF
    start = superblock.log_first_block * superblock.block_size
    before = max(head - 400, 0)
    return [(start + before * BASIC_BLOCK, (head - before + 8) * BASIC_BLOCK), (start, 1024)]


def _map_strictly(image: Path) -> str:
    """The outer map never raises; the inner one only errors of ours."""
    found = read_map(image)
    with FileSource(image) as source, contextlib.suppress(ImagerError):
        filesystem = probe(source)
        if filesystem is not None:
            assert allocation_map(source, filesystem).used.end <= source.size
    return found.certainty


def test_random_damage_is_never_a_traceback(
    bases: Callable[[int], Path], memory_path: Path
) -> None:
    certainties: dict[str, int] = {}
    seeds = (0, 3)
    for seed in seeds:
        image = _dirty_image(bases, memory_path / "image", seed)
        places = [*_interesting_places(image), *_log_places(image) * 6]
        chance = random.Random(seed)
        for _ in range(DAMAGES // len(seeds)):
            with damaged(image, places, chance):
                certainty = _map_strictly(image)
            certainties[certainty] = certainties.get(certainty, 0) + 1
    print(certainties)
    assert certainties["all"] > 0


def test_damage_of_trees_without_checksums_is_never_a_traceback(memory_path: Path) -> None:
    """Most damage of version 5 ends at a checksum; here it gets to the parsers."""
    image = _image(memory_path / "image", "-m crc=0 -b size=1024")
    chance = random.Random(4)
    places = _interesting_places(image) + _log_places(image)
    certainties: dict[str, int] = {}
    for _ in range(DAMAGES):
        with damaged(image, places, chance):
            certainty = _map_strictly(image)
        certainties[certainty] = certainties.get(certainty, 0) + 1
    print(certainties)
    assert certainties["all"] > 0


@pytest.mark.parametrize(
    "line", ["", "-b size=1024 -m rmapbt=1", "-m crc=0", "-m crc=0 -b size=512"]
)
def test_damage_never_frees_a_used_byte(memory_path: Path, line: str) -> None:
    """A clean filesystem whose superblock, headers or btrees are damaged."""
    image = _image(memory_path / "image", line)
    if "crc=0" not in line:
        with mounted(image) as folder:
            fill(folder, len(line), files=60)
    sound = read_map(image)
    assert sound.certainty == "exact"
    places = _interesting_places(image)
    chance = random.Random(line)
    certainties: dict[str, int] = {}
    for _ in range(DAMAGES // 2):
        with damaged(image, places, chance):
            found = read_map(image)
        certainties[found.certainty] = certainties.get(found.certainty, 0) + 1
        assert not sound.used.subtract(found.used)
    print(certainties)


def test_speed(tmp_path: Path) -> None:
    """15 TiB with a log of 2 GiB, sparse: clean, and stopped in the middle. Printed only."""
    image = tmp_path / "image"
    run(["truncate", "-s", "15T", str(image)])
    run(["mkfs.xfs", "-q", "-K", "-l", "size=2038m", str(image)])
    for certainty in ("exact", "union"):
        start = time.perf_counter()
        found = read_map(image)
        print(f"{certainty}: {time.perf_counter() - start:.3f} s, {len(found.used)} ranges")
        assert found.certainty == certainty
        if certainty == "exact":
            with mounted(image) as folder:
                fill(folder, 1)
                crash(folder, SHUTDOWN_LOGFLUSH)
