"""Members of software RAID: superblocks of all versions, and the map of a mirror's member."""

from __future__ import annotations

import random
import struct

import pytest

from imager.allocation import AllocationMap, Companion, allocation_map, identify
from imager.extents import Extents
from imager.layout import read_layout
from tests.support.mdmembers import (
    DATA,
    FIELDS,
    MIB,
    OFFSETS,
    SIZE,
    VERSIONS,
    member,
    superblock_090,
    swap,
)
from tests.support.sources import MemorySource


def maps(*images: bytes) -> list[AllocationMap]:
    sources = [MemorySource(image) for image in images]
    companions = [Companion(identify(source), source) for source in sources]
    return [allocation_map(source, companions) for source in sources]


def expected(version: str, *inside: tuple[int, int]) -> Extents:
    start = OFFSETS.get(version, 0)
    around = Extents([(start, DATA)]).complement(SIZE)
    return around.union(Extents((start + offset, length) for offset, length in inside))


@pytest.mark.parametrize("version", ["0.90", "1.0", "1.1", "1.2"])
def test_a_mirror_at_rest(version: str) -> None:
    image = member(version)
    (found,) = maps(image)
    assert (found.certainty, found.reason) == ("exact", "it holds swap")
    assert found.used == expected(version, (0, 4096))
    both = maps(image, member(version, number=1))
    assert both == [found, found]
    filesystem = identify(MemorySource(image))
    assert filesystem.kind == "md" and filesystem.size == DATA
    assert filesystem.notes == (f"superblock {version}", "RAID level 1")


@pytest.mark.parametrize("version", ["0.90", "1.0", "1.1", "1.2"])
def test_a_mirror_in_use_needs_all_its_members(version: str) -> None:
    dirty = {"state": 0} if version == "0.90" else {"resync": 0}
    one = member(version, **dirty)
    other = member(version, number=1, content=swap(MIB), **dirty)
    (alone,) = maps(one)
    assert alone.used == Extents.whole(SIZE)
    assert "not all of its members are here" in (alone.reason or "")
    for found in maps(one, other):
        assert found.certainty == "union"
        assert found.used == expected(version, (0, 4096), (MIB, MIB))


def test_the_last_member_is_right_even_in_use() -> None:
    image = bytearray(member("1.2", resync=0))
    at = VERSIONS["1.2"] * 512
    raw = image[at : at + 4096]
    struct.pack_into("<H", raw, 258, 0xFFFF)
    struct.pack_into("<I", raw, 216, 0)
    total = sum(struct.unpack("<128I", raw[:512]))
    struct.pack_into("<I", raw, 216, (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
    image[at : at + 4096] = raw
    (found,) = maps(bytes(image))
    assert (found.certainty, found.used) == ("exact", expected("1.2", (0, 4096)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"level": 5}, "RAID level 5"),
        ({"level": 10}, "RAID level 10"),
        ({"level": -1}, "RAID level -1"),
        ({"features": 2}, "being rebuilt"),
        ({"features": 4}, "being reshaped"),
        ({"features": 16}, "replaces another"),
        ({"features": 512}, "journal device"),
        ({"features": 1 << 13}, "unknown feature bits 0x2000"),
        ({"role": 0xFFFF}, "spare"),
        ({"role": 0xFFFE}, "faulty"),
        ({"role": 7}, "no member in use"),
        ({"number": 500}, "spare"),
        ({"flags": 4}, "unknown device flags"),
        ({"size": DATA // 512 + 1}, "impossible sizes"),
        ({"data_offset": SIZE // 512}, "more bytes than the member"),
        ({"data_offset": 0}, "lies among its data"),
        ({"features": 1, "bitmap": MIB // 512}, "lies among its data"),
        ({"features": 1, "bitmap": -100}, "impossible sizes"),
        ({"features": 8, "log_size": 8, "log_offset": 16}, "list of bad blocks"),
    ],
)
def test_doubts_of_version_1(fields: dict[str, int], said: str) -> None:
    (found,) = maps(member("1.2", **fields))
    assert found.used == Extents.whole(SIZE) and found.certainty == "all"
    assert said in (found.reason or "")


def test_an_empty_list_of_bad_blocks_and_a_bitmap_are_no_doubt() -> None:
    fields = {"features": 9, "log_size": 8, "log_offset": 16, "bitmap": 8}
    image = bytearray(member("1.2", **fields))
    image[24 * 512 : 32 * 512] = b"\xff" * 4096
    (found,) = maps(bytes(image))
    assert found.certainty == "exact"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"level": 0}, "RAID level 0"),
        ({"minor": 91}, "being reshaped"),
        ({"minor": 92}, "unknown version"),
        ({"state": 3}, "unknown state"),
        ({"disk_state": 2}, "not in sync"),
        ({"disk_state": 7}, "not in sync"),
    ],
)
def test_doubts_of_version_090(fields: dict[str, int], said: str) -> None:
    (found,) = maps(member("0.90", **fields))
    assert found.used == Extents.whole(SIZE) and found.certainty == "all"
    assert said in (found.reason or "")


@pytest.mark.parametrize("version", ["0.90", "1.0", "1.1", "1.2"])
def test_a_wrong_checksum(version: str) -> None:
    image = bytearray(member(version))
    at = SIZE - 65536 if version == "0.90" else VERSIONS[version] * 512
    image[at + 400] ^= 1
    (found,) = maps(bytes(image))
    assert "the checksum of its superblock is wrong" in (found.reason or "")
    assert identify(MemorySource(bytes(image))).kind == "md"


def test_members_that_do_not_agree() -> None:
    one, other = member("1.2"), member("1.2", number=1, events=12)
    (found, _) = maps(one, other)
    assert "not of the same time" in (found.reason or "")
    (found, _) = maps(one, member("1.2", number=1, events=18))
    assert "events" in (found.reason or "")
    (found, _) = maps(one, one)
    assert "the same" in (found.reason or "")
    (found, _) = maps(one, member("1.2", number=1, features=2))
    assert "being rebuilt" in (found.reason or "")
    (found, _) = maps(one, member("1.2", number=2, events=5))  # a spare
    assert found.certainty == "exact"


def test_two_superblocks_are_a_doubt() -> None:
    image = bytearray(member("1.2"))
    image[-65536 : 4096 - 65536] = superblock_090(0, {})
    (found,) = maps(bytes(image))
    assert found.used == Extents.whole(SIZE)


def test_a_filesystem_larger_than_the_array_is_its_own() -> None:
    """Made over the whole device later: the old superblock at the end is a leftover."""
    (found,) = maps(member("1.0", content=swap(SIZE)))
    assert found.used == Extents.whole(SIZE) and found.certainty == "all"


@pytest.mark.parametrize(
    ("distance", "magic", "kind"),
    [
        (1024, b"Intel Raid ISM Cfg Sig. 1.3.00", "isw_raid_member"),
        (512, bytes.fromhex("de11de11"), "ddf_raid_member"),
    ],
)
def test_a_raid_of_the_firmware_is_a_doubt(distance: int, magic: bytes, kind: str) -> None:
    """What it holds may begin at the device's begin, and go on at another device."""
    image = bytearray(swap(MIB).ljust(SIZE, b"\0"))
    (found,) = maps(bytes(image))
    assert found.certainty == "exact"
    image[-distance : len(magic) - distance] = magic
    (found,) = maps(bytes(image))
    assert found.used == Extents.whole(SIZE)
    assert kind in (found.reason or "")


def partitioned(image: bytes, start: int, size: int) -> MemorySource:
    """With a DOS partition table that names one partition."""
    table = bytearray(image)
    table[:512] = bytes(512)
    table[446:462] = struct.pack("<8B2I", 0, 0, 0, 0, 0x82, 0, 0, 0, start // 512, size // 512)
    table[510:512] = b"\x55\xaa"
    table[start : start + 4096] = swap(size)
    return MemorySource(bytes(table))


def test_partitions_of_an_array_of_whole_disks() -> None:
    """They may go on at another disk, whatever their filesystem looks like on this one."""
    for version in ("0.90", "1.0"):
        for level in (0, 1):
            source = partitioned(member(version, level=level, content=b""), 3 * MIB, MIB // 2)
            (volume,) = read_layout(source).volumes
            assert volume.allocation.reason == "the disk is a member of a RAID (md)"
            assert volume.allocation.used == Extents.whole(MIB // 2)
    for image in (bytes(SIZE), member("1.2", content=b"")):  # 1.2: a leftover of an earlier use
        (volume,) = read_layout(partitioned(image, 3 * MIB, MIB // 2)).volumes
        assert volume.allocation.certainty == "exact"


def test_the_last_partition_is_a_member_by_itself() -> None:
    """Its superblock 0.90 lies where one of the disk would."""
    image = bytes(MIB) + member("0.90", content=b"")
    source = partitioned(image, MIB, SIZE)
    (volume,) = read_layout(source).volumes
    assert volume.filesystem.kind == "md"
    assert volume.allocation.reason != "the disk is a member of a RAID (md)"


def test_damage_never_raises() -> None:
    chance = random.Random(7)
    for version in ("0.90", "1.0", "1.1", "1.2"):
        good = member(version)
        at = SIZE - 65536 if version == "0.90" else VERSIONS[version] * 512
        for _ in range(40):
            image = bytearray(good)
            for _ in range(chance.choice((1, 4, 40))):
                image[at + 8 + chance.randrange(504)] = chance.choice(
                    (0, 255, chance.randrange(256))
                )
            source = MemorySource(bytes(image))
            identify(source)
            assert allocation_map(source).used.end <= SIZE
        for name, (layout, _) in FIELDS.items() if version != "0.90" else ():
            for value in (0, (1 << 8 * struct.calcsize(layout)) - 1):
                value = -1 if layout in ("<i",) and value else value
                (found,) = maps(member(version, **{name: value}))
                assert found.used.end <= SIZE
