"""The map of F2FS against real filesystems, filled by sload.f2fs and judged by fsck.f2fs.

What needs a kernel with F2FS is in ``tests/guest``.
"""

from __future__ import annotations

import os
import random
import re
import struct
import time
from pathlib import Path

import pytest

from imager.allocation import allocation_map
from imager.allocation.f2fs.checkpoint import Checkpoint, newest_checkpoint
from imager.allocation.f2fs.layout import SUPERBLOCK_OFFSETS, Superblock, checksum
from imager.blocksource import FileSource, PartSource
from imager.extents import Extents
from imager.process import find_tool, run
from tests.loop import allocation_lab
from tests.loop.allocation_lab import MIB, make_image, patch, poison, read_map
from tests.support.sources import MemorySource

pytestmark = [
    pytest.mark.loop,
    pytest.mark.skipif(find_tool("sload.f2fs") is None, reason="f2fs-tools are not installed"),
]
memory_path = allocation_lab.memory_path  # the fixture

DAMAGES = int(os.environ.get("IMAGER_FUZZ_ROUNDS", "300"))
BLOCK = 4096

MATRIX = {
    "default": "",
    "android": "-g android",
    "checksums": "-O extra_attr,inode_checksum,sb_checksum,inode_crtime",
    "compression": "-O extra_attr,compression",
    "many-features": "-O encrypt,quota,verity,lost_found,extra_attr,project_quota",
    "large-nat-bitmap": "-i",
    "large-sections": "-s 2",
    "heap": "-a 1",
}


def _make(path: Path, options: str = "", size: int = 128) -> Path:
    return make_image(path, ["mkfs.f2fs", "-q", "-f", "-t", "0", *options.split()], size * MIB)


def _fill(image: Path, tree: Path, seed: int) -> list[bytes]:
    """Files of random bytes in two loads; returns their contents."""
    chance = random.Random(seed)
    contents = []
    for load in range(2):
        for n in range(30):
            path = tree / f"load{load}" / f"d{load}{n % 4}" / f"file{n}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chance.randbytes(int(600_000 * chance.random() ** 3)))
            contents.append(path.read_bytes())
        with (tree / f"load{load}" / f"sparse{load}").open("wb") as file:
            file.seek(8 * MIB)
            file.write(b"end")
        run(["sload.f2fs", "-f", str(tree / f"load{load}"), str(image)])
    return contents


def _superblock(image: Path) -> Superblock:
    superblock = Superblock.parse(image.read_bytes()[1024:4096])
    assert superblock is not None
    return superblock


def _checkpoint(image: Path) -> Checkpoint:
    with FileSource(image) as source:
        return newest_checkpoint(source, _superblock(image))


def _valid_by_dump(image: Path, folder: Path) -> Extents:
    """The blocks of the main area that f2fs-tools call valid, in bytes."""
    here = Path.cwd()
    os.chdir(folder)  # dump.f2fs writes to where it is
    try:
        run(["dump.f2fs", "-s", "0~-1", str(image)])
    finally:
        os.chdir(here)
    main = _superblock(image).main
    blocks = []
    for part in (folder / "dump_sit").read_text().split("segno:")[1:]:
        segment, rest = part.split(None, 1)
        octets = "".join(re.findall(r"(?<=  )([0-9a-f]{2})\b", rest.split("\n", 1)[1]))
        bits = "".join(f"{byte:08b}" for byte in bytes.fromhex(octets))
        blocks += [main + int(segment) * 512 + n for n, bit in enumerate(bits) if bit == "1"]
    return Extents((block * BLOCK, BLOCK) for block in blocks)


def _fsck(image: Path) -> None:
    said = run(["fsck.f2fs", "--dry-run", str(image)]).stdout.decode()
    assert "[Ok..]" in said and "[Fail]" not in said, said


@pytest.mark.parametrize("options", MATRIX.values(), ids=MATRIX)
def test_nothing_unused_is_missed(memory_path: Path, options: str) -> None:
    image = _make(memory_path / "image", options)
    contents = _fill(image, memory_path / "tree", len(options))
    _fsck(image)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    superblock = _superblock(image)
    assert found.used.covers(0, superblock.main * BLOCK)
    in_main = found.used.clip(superblock.main * BLOCK, superblock.main_segments * 512 * BLOCK)
    assert in_main == _valid_by_dump(image, memory_path)
    assert in_main.total // BLOCK == _checkpoint(image).valid_blocks
    assert poison(image, found.used) > 64 * MIB
    _fsck(image)
    raw = image.read_bytes()
    kept = {raw[at : at + BLOCK] for at in range(0, len(raw), BLOCK)}
    for content in contents:
        for at in range(0, len(content) - BLOCK, BLOCK):
            assert content[at : at + BLOCK] in kept
    print(f"{len(found.used)} ranges, {found.used.total} of {len(raw)} bytes used")


def test_an_empty_one(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    assert poison(image, found.used) > 64 * MIB
    _fsck(image)


def test_partition_bigger_and_smaller_than_its_filesystem(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    alone = read_map(image)
    with image.open("r+b") as file:
        file.truncate(140 * MIB)
    found = read_map(image)
    assert found.certainty == "exact"
    assert found.used.covers(128 * MIB, 12 * MIB)
    assert found.used.clip(0, 128 * MIB) == alone.used
    with FileSource(image) as whole:
        found = allocation_map(PartSource(whole, 0, 127 * MIB))
    assert found.certainty == "all" and "only" in (found.reason or "")


def test_on_several_devices(memory_path: Path) -> None:
    other = memory_path / "other"
    with other.open("wb") as file:
        file.truncate(128 * MIB)
    image = make_image(
        memory_path / "image", ["mkfs.f2fs", "-q", "-f", "-c", str(other)], 128 * MIB
    )
    found = read_map(image)
    assert found.certainty == "all" and "several devices" in (found.reason or "")


def _patch_superblocks(image: Path, offset: int, data: bytes) -> None:
    for start in SUPERBLOCK_OFFSETS:
        patch(image, start + offset, data)


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (2180, b"\2", "zoned"),
        (2182, b"\1", "unknown feature bits 0x10000"),
        (16, b"\x0e", "4 KiB"),
        (68, b"\xff", "follow each other"),
        (84, b"\xff", "follow each other"),
        (2201, b"/dev/sdb", "several devices"),
        (300, b"?", "checksum is wrong"),
    ],
)
def test_doubtful_superblocks(memory_path: Path, offset: int, data: bytes, said: str) -> None:
    image = _make(memory_path / "image", MATRIX["checksums"] if said[0] == "c" else "", 64)
    _patch_superblocks(image, offset, data)
    found = read_map(image)
    assert found.certainty == "all"
    assert said in (found.reason or "")
    assert found.used.covers(0, image.stat().st_size)


def test_superblocks_that_differ(memory_path: Path) -> None:
    image = _make(memory_path / "image", size=64)
    patch(image, SUPERBLOCK_OFFSETS[1] + 300, b"?")
    assert "superblocks differ" in (read_map(image).reason or "")


def _rewrite_checkpoint(image: Path, offset: int, data: bytes) -> None:
    """Changes the newest checkpoint's head and tail, with good checksums."""
    checkpoint = _checkpoint(image)
    raw = bytearray(checkpoint.raw)
    raw[offset : offset + len(data)] = data
    raw[4092:] = struct.pack("<I", checksum(bytes(raw[:4092])))
    for block in (checkpoint.start, checkpoint.start + checkpoint.pack_blocks - 1):
        patch(image, block * BLOCK, bytes(raw))


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (132, struct.pack("<I", 0x4), "not unmounted"),
        (132, struct.pack("<I", 0x15), "waits for repair"),
        (132, struct.pack("<I", 0x1005), "waits for repair"),
        (132, struct.pack("<I", 0x8005), "waits for repair"),
        (144, b"\7", "count different blocks"),
        (156, b"\7", "wrong size"),
        (40, b"\xff\xff\xff", "current segments"),
    ],
)
def test_doubtful_checkpoints(memory_path: Path, offset: int, data: bytes, said: str) -> None:
    image = _make(memory_path / "image", size=64)
    _rewrite_checkpoint(image, offset, data)
    found = read_map(image)
    assert found.certainty == "all"
    assert said in (found.reason or ""), found.reason


def test_files_synced_after_the_last_checkpoint(memory_path: Path) -> None:
    """The checkpoint of an unmount stays the newest until the next one, but a mount looks for
    synced files behind it."""
    image = _make(memory_path / "image", size=64)
    checkpoint, main = _checkpoint(image), _superblock(image).main
    (segment,) = struct.unpack_from("<I", checkpoint.raw, 40)
    (offset,) = struct.unpack_from("<H", checkpoint.raw, 70)
    node = (main + segment * 512 + offset) * BLOCK
    patch(image, node + BLOCK - 12, struct.pack("<Q", checkpoint.version))
    found = read_map(image)
    assert found.certainty == "all" and "synced after" in (found.reason or "")


def test_the_older_checkpoint_is_none_to_believe(memory_path: Path) -> None:
    image = _make(memory_path / "image")
    _fill(image, memory_path / "tree", 1)
    checkpoint = _checkpoint(image)
    patch(image, checkpoint.start * BLOCK + 500, b"????")
    assert _checkpoint(image).start != checkpoint.start  # as a mount would take it
    for start in (_superblock(image).checkpoint, _superblock(image).checkpoint + 512):
        patch(image, start * BLOCK + 500, b"????")
    found = read_map(image)
    assert found.certainty == "all" and "no checkpoint" in (found.reason or "")


def test_random_damage_is_never_a_traceback(memory_path: Path) -> None:
    image = _make(memory_path / "image", size=64)
    content, checkpoint = image.read_bytes(), _checkpoint(image)
    superblock = _superblock(image)
    places = [1024, 5120, checkpoint.start * BLOCK, superblock.sit * BLOCK]
    places += [(checkpoint.start + n) * BLOCK for n in range(checkpoint.pack_blocks)]
    places.append((superblock.sit + superblock.sit_blocks) * BLOCK)
    chance = random.Random(1)
    certainties: dict[str, int] = {}
    damaged = bytearray(content)
    for _ in range(DAMAGES):
        spots = [
            chance.choice(places) + chance.randrange(chance.choice((256, 3000)))
            for _ in range(chance.choice((1, 3, 30)))
        ]
        for spot in spots:
            damaged[spot] = chance.randrange(256)
        bad = [chance.choice(places[:4]) // 512] if chance.random() < 0.1 else []
        source = MemorySource(damaged, bad=bad)
        found = allocation_map(source)
        assert found.used.end <= source.size
        assert found.certainty == "all" or not bad
        certainties[found.certainty] = certainties.get(found.certainty, 0) + 1
        for spot in spots:
            damaged[spot] = content[spot]
    print(certainties)
    assert certainties["all"] and certainties["exact"]


def test_speed(tmp_path: Path) -> None:
    """Printed, not asserted. So large that the checkpoint's bitmaps need blocks of their own."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 40)
    run(["mkfs.f2fs", "-q", "-f", "-t", "0", str(image)])
    assert _large_superblock(image).checkpoint_payload > 0
    start = time.perf_counter()
    found = read_map(image)
    print(f"8 TiB F2FS: {time.perf_counter() - start:.3f} s, {len(found.used)} ranges")
    assert (found.certainty, found.reason) == ("exact", None)


def _large_superblock(image: Path) -> Superblock:
    with image.open("rb") as file:
        superblock = Superblock.parse(file.read(4096)[1024:])
    assert superblock is not None
    return superblock
