"""Btrfs, one device or several: poison what the maps call unused, then check and compare."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from imager.allocation import AllocationMap
from imager.allocation.btrfs.allocated import allocation_map
from imager.allocation.btrfs.identity import probe
from imager.allocation.btrfs.superblock import (
    BLOCK_GROUP_TREE,
    SUPERBLOCK_SIZE,
    SUPERBLOCKS,
    Superblock,
    read_superblock,
)
from imager.allocation.btrfs.tree import Item
from imager.blocksource import FileSource
from imager.errors import ImagerError, NotRecognized
from imager.extents import Extents
from imager.layout import read_layouts
from imager.loopdevice import loop_device
from imager.process import run
from tests.loop import allocation_lab
from tests.loop.allocation_lab import (
    MIB,
    differences,
    fill,
    make_image,
    manifest,
    mounted,
    poison,
    read_map,
)
from tests.loop.btrfs_sets import check_set, mounted_set
from tests.support.btrfsnodes import (
    Node,
    newest,
    nodes,
    patch_superblock,
    use_block_group_tree,
    write_leaf,
    write_node,
)
from tests.support.commandline import imager
from tests.support.writelog import Write, crashed, read_log, recorded_file

pytestmark = [
    pytest.mark.loop,
    pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root"),
    pytest.mark.skipif(shutil.which("mkfs.btrfs") is None, reason="mkfs.btrfs is not installed"),
]
memory_path = allocation_lab.memory_path  # the fixture

CRASHES = int(os.environ.get("IMAGER_CRASH_POINTS", "12"))
DAMAGES = int(os.environ.get("IMAGER_FUZZ_ROUNDS", "300"))

MKFS = ["mkfs.btrfs", "-q", "-f", "-K"]
SIZE = 256 * MIB  # DUP for data and metadata needs nearly as much


def _make(path: Path, options: str, size: int = SIZE) -> Path:
    return make_image(path, [*MKFS, *options.split()], size)


def _make_set(folder: Path, options: str, count: int, size: int = 256 * MIB) -> list[Path]:
    """Images of a filesystem over several devices."""
    paths = [make_image(folder / f"disk{n}", ["true"], size) for n in range(count)]
    run([*MKFS, *options.split(), *map(str, paths)])
    return paths


def _maps(paths: Sequence[Path]) -> list[AllocationMap]:
    """The map of each disk, with the others as its companions."""
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(FileSource(path)) for path in paths]
        return [layout.volumes[0].allocation for layout in read_layouts(sources)]


def _use(folder: Path, seed: int) -> None:
    """What else Btrfs can do: subvolumes, snapshots, reflinks, holes."""
    fill(folder, seed)
    run(["btrfs", "subvolume", "create", str(folder / "sub")])
    fill(folder / "sub", seed + 1, files=40)
    run(["btrfs", "subvolume", "snapshot", "-r", str(folder / "sub"), str(folder / "snap")])
    chance = random.Random(seed)
    originals = [p for p in sorted(folder.glob("d*/*")) if p.stat().st_size > 8192]
    for number, path in enumerate(originals[:20]):
        run(["cp", "--reflink=always", str(path), str(folder / f"reflink{number}")])
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(chance.randbytes(2000))
    punched = folder / "punched"
    punched.write_bytes(chance.randbytes(300_000))
    os.sync()
    run(["fallocate", "-p", "-o", "65536", "-l", "131072", str(punched)])
    for path in sorted((folder / "sub").glob("d*/*"))[::3]:
        path.unlink()


SINGLE = {
    "single": ("-m single", ""),
    "dup": ("-m dup -d dup", ""),
    "mixed": ("-M", ""),
    "zstd": ("-m dup", ",compress-force=zstd"),
    "space-cache-v1": ("-R ^free-space-tree", ",space_cache=v1"),
    "nodes-4k": ("-n 4096 -m single", ""),
    "nodes-64k": ("-n 65536", ""),
    "old-features": ("-O ^skinny-metadata,^no-holes,^extref", ""),
    "quota": ("-R quota", ""),
    "nodatacow": ("", ",nodatacow"),
    "no-inline": ("", ",max_inline=0"),
    "xxhash": ("--csum xxhash", ""),
    "sha256": ("--csum sha256", ""),
    "blake2": ("--csum blake2", ""),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_one_device(memory_path: Path, kind: str) -> None:
    options, mount_options = SINGLE[kind]
    image = _make(memory_path / "image", options)
    with mounted(image, f"loop{mount_options}") as folder:
        _use(folder, seed=len(kind))
    with mounted(image, "loop,ro") as folder:
        before = manifest(folder)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    wiped = poison(image, found.used)
    print(f"{kind}: {found.used.total} used, {wiped} poisoned, {len(found.used)} ranges")
    assert wiped > 64 * MIB
    assert check_set([image]) == 0
    with mounted(image, "loop,ro") as folder:
        assert manifest(folder) == before
        assert before


SETS = {
    "raid0": ("-d raid0 -m raid0", 2),
    "raid0-of-3": ("-d raid0 -m raid1", 3),
    "raid1": ("-d raid1 -m raid1", 2),
    "raid1-of-3": ("-d raid1 -m raid1", 3),
    "raid1c3": ("-d raid1c3 -m raid1c3", 3),
    "raid1c4": ("-d raid1c4 -m raid1c4", 4),
    "raid10": ("-d raid10 -m raid10", 4),
    "single": ("-d single -m dup", 2),
    "mixed-raid1": ("-M -d raid1 -m raid1", 2),
}


@pytest.mark.parametrize("kind", SETS)
def test_several_devices(memory_path: Path, kind: str) -> None:
    options, count = SETS[kind]
    paths = _make_set(memory_path, options, count, 192 * MIB)
    with mounted_set(paths) as folder:
        _use(folder, seed=count)
    with mounted_set(paths, "ro") as folder:
        before = manifest(folder)
    found = _maps(paths)
    assert [(m.certainty, m.reason) for m in found] == [("exact", None)] * count
    for path, its in zip(paths, found, strict=True):
        assert poison(path, its.used) > 32 * MIB
    print(kind, [its.used.total for its in found])
    assert check_set(paths) == 0
    with mounted_set(paths) as folder:
        run(["btrfs", "scrub", "start", "-B", str(folder)])
        assert manifest(folder) == before
        said = run(["btrfs", "scrub", "status", str(folder)]).stdout.decode()
    assert re.search(r"Error summary:\s+no errors found", said), said


@pytest.mark.parametrize(("level", "count"), [("raid5", 3), ("raid6", 4)])
def test_parity_is_kept_whole(memory_path: Path, level: str, count: int) -> None:
    """A lost disk is computed from the others, whatever lies in them."""
    paths = _make_set(memory_path, f"-d {level} -m {level}", count, 192 * MIB)
    with mounted_set(paths) as folder:
        _use(folder, seed=5)
    with mounted_set(paths, "ro") as folder:
        before = manifest(folder)
    for path, its in zip(paths, _maps(paths), strict=True):
        assert its.certainty == "all" and "RAID5/6" in (its.reason or ""), its.reason
        poison(path, its.used)
    run(["dd", "if=/dev/zero", f"of={paths[1]}", "bs=1M", "count=1", "conv=notrunc"])
    with mounted_set([paths[0], *paths[2:]], "ro,degraded") as folder:
        assert manifest(folder) == before


def test_missing_member_keeps_what_is_allotted(memory_path: Path) -> None:
    """One disk alone has the chunk tree, and of the others every second stripe."""
    paths = _make_set(memory_path, "-d single -m raid1", 2)
    with mounted_set(paths) as folder:
        _use(folder, seed=6)
        run(["btrfs", "balance", "start", "-f", "-mconvert=raid0", "-sconvert=raid1", str(folder)])
    with mounted_set(paths, "ro") as folder:
        before = manifest(folder)
    together, alone = _maps(paths), [_maps([path])[0] for path in paths]
    assert [its.certainty for its in together] == ["exact", "exact"]
    print([(its.reason, its.used.total) for its in alone])
    for path, whole, its in zip(paths, alone, together, strict=True):
        assert whole.certainty == "all"
        assert "is not here; what is allotted to chunks is kept whole" in (whole.reason or "")
        assert not its.used.subtract(whole.used)
        assert poison(path, whole.used) > 32 * MIB
    with mounted_set(paths, "ro") as folder:
        assert manifest(folder) == before
    assert check_set(paths) == 0


def test_missing_member_with_the_chunk_tree_keeps_all(memory_path: Path) -> None:
    paths = _make_set(memory_path, "-d single -m single", 2)
    with mounted_set(paths) as folder:
        fill(folder, seed=6)
    found = [_maps([path])[0] for path in paths]
    assert (found[1].certainty, found[1].used) == ("all", Extents.whole(256 * MIB))
    assert found[1].reason == "btrfs: device 1 of the filesystem is not here"


def test_missing_mirror_is_no_loss(memory_path: Path) -> None:
    """RAID1 metadata is on each of two disks."""
    paths = _make_set(memory_path, "-d raid0 -m raid1", 2)
    with mounted_set(paths) as folder:
        fill(folder, seed=7)
    assert [_maps([path])[0] for path in paths] == _maps(paths)


def test_two_devices_of_one_number_are_a_doubt(memory_path: Path) -> None:
    paths = _make_set(memory_path, "-d raid1 -m raid1", 2)
    copy = Path(shutil.copy(paths[0], memory_path / "copy"))
    found = _maps([*paths, copy])
    assert [its.certainty for its in found] == ["all"] * 3
    assert "two devices say that they are number 1" in (found[1].reason or "")


def test_device_of_another_time_is_a_doubt(memory_path: Path) -> None:
    paths = _make_set(memory_path, "-d raid1 -m raid1", 2)
    with mounted_set(paths[:1], "degraded") as folder:
        (folder / "news").write_bytes(b"the other disk doesn't know")
    found = _maps(paths)
    assert [its.certainty for its in found] == ["all"] * 2
    assert "of another time" in (found[0].reason or "")


def test_metadata_uuid(memory_path: Path) -> None:
    image = _make(memory_path / "image", "")
    with mounted(image) as folder:
        fill(folder, seed=8)
    run(["btrfstune", "-m", str(image)])
    with mounted(image, "loop,ro") as folder:
        before = manifest(folder)
    found = read_map(image)
    assert found.certainty == "exact", found.reason
    poison(image, found.used)
    assert check_set([image]) == 0
    with mounted(image, "loop,ro") as folder:
        assert manifest(folder) == before


def test_seed_and_what_grows_from_it(memory_path: Path) -> None:
    seed, sprout = _make(memory_path / "seed", "-m single"), memory_path / "sprout"
    make_image(sprout, ["true"], SIZE)
    with mounted(seed) as folder:
        fill(folder, seed=9, files=20)
    run(["btrfstune", "-f", "-S", "1", str(seed)])
    assert "seed device" in (read_map(seed).reason or "")
    with mounted_set([seed], "ro") as folder, loop_device(str(sprout)) as device:
        run(["btrfs", "device", "add", "-f", "-K", device, str(folder)])
    found = _maps([seed, sprout])
    assert [its.certainty for its in found] == ["all", "all"]
    print([its.reason for its in found])


def test_paused_balance_is_a_doubt(memory_path: Path) -> None:
    image = _make(memory_path / "image", "-m single", 320 * MIB)
    with mounted(image, "loop") as folder:
        fill(folder, seed=10)
    with mounted(image, "loop") as folder:
        run(["btrfs", "balance", "start", "--bg", "--full-balance", str(folder)])
        run(["btrfs", "balance", "pause", str(folder)], accept=(0, 1, 2))
        # Frozen: a superblock that is being written would be copied in parts.
        run(["fsfreeze", "--freeze", str(folder)])
        try:
            copy = Path(shutil.copy(image, memory_path / "copy"))
        finally:
            run(["fsfreeze", "--unfreeze", str(folder)])
        run(["btrfs", "balance", "cancel", str(folder)], accept=(0, 1, 2))
    found = read_map(copy)
    print(found.certainty, found.reason)
    assert (found.certainty, found.reason) in (
        ("all", "btrfs: a balance is at work"),
        ("exact", None),  # it was too fast to be paused
    )
    assert read_map(image).certainty == "exact"


def test_partition_bigger_and_smaller_than_its_filesystem(memory_path: Path) -> None:
    image = _make(memory_path / "image", "")
    alone = read_map(image)
    with image.open("r+b") as file:
        file.truncate(SIZE + 3 * MIB)
    found = read_map(image)
    assert found.certainty == "exact"
    assert found.used == alone.used.union(Extents([(SIZE, 3 * MIB)]))
    with image.open("r+b") as file:
        file.truncate(SIZE - 4096)
    found = read_map(image)
    assert found.certainty == "all" and "there are only" in (found.reason or "")


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (0xBC + 1, 0x11, "zoned"),
        (0xBC + 1, 0x21, "extent tree v2"),
        (0xBC + 1, 0x41, "stripe tree"),
        (0xBC + 4, 1, "unknown incompat feature bits 0x100000000"),
        (0xB4 + 1, 1, "unknown compat_ro feature bits"),
        (0xC4, 9, "unknown checksum type 9"),
        (0x38, 4, "superblock flags"),
        (0x90 + 1, 0, "sector size"),
        (0x38 + 4, 2, "superblock flags"),
        (0x70 + 8, 1, "add up"),
        (0x88, 2, "devices"),
        (0x58 + 1, 0x11, "tree node"),
        (0x48, 0, "newer than the first"),
    ],
)
def test_doubtful_superblock(memory_path: Path, offset: int, value: int, said: str) -> None:
    image = _make(memory_path / "image", "")
    patch_superblock(image, offset, bytes([value]))
    found = read_map(image)
    assert found.certainty == "all"
    assert said in (found.reason or ""), found.reason


def test_newer_copy_of_the_superblock_is_a_doubt(memory_path: Path) -> None:
    image = _make(memory_path / "image", "")
    patch_superblock(image, 0x48, bytes([99]), copy=1)
    assert "is newer than the first" in (read_map(image).reason or "")
    patch_superblock(image, 0x48, bytes([0]), copy=1)
    assert read_map(image).certainty == "exact"


def test_one_bad_copy_of_a_node_is_no_doubt(memory_path: Path) -> None:
    image = _make(memory_path / "image", "-m dup")
    before = read_map(image)
    chunk_tree = newest(image, owner=3)
    assert len(chunk_tree.places) == 2
    for expected, place in zip(("exact", "all"), chunk_tree.places, strict=True):
        with image.open("r+b") as file:
            file.seek(place + 200)
            file.write(b"damage")
        found = read_map(image)
        assert found.certainty == expected
        assert expected == "all" or found == before
    assert "wrong checksum" in (found.reason or "")


def test_block_group_tree(memory_path: Path) -> None:
    image = _make(memory_path / "image", "-m single")
    use_block_group_tree(image)
    assert read_map(image).certainty == "exact"
    with mounted(image) as folder:
        fill(folder, seed=11)
    with mounted(image, "loop,ro") as folder:
        before = manifest(folder)
    with FileSource(image) as source:
        assert read_superblock(source).read_only_compat & BLOCK_GROUP_TREE
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    assert poison(image, found.used) > 64 * MIB
    assert check_set([image]) == 0
    with mounted(image, "loop,ro") as folder:
        assert manifest(folder) == before


@pytest.mark.parametrize("node_size", ["4096", "65536"])
def test_converted_from_ext4(memory_path: Path, node_size: str) -> None:
    """Its chunks have odd places, and files that hold the old filesystem."""
    if shutil.which("btrfs-convert") is None:
        pytest.skip("btrfs-convert is not installed")
    ext4 = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "nodiscard"]
    image = make_image(memory_path / "image", ext4, SIZE)
    with mounted(image) as folder:
        fill(folder, seed=12)
    run(["btrfs-convert", "-N", node_size, str(image)])
    with mounted(image, "loop,ro") as folder:
        before = manifest(folder)
    found = read_map(image)
    print(found.certainty, found.reason, found.used.total)
    assert found.certainty == "exact", found.reason
    poison(image, found.used)
    assert check_set([image]) == 0
    with mounted(image, "loop,ro") as folder:
        assert manifest(folder) == before


def test_after_adding_converting_replacing_removing_and_resizing(memory_path: Path) -> None:
    paths = _make_set(memory_path, "-d single -m dup", 1, 384 * MIB)
    added = [make_image(memory_path / f"added{n}", ["true"], 384 * MIB) for n in range(3)]
    with contextlib.ExitStack() as stack:
        devices = [stack.enter_context(loop_device(str(path))) for path in added]
        with mounted_set(paths) as folder:
            fill(folder, seed=13)
            run(["btrfs", "device", "add", "-f", "-K", *devices[:2], str(folder)])
            run(["btrfs", "balance", "start", "-dconvert=raid1", "-mconvert=raid1", str(folder)])
            run(["btrfs", "replace", "start", "-f", "-B", "1", devices[2], str(folder)])
            run(["btrfs", "device", "remove", devices[0], str(folder)])
            run(["btrfs", "filesystem", "resize", "1:320M", str(folder)])
            fill(folder / "d1", seed=14, files=40)
            before = manifest(folder)
    members = [added[2], added[1]]
    found = _maps(members)
    assert [(its.certainty, its.reason) for its in found] == [("exact", None)] * 2
    assert found[0].used.covers(320 * MIB, 64 * MIB)
    assert [its.certainty for its in _maps([paths[0], added[0]])] == ["all", "all"]
    for path, its in zip(members, found, strict=True):
        assert poison(path, its.used) > 64 * MIB
    assert check_set(members) == 0
    with mounted_set(members) as folder:
        assert manifest(folder) == before


def test_replacement_at_work_is_a_doubt(memory_path: Path) -> None:
    image = _make(memory_path / "image", "")
    devices = newest(image, owner=4)
    for state, certainty in ((0, "exact"), (1, "all"), (3, "exact"), (4, "all"), (9, "all")):
        item = Item((0, 250, 0), bytes(32) + state.to_bytes(8, "little") + bytes(40))
        others = [found for found in devices.items if found.key != item.key]
        write_leaf(image, devices, sorted([*others, item]))
        found = read_map(image)
        assert found.certainty == certainty, found.reason
        assert certainty == "exact" or "is being replaced" in (found.reason or "")


@pytest.mark.parametrize("key", [((1 << 64) - 4, 248, 0), ((1 << 64) - 8, 132, 5)])
def test_traces_of_a_balance_are_a_doubt(memory_path: Path, key: tuple[int, int, int]) -> None:
    image = _make(memory_path / "image", "")
    roots = newest(image, owner=1)
    write_leaf(image, roots, sorted([*roots.items, Item(key, bytes(439))]))
    assert read_map(image).reason == "btrfs: a balance is at work"


def test_accounts_that_do_not_add_up_are_a_doubt(memory_path: Path) -> None:
    """An extent fewer, a block group that counts otherwise, extents outside of all chunks."""
    image = _make(memory_path / "image", "")
    extents = newest(image, owner=2)
    is_extent = [item.key[1] == 169 for item in extents.items]
    missing = is_extent.index(True)
    key, data = extents.items[is_extent.index(False)]
    used = struct.unpack_from("<Q", data)[0] + 4096
    cases = [
        [item for number, item in enumerate(extents.items) if number != missing],
        [Item(k, struct.pack("<Q", used) + d[8:] if k == key else d) for k, d in extents.items],
        [*extents.items, Item((1 << 50, 168, 4096), bytes(24))],
        [Item((4096, 168, 8 << 20), bytes(24)), *extents.items],
    ]
    for items in cases:
        write_leaf(image, extents, items)
        found = read_map(image)
        print(found.reason)
        assert found.certainty == "all"
    write_leaf(image, extents, extents.items)
    assert read_map(image).certainty == "exact"


def test_random_damage_is_never_a_traceback(memory_path: Path) -> None:
    """Behind sound checksums: bytes of nodes and superblocks changed, nodes put for others."""
    image = _damageable(memory_path)
    found = [node for node in nodes(image) if _is_needed(image, node)]
    print(f"{len(found)} nodes")
    head = image.read_bytes()[SUPERBLOCKS[0] : SUPERBLOCKS[0] + SUPERBLOCK_SIZE]
    certainties: dict[str, int] = {}
    for seed in range(DAMAGES):
        chance = random.Random(seed)
        node = chance.choice(found)
        raw = bytearray(chance.choice(found).raw if chance.random() < 0.1 else node.raw)
        for _ in range(chance.choice((1, 1, 2, 8))):
            used = min(len(raw), 120 + 25 * len(node.items)) if node.level == 0 else 300
            area = chance.choice((range(32, used), range(len(raw) - 1000, len(raw))))
            raw[chance.choice(area)] = chance.choice((0, 1, 0xFF, chance.randrange(256)))
        if chance.random() < 0.8:
            write_node(image, node, bytes(raw))
        else:
            patch_superblock(image, chance.randrange(0x48, 0x400), chance.randbytes(1))
        with FileSource(image) as source, contextlib.suppress(ImagerError):
            # Directly, without the net of the registry, which catches other errors too.
            its = probe(source)
            assert its
            assert allocation_map(source, its, ()).used.end <= source.size
        certainty = read_map(image).certainty
        certainties[certainty] = certainties.get(certainty, 0) + 1
        patch_superblock(image, 0, head)
        write_node(image, node, node.raw)
    print(certainties)
    assert certainties["all"] > 0
    assert read_map(image).certainty == "union"


def _is_needed(image: Path, node: Node) -> bool:
    """Whether the map is read from it: there are older ones too, and other trees."""
    write_node(image, node, bytes(len(node.raw)))
    certainty = read_map(image).certainty
    write_node(image, node, node.raw)
    return certainty == "all"


def _damageable(folder: Path) -> Path:
    """With a log tree."""
    image = _make(folder / "image", "-m single -n 4096", 128 * MIB)
    with mounted(image, "loop,commit=300") as tree:
        fill(tree, seed=15, files=40)
        return _copies_with_log_tree(tree, [image])[0]


@pytest.mark.parametrize("options", ["-d raid0 -m raid1", "-d single -m raid0"])
def test_log_tree_over_two_devices(memory_path: Path, options: str) -> None:
    paths = _make_set(memory_path, options, 2, 192 * MIB)
    with mounted_set(paths, "commit=300") as folder:
        fill(folder, seed=16)
        copies = _copies_with_log_tree(folder, paths)
    found = _maps(copies)
    assert [its.certainty for its in found] == ["union", "union"], found[0].reason
    poisoned = [Path(shutil.copy(path, path.with_suffix(".poisoned"))) for path in copies]
    for path, its in zip(poisoned, found, strict=True):
        assert poison(path, its.used) > 64 * MIB
    verdicts, trees = [], []
    for disks in (copies, poisoned):
        with mounted_set(disks):
            pass
        with mounted_set(disks, "ro") as folder:
            trees.append(_without_stubs(folder))
        verdicts.append(check_set(disks))
    assert verdicts == [0, 0]
    assert trees[0] == trees[1]
    assert trees[0]["news"]


def _copies_with_log_tree(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """The disks of a mounted filesystem right after an fsync. The kernel may commit at any time,
    and does whenever a test beside this one calls sync(2); then the copies are worth nothing."""
    for attempt in range(300):
        os.sync()
        _write(folder / "news", random.Random(attempt))
        _sync(folder / "news")
        before = _superblocks(paths)
        if not before or not all(superblock.log_root for superblock in before):
            continue
        copies = [Path(shutil.copy(path, path.with_suffix(".copy"))) for path in paths]
        if before == _superblocks(paths):
            return copies
    pytest.fail("no fsync made a log tree")


def _superblocks(paths: Sequence[Path]) -> list[Superblock]:
    """None of them while the kernel writes them: the copies on a disk differ then."""
    with contextlib.ExitStack() as stack, contextlib.suppress(NotRecognized):
        return [read_superblock(stack.enter_context(FileSource(path))) for path in paths]
    return []


class _History(NamedTuple):
    """A filesystem at rest, and all that was written to it in a while of work with fsync."""

    options: str
    base: Path
    writes: list[Write]


def _history(folder: Path, options: str) -> _History:
    base = _make(folder / "base", options, 160 * MIB)
    with mounted(base) as tree:
        fill(tree, len(options), files=60)
    work, log, link = Path(shutil.copy(base, folder / "work")), folder / "log", folder / "link"
    with recorded_file(work, log) as file:
        link.symlink_to(file)  # nothing can be mounted beside the file itself
        with mounted(link, "loop,commit=300") as tree:
            _work(tree, random.Random(options))
    writes = read_log(log)
    for path in (work, log, link):
        path.unlink()
    return _History(options, base, writes)


def _work(folder: Path, chance: random.Random) -> None:
    """Writes, truncates, renames, removes, reflinks, snapshots; fsync makes log trees."""
    for step in range(150):
        files = [p for p in folder.glob("d*/*") if p.is_file()]
        path = chance.choice(files)
        action = chance.randrange(12)
        if action <= 4:
            _write(folder / f"d{step % 5}" / f"new{step}", chance)
        elif action <= 6:
            _write(path, chance)
        elif action == 7:
            os.truncate(path, chance.randrange(200_000))
        elif action == 8:
            path.rename(folder / f"moved{step}")
        elif action == 9:
            path.unlink()
        elif action == 10:
            clone = folder / "d1" / f"clone{step}"
            run(["cp", "--reflink=always", str(path), str(clone)])
            _sync(clone)
        elif chance.random() < 0.3:
            run(["btrfs", "subvolume", "snapshot", str(folder), str(folder / f"snap{step}")])
        elif chance.random() < 0.5:
            os.sync()


def _write(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        if chance.random() < 0.2:
            os.posix_fallocate(file.fileno(), 0, chance.randrange(1, 100_000))
        file.write(chance.randbytes(int(150_000 * chance.random() ** 3)))
    if chance.random() < 0.7:
        _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


HISTORIES = ("", "-M", "-n 4096 -m single", "-n 65536", "--csum blake2", "-R ^free-space-tree")


@pytest.fixture(scope="module")
def history_of() -> Iterator[Callable[[str], _History]]:
    """A history for these options of mkfs; the last one is kept."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        kept: list[_History] = []

        def get(options: str) -> _History:
            if not kept or kept[0].options != options:
                kept[:] = [_history(Path(folder), options)]
            return kept[0]

        yield get


@pytest.mark.parametrize("seed", range(CRASHES))
def test_poisoned_copy_replays_to_the_same_files(
    memory_path: Path, history_of: Callable[[str], _History], seed: int
) -> None:
    options = HISTORIES[seed * len(HISTORIES) // CRASHES]
    _, base, writes = history_of(options)
    chance = random.Random(seed)
    image = Path(shutil.copy(base, memory_path / "image"))
    # The unmount's commit at the end is no crash.
    crashed(image, writes[: chance.randrange(len(writes) * 95 // 100)], chance)
    found = read_map(image)
    print(f"{options!r}: {found.certainty}, {found.reason}, {found.used.total}")
    assert found.certainty in ("exact", "union"), found.reason
    poisoned = Path(shutil.copy(image, memory_path / "poisoned"))
    again = Path(shutil.copy(image, memory_path / "again"))
    assert poison(poisoned, found.used) > 32 * MIB
    assert check_set([poisoned]) == check_set([image])
    expected, verdict = _after_replay(image)
    files, poisoned_verdict = _after_replay(poisoned)
    changed = differences(files, expected)
    print(changed)
    if changed:  # a second replay of the same image says what comes from the time of replaying
        by_chance = differences(_after_replay(again)[0], expected)
        assert changed.keys() <= by_chance.keys(), changed
        assert not differences(_without_times(files), _without_times(expected)), changed
    assert expected and (verdict, poisoned_verdict) == (0, 0)


_STUB = 2  # inode number of a snapshot in a snapshot: an empty folder, its times made up


def _after_replay(image: Path) -> tuple[dict[str, object], int]:
    """Files as the kernel shows them once it has replayed, and the checker's verdict."""
    with mounted(image, "loop"):
        pass
    with mounted(image, "loop,ro") as folder:
        files = _without_stubs(folder)
    return files, check_set([image])


def _without_times(files: dict[str, object]) -> dict[str, object]:
    """Entries of a manifest without the times of change."""
    assert all(isinstance(entry, tuple) for entry in files.values())
    return {
        name: (content, identity, sizes[:2], attributes)
        for name, (content, identity, sizes, attributes) in files.items()  # type: ignore[misc]
    }


def _without_stubs(folder: Path) -> dict[str, object]:
    stubs = {str(p.relative_to(folder)) for p in folder.glob("*/*") if p.lstat().st_ino == _STUB}
    return {name: entry for name, entry in manifest(folder).items() if name not in stubs}


def test_capture_of_a_set_leaves_free_space_out(repo: Path, memory_path: Path) -> None:
    """Through the command line: each disk's map comes from what the other one holds."""
    paths = _make_set(memory_path, "-d raid0 -m raid0", 2, 192 * MIB)
    with mounted_set(paths) as folder:
        fill(folder, seed=18)
    with mounted_set(paths, "ro") as folder:
        before = manifest(folder)
    taken = imager("capture", *paths, "--name", "pair", "--repo", repo, "--json").json
    found = [disk["partitions"][0]["certainty"] for disk in taken["disks"]]
    assert found == ["exact", "exact"]
    back = [memory_path / "back0", memory_path / "back1"]
    imager("restore", "pair@latest", *back, "--yes", "--repo", repo)
    for path in back:
        assert path.stat().st_blocks * 512 < 64 * MIB
    assert check_set(back) == 0
    with mounted_set(back, "ro") as folder:
        assert manifest(folder) == before
