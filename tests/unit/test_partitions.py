"""Partition tables that sfdisk, sgdisk and parted wrote, whole and damaged."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imager.blocksource import FileSource
from imager.errors import FormatError
from imager.extents import Extents
from imager.partitions import (
    PartitionTable,
    read_partition_table,
    smallest_disk,
)

MIB = 1 << 20
DISK_BYTES = 64 * MIB

GPT_SCRIPT = """label: gpt
label-id: 11111111-2222-3333-4444-555555555555
start=2048, size=8192, type=U, name="EFI ü€ 日本", \
attrs="RequiredPartition,LegacyBIOSBootable,GUID:60,GUID:63"
size=16384, type=S
size=16384, type=L, name="root"
"""

MBR_SCRIPT = """label: dos
label-id: 0x12345678
size=8192, type=7, bootable
size=4096, type=82
type=5
size=4096
size=4096, type=82
size=4096
size=4096
size=4096, type=8e
size=4096
"""

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin") for tool in ("sfdisk", "sgdisk")),
    reason="sfdisk or sgdisk is not installed",
)


def tool(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def make_disk(path: Path, script: str, size: int = DISK_BYTES) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    tool("sfdisk", "--quiet", str(path), text=script)
    return path


def read(path: Path, logical_sector: int | None = None) -> PartitionTable:
    with FileSource(path, logical_sector=logical_sector) as source:
        return read_partition_table(source)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def sfdisk_json(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(tool("sfdisk", "--json", str(path)))["partitiontable"]
    return table


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sfdisk waits for the disk's cache: make the usual tables once."""
    folder = tmp_path_factory.mktemp("templates")
    make_disk(folder / "gpt.img", GPT_SCRIPT)
    make_disk(folder / "mbr.img", MBR_SCRIPT)
    return folder


@pytest.fixture
def gpt_disk(templates: Path, tmp_path: Path) -> Path:
    tool("cp", "--sparse=always", str(templates / "gpt.img"), str(tmp_path))
    return tmp_path / "gpt.img"


@pytest.fixture
def mbr_disk(templates: Path, tmp_path: Path) -> Path:
    tool("cp", "--sparse=always", str(templates / "mbr.img"), str(tmp_path))
    return tmp_path / "mbr.img"


def assert_same_as_sfdisk(path: Path) -> None:
    ours, theirs = read(path), sfdisk_json(path)
    assert (ours.disk_id or "").lower() == theirs["id"].lower()
    found = [(p.offset // 512, p.size // 512, p.name, p.bootable) for p in ours.partitions]
    assert found == [
        (p["start"], p["size"], p.get("name"), p.get("bootable", False))
        for p in theirs["partitions"]
    ]
    assert [p.number for p in ours.partitions] == [
        int(p["node"].removeprefix(str(path))) for p in theirs["partitions"]
    ]
    types = [p.type.removeprefix("0x").lstrip("0").lower() for p in ours.partitions]
    assert types == [p["type"].lstrip("0").lower() for p in theirs["partitions"]]


def test_gpt_is_as_sfdisk_says(gpt_disk: Path) -> None:
    assert_same_as_sfdisk(gpt_disk)
    table = read(gpt_disk)
    assert table.scheme == "gpt"
    assert table.notes == ()
    assert table.first_usable == 2048 * 512
    assert table.last_usable == DISK_BYTES - 33 * 512
    first = table.partitions[0]
    assert first.name == "EFI ü€ 日本"
    assert first.attributes == 1 << 0 | 1 << 2 | 1 << 60 | 1 << 63
    assert first.type_name == "EFI system"
    uuids = [p["uuid"].lower() for p in sfdisk_json(gpt_disk)["partitions"]]
    assert [p.uuid for p in table.partitions] == uuids


def test_mbr_with_logicals_is_as_sfdisk_says(mbr_disk: Path) -> None:
    assert_same_as_sfdisk(mbr_disk)
    table = read(mbr_disk)
    assert table.scheme == "mbr"
    assert table.disk_id == "0x12345678"
    assert [(p.number, p.kind) for p in table.partitions] == [
        (1, "primary"),
        (2, "primary"),
        (3, "extended"),
        *((number, "logical") for number in range(5, 11)),
    ]
    assert table.partitions[-1].uuid == "12345678-0a"
    assert table.notes == ()


def test_tables_of_libparted(tmp_path: Path) -> None:
    parted = pytest.importorskip("parted")
    for label in ("gpt", "msdos"):
        path = tmp_path / f"parted-{label}.img"
        with path.open("wb") as file:
            file.truncate(DISK_BYTES)
        device = parted.getDevice(str(path))
        disk = parted.freshDisk(device, label)
        area = parted.Geometry(device=device, start=2048, end=40959)
        part = parted.Partition(disk=disk, type=parted.PARTITION_NORMAL, geometry=area)
        disk.addPartition(part, parted.Constraint(exactGeom=area))
        disk.commitToDevice()
        device.removeFromCache()
        assert_same_as_sfdisk(path)


def test_hybrid(gpt_disk: Path) -> None:
    before = read(gpt_disk)
    tool("sgdisk", "--hybrid=1:2", str(gpt_disk))
    table = read(gpt_disk)
    assert table.scheme == "hybrid"
    assert table.partitions == before.partitions
    assert table.disk_id == before.disk_id


def test_table_extents_are_what_a_restore_of_them_needs(
    gpt_disk: Path, mbr_disk: Path, tmp_path: Path
) -> None:
    """A disk that has nothing but the table's bytes shows the same table."""
    for path in (gpt_disk, mbr_disk):
        table = read(path)
        copy = tmp_path / "copy.img"
        with path.open("rb") as source, copy.open("wb") as target:
            target.truncate(DISK_BYTES)
            for extent in table.table_extents:
                source.seek(extent.offset)
                target.seek(extent.offset)
                target.write(source.read(extent.length))
        assert read(copy) == table
        assert table.table_extents.total < 64 << 10


def test_smallest_disk_takes_the_table(gpt_disk: Path, tmp_path: Path) -> None:
    least = smallest_disk(read(gpt_disk), DISK_BYTES)
    assert least == read(gpt_disk).partitions[-1].end + 33 * 512
    script = tool("sfdisk", "--dump", str(gpt_disk))
    lines = [line for line in script.splitlines() if not line.startswith(("last-lba", "device"))]
    make_disk(tmp_path / "fits.img", "\n".join(lines), least)
    assert read(tmp_path / "fits.img").partitions == read(gpt_disk).partitions
    with pytest.raises(subprocess.CalledProcessError):
        make_disk(tmp_path / "short.img", "\n".join(lines), least - 512)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (512 + 60, "checksum of its header"),
        (1024 + 60, "checksum of its entries"),
        (512, "no GPT header"),
    ],
)
def test_damaged_primary_is_read_from_the_backup(gpt_disk: Path, where: int, reason: str) -> None:
    whole = read(gpt_disk)
    patch(gpt_disk, where, b"\xa5\x5a\xa5")
    table = read(gpt_disk)
    assert table.partitions == whole.partitions
    assert table.disk_id == whole.disk_id
    assert table.table_extents == whole.table_extents
    (note,) = table.notes
    assert "read from the backup" in note and reason in note


def test_missing_backup_is_noted(gpt_disk: Path) -> None:
    whole = read(gpt_disk)
    patch(gpt_disk, DISK_BYTES - 512, bytes(512))
    table = read(gpt_disk)
    assert table.partitions == whole.partitions
    assert "backup GPT is missing" in table.notes[0]


def test_differing_copies_are_noted(gpt_disk: Path, tmp_path: Path) -> None:
    other = make_disk(tmp_path / "other.img", GPT_SCRIPT.replace('"root"', '"boot"'))
    tail = other.read_bytes()[-33 * 512 :]
    patch(gpt_disk, DISK_BYTES - len(tail), tail)
    table = read(gpt_disk)
    assert table.partitions[2].name == "root"
    assert table.notes == ("the primary and the backup GPT differ: the primary one is used",)


def test_both_copies_damaged_is_no_table(gpt_disk: Path) -> None:
    patch(gpt_disk, 512 + 60, b"\xff\xff")
    patch(gpt_disk, DISK_BYTES - 512 + 60, b"\xff\xff")
    table = read(gpt_disk)
    assert (table.scheme, table.partitions) == ("none", ())
    assert "both copies of the GPT are damaged" in table.notes[0]
    assert smallest_disk(table, DISK_BYTES) == DISK_BYTES


def test_lost_first_sector(gpt_disk: Path) -> None:
    whole = read(gpt_disk)
    patch(gpt_disk, 0, bytes(512))
    table = read(gpt_disk)
    assert (table.scheme, table.partitions) == ("gpt", whole.partitions)
    assert table.notes == ("the protective MBR is missing",)


def test_backup_of_an_earlier_use_is_not_a_table(gpt_disk: Path) -> None:
    patch(gpt_disk, 0, bytes(MIB))
    table = read(gpt_disk)
    assert (table.scheme, table.partitions) == ("none", ())
    assert "a backup GPT of an earlier use" in table.notes[0]


def test_mbr_over_an_old_gpt(gpt_disk: Path, mbr_disk: Path) -> None:
    patch(gpt_disk, 0, mbr_disk.read_bytes()[:512])
    table = read(gpt_disk)
    assert table.scheme == "mbr"
    assert "a GPT of an earlier use" in " ".join(table.notes)


def test_grown_disk(gpt_disk: Path) -> None:
    whole = read(gpt_disk)
    with gpt_disk.open("r+b") as file:
        file.truncate(2 * DISK_BYTES)
    table = read(gpt_disk)
    assert table.partitions == whole.partitions
    assert table.notes == ("the backup GPT isn't at the end of the disk",)
    assert table.table_extents.covers(DISK_BYTES - 33 * 512, 33 * 512)
    patch(gpt_disk, 512, bytes(512))  # then only the protective MBR tells where the backup is
    assert read(gpt_disk).partitions == whole.partitions


def test_shrunk_disk(gpt_disk: Path) -> None:
    whole = read(gpt_disk)
    with gpt_disk.open("r+b") as file:
        file.truncate(8 * MIB)
    table = read(gpt_disk)
    assert table.partitions == whole.partitions[:1]
    assert table.beyond == whole.partitions[1:]
    assert "partition 3 reaches beyond the end of the disk" in table.notes


def test_more_and_bigger_entries(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "many.img", GPT_SCRIPT)
    tool("sgdisk", "--resize-table=512", str(path))
    assert len(read(path).partitions) == 3
    assert read(path).backup_size == 512 * 128 + 512
    widened = widen_entries(path.read_bytes(), 256)
    path.write_bytes(widened)
    table = read(path)
    assert [p.name for p in table.partitions] == ["EFI ü€ 日本", None, "root"]
    assert table.backup_size == 512 * 128 + 512


def widen_entries(disk: bytes, entry_size: int) -> bytes:
    """The primary copy with half as many entries of twice the size, all checksums right."""
    count, size = struct.unpack_from("<II", disk, 512 + 80)
    raw = disk[1024 : 1024 + count * size]
    count = count * size // entry_size
    wide = b"".join(
        raw[at * size : (at + 1) * size].ljust(entry_size, b"\0") for at in range(count)
    )
    header = bytearray(disk[512 : 512 + 92])
    struct.pack_into("<III", header, 80, count, entry_size, zlib.crc32(wide))
    struct.pack_into("<I", header, 16, 0)
    struct.pack_into("<I", header, 16, zlib.crc32(header))
    return disk[:512] + header + disk[604:1024] + wide + disk[1024 + len(wide) :]


def test_4096_byte_sectors(tmp_path: Path) -> None:
    path = tmp_path / "4k.img"
    path.write_bytes(four_k_disk())
    for logical_sector, notes in ((4096, 0), (None, 1)):
        table = read(path, logical_sector)
        assert (table.scheme, table.sector_size) == ("gpt", 4096)
        (part,) = table.partitions
        assert (part.offset, part.size) == (MIB, 4 * MIB)
        assert len(table.notes) == notes
    assert "sectors of 4096 bytes, not 512" in table.notes[0]


def four_k_disk() -> bytes:
    """An 8 MiB disk made here, because sfdisk and sgdisk need a 4096-byte device for it.

    tests/loop/test_tableedit.py reads one that sfdisk made on a loop device.
    """
    disk = bytearray(8 * MIB)
    entry = bytes(range(1, 17)) + bytes(range(17, 33)) + struct.pack("<QQQ", 256, 1279, 0)
    entries = entry.ljust(128, b"\0").ljust(128 * 128, b"\0")
    last = len(disk) // 4096 - 1
    for own, other, at in ((1, last, 2), (last, 1, last - 4)):
        fields = (0x10000, 92, 0, 0, own, other, 6, last - 5, bytes(16), at, 128, 128)
        header = bytearray(
            struct.pack("<8sIIIIQQQQ16sQII", b"EFI PART", *fields)
            + struct.pack("<I", zlib.crc32(entries))
        )
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        disk[own * 4096 : own * 4096 + 92] = header
        disk[at * 4096 : at * 4096 + len(entries)] = entries
    disk[446:462] = struct.pack("<B3sB3sII", 0, bytes(3), 0xEE, bytes(3), 1, last)
    disk[510:512] = b"\x55\xaa"
    return bytes(disk)


def test_filesystems_straight_on_the_disk_are_no_mbr(tmp_path: Path) -> None:
    makers = [
        ["mkfs.fat", "-F", "12"],
        ["mkfs.fat", "-F", "16"],
        ["mkfs.fat", "-F", "32"],
        ["mkfs.ext4", "-q", "-F"],
        ["mkfs.xfs", "-q", "-f"],
        ["mkfs.ntfs", "-q", "-F", "-f"],
        ["mkfs.exfat"],
        ["mkfs.btrfs", "-q", "-f"],
    ]
    made = 0
    for maker in makers:
        if shutil.which(maker[0], path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
            print(f"{maker[0]} is not installed: left out")
            continue
        path = tmp_path / "fs.img"
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(320 * MIB)
        size = ["8192"] if maker[-1] == "12" else []
        tool(*maker, str(path), *size)
        patch_boot_code(path, maker[0])
        table = read(path)
        assert (table.scheme, table.partitions) == ("none", ()), maker
        made += 1
    assert made >= 2


def patch_boot_code(path: Path, maker: str) -> None:
    """Where a FAT or NTFS keeps boot code, put what would look like partition records."""
    if maker in ("mkfs.fat", "mkfs.ntfs", "mkfs.exfat"):
        patch(path, 446, struct.pack("<B3sB3sII", 0x80, bytes(3), 0x83, bytes(3), 2048, 8192))


def test_boot_code_without_partitions_is_no_mbr(tmp_path: Path) -> None:
    path = tmp_path / "boot.img"
    sector = bytearray(512)
    sector[0:3] = b"\xeb\x63\x90"  # how GRUB's boot image starts
    sector[510:512] = b"\x55\xaa"
    path.write_bytes(sector + bytes(MIB))
    assert read(path).scheme == "none"
    sector[446:510] = b"Error loading operating system. Press any key to try it again..."
    path.write_bytes(sector + bytes(MIB))
    assert read(path).scheme == "none"


def ebr(logical: tuple[int, int] | None, link: tuple[int, int] | None) -> bytes:
    """A boot record with a logical partition and a link, each (first, count) in sectors."""
    records = b"".join(
        struct.pack("<B3sB3sII", 0, bytes(3), kind, bytes(3), *(place or (0, 0)))
        for kind, place in ((0x83 if logical else 0, logical), (0x05 if link else 0, link))
    )
    return bytes(446) + records.ljust(64, b"\0") + b"\x55\xaa"


def test_chain_that_loops_or_breaks(tmp_path: Path) -> None:
    path = tmp_path / "chain.img"
    for link, reason in (((0, 100), "does not end"), ((500, 100), "breaks at sector 600")):
        disk = bytearray(MIB)
        disk[:512] = ebr((10, 20), (100, 1000))
        disk[100 * 512 : 101 * 512] = ebr((1, 30), link)
        path.write_bytes(disk)
        table = read(path)
        assert [p.number for p in table.partitions] == [1, 2, 5]
        assert reason in table.notes[0]


def test_endless_chain_is_capped(tmp_path: Path) -> None:
    path = tmp_path / "chain.img"
    disk = bytearray(2 * MIB)
    disk[:512] = ebr(None, (100, 3000))
    for at in range(100, 2000):
        disk[at * 512 : (at + 1) * 512] = ebr((1, 1), (at - 99, 10))
    path.write_bytes(disk)
    table = read(path)
    assert len(table.partitions) == 1 + 256
    assert "does not end" in table.notes[0]


def test_overlap_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "overlap.img"
    disk = bytearray(MIB)
    disk[:512] = ebr((10, 20), None)
    disk[462:478] = struct.pack("<B3sB3sII", 0, bytes(3), 0x82, bytes(3), 25, 20)
    path.write_bytes(disk)
    assert read(path).notes == ("partitions 1 and 2 overlap",)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 4096, 8192])
def test_tiny_sources(tmp_path: Path, gpt_disk: Path, size: int) -> None:
    path = tmp_path / "tiny.img"
    path.write_bytes(gpt_disk.read_bytes()[:size])
    table = read(path)
    assert table.scheme == "none"
    assert table.partitions == ()


class UnreadableSource(FileSource):
    """A disk where reads that touch some sectors fail."""

    bad = range(0)

    def pread(self, offset: int, length: int) -> bytes:
        if any(sector in self.bad for sector in range(offset // 512, (offset + length) // 512)):
            raise OSError(5, "Input/output error")
        return super().pread(offset, length)


def test_unreadable_sectors(gpt_disk: Path) -> None:
    whole = read(gpt_disk)
    for bad, fragment in ((range(1, 2), "read from the backup"), (range(0, 1), "first sector")):
        with UnreadableSource(gpt_disk) as source:
            source.bad = bad
            table = read_partition_table(source)
        assert table.partitions == whole.partitions
        assert fragment in " ".join(table.notes)
    with UnreadableSource(gpt_disk) as source:
        source.bad = range(DISK_BYTES // 512)
        assert read_partition_table(source).scheme == "none"


def test_json_round_trip(gpt_disk: Path, mbr_disk: Path) -> None:
    for path in (gpt_disk, mbr_disk):
        table = read(path)
        data = json.loads(json.dumps(table.to_json()))
        assert PartitionTable.from_json({**data, "later": 1}) == table
        assert PartitionTable.from_json({"scheme": "none", "sector_size": 512}).notes == ()


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": 1},
        {"scheme": None},
        {"sector_size": "512"},
        {"sector_size": True},
        {"sector_size": -1},
        {"partitions": {}},
        {"partitions": [1]},
        {"partitions": [{"number": 1}]},
        {"notes": [1]},
        {"table_extents": [[1]]},
        {"table_extents": [[1 << 64, 1]]},
        {"table_extents": [[-1, 1]]},
    ],
)
def test_json_of_wrong_types(gpt_disk: Path, change: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        PartitionTable.from_json({**read(gpt_disk).to_json(), **change})


class MemorySource:
    """Bytes as a source: quick enough for thousands of damaged disks."""

    path = "memory"
    logical_sector = physical_sector = 512
    is_device = False

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def pread(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size, "a read outside of the source"
        return self.data[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.pread(offset, len(buffer))

    def data_extents(self) -> Extents:
        return Extents.whole(self.size)


def fix_checksums(disk: bytearray) -> None:
    """Make damaged headers and entries believable, to get behind the checksums."""
    for at in (512, len(disk) // 512 * 512 - 512):
        if at < 512 or disk[at : at + 8] != b"EFI PART":
            continue
        entries_lba, count, size = struct.unpack_from("<QII", disk, at + 72)
        if entries_lba * 512 + count * size <= len(disk):
            entries = disk[entries_lba * 512 : entries_lba * 512 + count * size]
            struct.pack_into("<I", disk, at + 88, zlib.crc32(entries))
        struct.pack_into("<I", disk, at + 16, 0)
        header_size = min(struct.unpack_from("<I", disk, at + 12)[0], 512)
        struct.pack_into("<I", disk, at + 16, zlib.crc32(disk[at : at + header_size]))


def damaged(disk: bytes, dice: random.Random) -> Iterator[bytes]:
    """Flips in the table's sectors, cuts, and both with checksums made right again."""
    hot = [
        offset
        for extent in read_partition_table(MemorySource(disk)).table_extents
        for offset in range(extent.offset, extent.end)
        if offset < extent.offset + 1536 or offset >= extent.end - 512
    ]
    while True:
        copy = bytearray(disk)
        for _ in range(dice.choice((1, 2, 8, 64))):
            at = dice.choice(hot) if dice.random() < 0.9 else dice.randrange(len(copy))
            copy[at] = dice.choice((0, 1, 0x05, 0x7F, 0x80, 0xEE, 0xFF, dice.randrange(256)))
        if dice.random() < 0.3:
            del copy[dice.randrange(len(copy)) :]
        if dice.random() < 0.7:
            fix_checksums(copy)
        yield bytes(copy)


def chain_disk(logicals: int) -> bytes:
    """A small disk with a primary and an extended partition of that many logical ones."""
    disk = bytearray(128 << 10)
    disk[:512] = ebr((10, 20), (32, 200))
    for index in range(logicals):
        at = (32 + 32 * index) * 512
        link = (32 * index + 32, 32) if index + 1 < logicals else None
        disk[at : at + 512] = ebr((2, 8), link)
    return bytes(disk)


def test_no_damage_breaks_the_reader(tmp_path: Path) -> None:
    dice = random.Random(20)
    small = GPT_SCRIPT.replace("16384", "512").replace("8192", "512")
    gpt = make_disk(tmp_path / "gpt.img", small, 3 * MIB)
    hybrid = make_disk(tmp_path / "hybrid.img", small, 3 * MIB)
    tool("sgdisk", "--hybrid=1:2", str(hybrid))
    schemes: dict[str, int] = {}
    for disk in (gpt.read_bytes(), hybrid.read_bytes(), chain_disk(6)):
        cases = damaged(disk, dice)
        for _ in range(1000):
            source = MemorySource(next(cases))
            table = read_partition_table(source)
            schemes[table.scheme] = schemes.get(table.scheme, 0) + 1
            assert all(0 <= p.offset < p.end <= source.size for p in table.partitions)
            assert table.table_extents.end <= source.size
            assert smallest_disk(table, source.size) >= 0
            assert PartitionTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    print(schemes)
    assert set(schemes) == {"gpt", "mbr", "hybrid", "none"}
