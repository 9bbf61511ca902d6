"""Dirty journals of ext3/4: the map must hold before and after a replay."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from pathlib import Path

import pytest

from imager.allocation.ext.allocated import allocation_map
from imager.allocation.ext.blocks import Blocks
from imager.allocation.ext.identity import probe
from imager.allocation.ext.inode import open_inode
from imager.allocation.ext.jbd2 import MAGIC, Journal
from imager.allocation.ext.layout import SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock
from imager.blocksource import FileSource
from imager.errors import ImagerError
from imager.process import run
from tests.loop import allocation_lab
from tests.loop.allocation_lab import (
    MIB,
    SHUTDOWN_LOGFLUSH,
    SHUTDOWN_NOLOGFLUSH,
    crash,
    damaged,
    fill,
    make_image,
    manifest,
    mounted,
    poison,
    read_map,
)

pytestmark = pytest.mark.loop
memory_path = allocation_lab.memory_path  # the fixture

CRASHES = int(os.environ.get("IMAGER_CRASH_POINTS", "10"))
DAMAGES = int(os.environ.get("IMAGER_FUZZ_ROUNDS", "300"))

KINDS = (
    "mkfs.ext4 -b 4096 -O orphan_file,metadata_csum_seed",
    "mkfs.ext4 -b 1024 -J size=4",
    "mkfs.ext4 -O bigalloc -C 16384",
    "mkfs.ext3 -b 1024",
    "mkfs.ext3 -b 4096 -J size=4",
    "mkfs.ext4 -b 1024 -O ^metadata_csum,uninit_bg",
    "mkfs.ext4 -b 1024 -O ^64bit -J size=4",
    "mkfs.ext4 -b 2048 -O meta_bg,^resize_inode,inline_data",
    "mkfs.ext4 -b 1024 -O ^flex_bg,^metadata_csum",
    "mkfs.ext4 -b 4096 -g 2048",
)


def _dirty_image(path: Path, seed: int) -> Path:
    """A filesystem that stopped in the middle of its work."""
    chance = random.Random(seed)
    program, *options = KINDS[seed % len(KINDS)].split()
    image = make_image(path, [program, "-q", "-F", "-E", "nodiscard", *options])
    with mounted(image) as folder:
        fill(folder, seed, files=60)
    # Data in the journal soon fills it: the log wraps, and has blocks to escape.
    data = ",data=journal" if seed % 5 == 4 else ""
    with mounted(image, f"loop,commit=1{data}") as folder:
        _work(folder, chance)
        crash(folder, chance.choice((SHUTDOWN_LOGFLUSH, SHUTDOWN_NOLOGFLUSH)))
    return image


def _work(folder: Path, chance: random.Random) -> None:
    """Writes, truncates, renames, removes; fsync commits what came before."""
    for step in range(chance.randrange(20, 250)):
        files = [p for p in folder.glob("d*/*") if p.is_file()]
        path = chance.choice(files)
        action = chance.randrange(8)
        if action <= 2:
            _write(folder / f"d{step % 5}" / f"new{step}", chance)
        elif action == 3:
            # Not truncate(2): of a file with inline data it makes kernel 6.18 oops.
            with path.open("r+b") as file:
                file.truncate(chance.randrange(200_000))
        elif action == 4:
            path.rename(folder / f"moved{step}")
        elif action == 5:
            path.unlink()
        elif action == 6:
            fresh = folder / f"dir{step}"
            fresh.mkdir()
            for n in range(chance.randrange(80)):
                (fresh / f"{'name' * 20}{n}").touch()
            if chance.random() < 0.6:
                shutil.rmtree(fresh)  # freed directory blocks become revoke records
        else:
            _write(path, chance)


def _write(path: Path, chance: random.Random) -> None:
    with contextlib.suppress(FileNotFoundError), path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(100_000)))
        file.seek(-file.tell() % 4096, os.SEEK_END)
        file.write(MAGIC.to_bytes(4, "big") * 1024)
        if chance.random() < 0.3:
            file.flush()
            os.fsync(file.fileno())


def test_fast_commits_are_a_doubt(memory_path: Path) -> None:
    """They are no copies of blocks, so this reader can't follow them."""
    image = make_image(memory_path / "image", ["mkfs.ext4", "-q", "-F", "-O", "fast_commit"])
    with mounted(image) as folder:
        _write(folder / "file", random.Random(1))
        os.sync()
        crash(folder, SHUTDOWN_NOLOGFLUSH)
    found = read_map(image)
    assert found.certainty == "all" and "0x20 of a journal" in (found.reason or "")


def _after_replay(image: Path) -> tuple[dict[str, object], int]:
    """Files as the kernel shows them once it has replayed, and e2fsck's verdict."""
    with mounted(image, "loop,noinit_itable"):
        pass
    with mounted(image, "loop,ro") as folder:
        files = manifest(folder)
    return files, run(["e2fsck", "-fn", str(image)], accept=range(8)).returncode


@pytest.mark.parametrize("seed", range(CRASHES))
def test_poisoned_copy_replays_to_the_same_files(memory_path: Path, seed: int) -> None:
    image = _dirty_image(memory_path / "image", seed)
    found = read_map(image)
    print(found.certainty, found.reason, found.used.total)
    assert found.certainty == "union", found.reason
    poisoned = Path(shutil.copy(image, memory_path / "poisoned"))
    assert poison(poisoned, found.used) > 8 * MIB
    assert _after_replay(poisoned) == _after_replay(image)


@pytest.mark.parametrize("seed", range(100, 100 + CRASHES // 2))
def test_replay_in_memory_equals_e2fscks(memory_path: Path, seed: int) -> None:
    image = _dirty_image(memory_path / "image", seed)
    before = image.read_bytes()
    with FileSource(image) as source:
        superblock = Superblock.parse(source.pread(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE))
        log = open_inode(Blocks(source, superblock), superblock, superblock.journal_inode)
        journal = Journal(log.read, superblock.block_size, log.count)
        replayed = {block: journal.content(copy) for block, copy in journal.committed().items()}
    run(["e2fsck", "-E", "journal_only", "-fy", str(image)], accept=(0, 1))
    after = image.read_bytes()
    size = superblock.block_size
    # e2fsck itself changes the superblock, the journal and backups; it trims bg_itable_unused.
    skipped = {superblock.own_block, log.runs[0].physical} | _backups(superblock)
    trimmed = set(map(superblock.descriptor_block, range(superblock.descriptor_block_count)))
    for number in set(range(superblock.blocks_count)) - skipped:
        expected = replayed.get(number, before[number * size : (number + 1) * size])
        found = after[number * size : (number + 1) * size]
        if number in trimmed:
            step = superblock.descriptor_size
            expected, found = (_without_unused_inodes(b, step) for b in (expected, found))
        assert found == expected, f"block {number}"
    print(f"{len(replayed)} blocks replayed")
    assert replayed


def _backups(superblock: Superblock) -> set[int]:
    """Blocks of superblock and descriptor copies."""
    starts = [(n, superblock.first_block(n)) for n in range(1, superblock.group_count)]
    return {
        block
        for group, first in starts
        for block in range(first, first + superblock.overhead_blocks(group))
    }


def _without_unused_inodes(descriptors: bytes, step: int) -> bytes:
    """bg_itable_unused and bg_checksum cleared."""
    cleared = bytearray(descriptors)
    for at in range(0, len(cleared), step):
        cleared[at + 28 : at + 32] = bytes(4)
        if step >= 64:
            cleared[at + 50 : at + 52] = bytes(2)
    return bytes(cleared)


def test_random_damage_is_never_a_traceback(memory_path: Path) -> None:
    """Damaged superblocks, descriptors, inodes and journals: an error of ours, or a map."""
    certainties: dict[str, int] = {}
    seeds = range(0, len(KINDS), 2)
    for seed in seeds:
        image = _dirty_image(memory_path / "image", seed)
        places = _interesting_places(image)
        chance = random.Random(seed)
        for _ in range(DAMAGES // len(seeds)):
            with damaged(image, places, chance):
                certainty = _map_strictly(image)
            certainties[certainty] = certainties.get(certainty, 0) + 1
    print(certainties)
    assert certainties["all"] > 0


def _interesting_places(image: Path) -> list[tuple[int, int]]:
    """(offset, length) in bytes of what the map is read from."""
    with FileSource(image) as source:
        superblock = Superblock.parse(source.pread(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE))
        log = open_inode(Blocks(source, superblock), superblock, superblock.journal_inode)
        size = superblock.block_size
        descriptors = superblock.descriptor_block(0) * size
        table = superblock.group(0, source.pread(descriptors, superblock.descriptor_size))
        inode = (table.inode_table * size) + 7 * superblock.inode_size
        journal = log.runs[0].physical * size
    return [
        (SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE),
        (descriptors, size),
        (inode, superblock.inode_size),
        (journal, 256),
        (journal + size, 40 * size),
    ]


def _map_strictly(image: Path) -> str:
    """The outer map never raises; the inner one only errors of ours."""
    found = read_map(image)
    with FileSource(image) as source, contextlib.suppress(ImagerError):
        filesystem = probe(source)
        if filesystem is not None:
            assert allocation_map(source, filesystem).used.end <= source.size
    return found.certainty


@pytest.mark.parametrize("line", KINDS)
def test_damage_never_frees_a_used_byte(memory_path: Path, line: str) -> None:
    """A clean filesystem whose superblock, descriptors, journal inode or bitmaps are damaged."""
    program, *options = line.split()
    image = make_image(memory_path / "image", [program, "-q", "-F", "-E", "nodiscard", *options])
    with mounted(image, "loop,noinit_itable") as folder:
        fill(folder, len(line), files=60)
    sound = read_map(image)
    assert sound.certainty == "exact"
    places = [*_interesting_places(image)[:4], *_bitmap_places(image)]
    chance = random.Random(line)
    certainties: dict[str, int] = {}
    for _ in range(DAMAGES // 5):
        with damaged(image, places, chance):
            found = read_map(image)
        certainties[found.certainty] = certainties.get(found.certainty, 0) + 1
        assert not sound.used.subtract(found.used)
    print(certainties)


def _bitmap_places(image: Path) -> list[tuple[int, int]]:
    """Only with checksums: else nothing tells a bit that moved within its group."""
    with FileSource(image) as source:
        superblock = Superblock.parse(source.pread(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE))
        descriptors = superblock.descriptor_block(0) * superblock.block_size
        group = superblock.group(0, source.pread(descriptors, superblock.descriptor_size))
    if not superblock.has_metadata_checksums:
        return []
    return [(group.block_bitmap * superblock.block_size, superblock.block_size)] * 4
