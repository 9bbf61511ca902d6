"""Tables moved to bigger and smaller disks, grown, and given new ids."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imager.blocksource import FileSource
from imager.errors import RefusedError
from imager.loopdevice import loop_device
from imager.mbr import parse_boot_sector
from imager.partitions import Partition, PartitionTable, read_partition_table, smallest_disk
from imager.tableedit import grow_last_partition, move_backup_gpt, renew_ids, tell_kernel

MIB = 1 << 20

GPT_SCRIPT = """label: gpt
label-id: 11111111-2222-3333-4444-555555555555
size=4M, type=U, name="EFI ü€ 日本", attrs="RequiredPartition,LegacyBIOSBootable,GUID:60,GUID:63"
size=8M, type=S
size=8M, type=L, name="it's root", attrs="GUID:59"
"""

MBR_SCRIPT = """label: dos
label-id: 0x12345678
size=4M, type=7, bootable
size=4M, type=82
"""

LOGICAL_SCRIPT = """label: dos
label-id: 0x12345678
size=4M, type=7, bootable
size=16M, type=f
disk5: size=2M
disk6: size=2M, type=82
disk7: size=2M
disk8: size=2M
disk9: size=2M, type=8e
"""

BOOT_CODE = bytes(range(1, 221)) * 2

needs_loop = [
    pytest.mark.loop,
    pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root"),
]


def tool(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def make_disk(path: Path, script: str, size: int = 64 * MIB, sector_size: int = 512) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    if sector_size == 512:
        tool("sfdisk", "--quiet", str(path), text=script)
    else:
        with loop_device(str(path), sector_size=sector_size) as device:
            tool("sfdisk", "--quiet", device, text=script)
    patch(path, 0, BOOT_CODE)
    return path


def make_hybrid(path: Path) -> Path:
    make_disk(path, GPT_SCRIPT)
    tool("sgdisk", "--hybrid=1:3", str(path))
    patch(path, 0, BOOT_CODE)  # sgdisk drops it
    return path


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def resize(path: Path, size: int) -> Path:
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def read(path: Path | str, sector_size: int | None = None) -> PartitionTable:
    with FileSource(path, logical_sector=sector_size) as source:
        return read_partition_table(source)


def sfdisk_json(path: Path | str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(tool("sfdisk", "--json", str(path)))["partitiontable"]
    return {key: table[key] for key in ("label", "id", "partitions")}


def assert_sgdisk_clean(path: Path | str) -> None:
    said = tool("sgdisk", "--verify", str(path))
    assert "No problems found" in said and "Problem:" not in said, said


def assert_boot_code(path: Path) -> None:
    with path.open("rb") as file:
        assert file.read(440) == BOOT_CODE


@pytest.mark.parametrize("size", [24 * MIB, 64 * MIB, 64 * MIB + 512, 100 * MIB, 3000 * MIB])
def test_gpt_on_a_disk_of_another_size(tmp_path: Path, size: int) -> None:
    path = make_disk(tmp_path / "disk.img", GPT_SCRIPT)
    before, told = read(path), sfdisk_json(path)
    move_backup_gpt(str(resize(path, size)))
    after = read(path)
    assert after.partitions == before.partitions
    assert (after.disk_id, after.notes) == (before.disk_id, ())
    assert after.last_usable == size - 33 * 512
    assert sfdisk_json(path) == told
    assert_sgdisk_clean(path)
    assert_boot_code(path)
    protective = parse_boot_sector(path.open("rb").read(512)).protective
    assert protective and protective.count == size // 512 - 1


def test_the_smallest_disk(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", GPT_SCRIPT)
    before = read(path)
    least = smallest_disk(before, 64 * MIB)
    move_backup_gpt(str(resize(path, least)))
    assert read(path).partitions == before.partitions
    assert_sgdisk_clean(path)


def test_too_small_is_refused_untouched(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", GPT_SCRIPT)
    for size in (smallest_disk(read(path), 64 * MIB) - 512, 10 * MIB):
        content = resize(path, size).read_bytes()
        with pytest.raises(RefusedError, match="backup GPT need"):
            move_backup_gpt(str(path))
        assert path.read_bytes() == content


@pytest.mark.parametrize("size", [24 * MIB, 64 * MIB, 100 * MIB])
@pytest.mark.parametrize("where", [512 + 60, 1024 + 60])
def test_damaged_primary_is_mended(tmp_path: Path, size: int, where: int) -> None:
    """A smaller disk has no backup: then there is nothing to mend from."""
    path = make_disk(tmp_path / "disk.img", GPT_SCRIPT)
    before = read(path)
    patch(path, where, b"\xff\xfe")
    move_backup_gpt(str(resize(path, size)))
    if size < 64 * MIB:
        assert read(path).scheme == "none"
        return
    assert read(path).partitions == before.partitions
    assert_sgdisk_clean(path)
    assert_boot_code(path)


def test_missing_backup_is_made(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", GPT_SCRIPT)
    patch(path, 64 * MIB - 512, bytes(512))
    move_backup_gpt(str(path))
    assert read(path).notes == ()
    assert_sgdisk_clean(path)


def test_in_order_means_no_write(tmp_path: Path) -> None:
    for script in (GPT_SCRIPT, MBR_SCRIPT):
        path = make_disk(tmp_path / "disk.img", script)
        content = path.read_bytes()
        move_backup_gpt(str(path))
        assert path.read_bytes() == content


@pytest.mark.parametrize("size", [24 * MIB, 100 * MIB])
def test_hybrid_on_a_disk_of_another_size(tmp_path: Path, size: int) -> None:
    path = make_hybrid(tmp_path / "disk.img")
    before, records = read(path), path.read_bytes()[440:512]
    move_backup_gpt(str(resize(path, size)))
    assert read(path).partitions == before.partitions
    assert read(path).scheme == "hybrid"
    assert path.read_bytes()[440:512] == records
    assert_sgdisk_clean(path)
    assert_boot_code(path)


def grown(before: PartitionTable, after: PartitionTable) -> list[Partition]:
    """Partitions that differ, after checking that they differ in size only."""
    pairs = list(zip(before.partitions, after.partitions, strict=True))
    assert all(replace(new, size=old.size) == old for old, new in pairs)
    assert before.disk_id == after.disk_id
    return [new for old, new in pairs if old != new]


def test_grow_gpt(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", GPT_SCRIPT)
    before = read(path)
    part = grow_last_partition(str(resize(path, 100 * MIB)))
    after = read(path)
    assert grown(before, after) == [part]
    assert part and (part.number, part.end) == (3, 99 * MIB)
    assert after.notes == ()
    assert_sgdisk_clean(path)
    assert_boot_code(path)
    content = path.read_bytes()
    assert grow_last_partition(str(path)) == part
    assert path.read_bytes() == content


def test_grow_gpt_that_is_not_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    script = "label: gpt\nstart=20M, size=4M\nstart=1M, size=4M\n"
    path = make_disk(tmp_path / "disk.img", script)
    before = read(path)
    assert grown(before, read(path)) == []
    part = grow_last_partition(str(path))
    assert part and (part.number, part.offset, part.end) == (1, 20 * MIB, 63 * MIB)
    assert grown(before, read(path)) == [part]


def test_grow_hybrid(tmp_path: Path) -> None:
    path = make_hybrid(tmp_path / "disk.img")
    before = read(path)
    part = grow_last_partition(str(resize(path, 100 * MIB)))
    after = read(path)
    assert (after.scheme, grown(before, after)) == ("hybrid", [part])
    assert part and part.end == 99 * MIB
    record = parse_boot_sector(path.read_bytes()[:512]).others[-1]
    assert (record.first * 512, record.count * 512) == (part.offset, part.size)
    assert_sgdisk_clean(path)
    assert_boot_code(path)


@pytest.mark.parametrize("boot_code", [BOOT_CODE, bytes(440)])
def test_grow_mbr(tmp_path: Path, boot_code: bytes) -> None:
    path = make_disk(tmp_path / "disk.img", MBR_SCRIPT)
    patch(path, 0, boot_code)
    before = read(path)
    part = grow_last_partition(str(resize(path, 100 * MIB)))
    assert grown(before, read(path)) == [part]
    assert part and (part.number, part.end) == (2, 100 * MIB)
    assert path.read_bytes()[:440] == boot_code


def test_grow_mbr_beyond_two_tebibytes(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", MBR_SCRIPT)
    part = grow_last_partition(str(resize(path, 3 << 40)))
    assert part and part.end == 2 << 40


def test_grow_logical(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", LOGICAL_SCRIPT)
    before = read(path)
    part = grow_last_partition(str(resize(path, 100 * MIB)))
    after = read(path)
    assert [p.number for p in grown(before, after)] == [2, 9]
    assert part and (part.number, part.end) == (9, 100 * MIB)
    assert after.partition(2) and after.partitions[1].end == 100 * MIB
    assert after.notes == ()
    assert_boot_code(path)


def test_mbr_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", MBR_SCRIPT)
    content = resize(path, 6 * MIB).read_bytes()
    with pytest.raises(RefusedError, match="partition 2 reaches beyond"):
        grow_last_partition(str(path))
    assert path.read_bytes() == content


def test_grow_stops_at_the_next_partition(tmp_path: Path) -> None:
    """An extended partition without logical ones is no partition to grow, but in the way."""
    path = make_disk(tmp_path / "disk.img", MBR_SCRIPT + "start=20M, size=4M, type=5\n")
    part = grow_last_partition(str(path))
    assert part and (part.number, part.end) == (2, 20 * MIB)


def test_nothing_to_grow(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    assert grow_last_partition(str(path)) is None
    assert renew_ids(str(path)) == {}
    assert move_backup_gpt(str(path)).scheme == "none"
    assert path.read_bytes() == bytes(MIB)


@pytest.mark.parametrize("script", [GPT_SCRIPT, MBR_SCRIPT, LOGICAL_SCRIPT])
def test_new_ids(tmp_path: Path, script: str) -> None:
    path = make_disk(tmp_path / "disk.img", script)
    before = read(path)
    ids = renew_ids(str(path))
    after = read(path)
    assert len(set(ids) | set(ids.values())) == 2 * (1 + len(before.partitions))
    assert ids[before.disk_id or ""] == after.disk_id
    expected = [replace(part, uuid=ids[part.uuid or ""]) for part in before.partitions]
    assert list(after.partitions) == expected
    assert_boot_code(path)
    if script == GPT_SCRIPT:
        assert_sgdisk_clean(path)


def test_new_ids_of_a_hybrid(tmp_path: Path) -> None:
    path = make_hybrid(tmp_path / "disk.img")
    records = path.read_bytes()[440:512]
    renew_ids(str(path))
    assert path.read_bytes()[440:512] == records
    assert_sgdisk_clean(path)


def test_reserved_attribute_bits_survive_a_smaller_disk(tmp_path: Path) -> None:
    """Bits 3 to 47 are reserved by UEFI: no tool can name them, and none may be dropped."""
    path = make_disk(tmp_path / "disk.img", GPT_SCRIPT)
    tool("sgdisk", "--attributes=3:set:20", "--attributes=3:set:40", str(path))
    patch(path, 0, BOOT_CODE)
    before = read(path)
    assert before.partitions[2].attributes == 1 << 20 | 1 << 40 | 1 << 59
    for size in (24 * MIB, 100 * MIB):
        move_backup_gpt(str(resize(path, size)))
        assert read(path).partitions == before.partitions
    grow_last_partition(str(path))
    assert read(path).partitions[2].attributes == before.partitions[2].attributes


class Test4096ByteSectors:
    pytestmark = needs_loop

    def test_as_sfdisk_says(self, tmp_path: Path) -> None:
        path = make_disk(tmp_path / "disk.img", GPT_SCRIPT, sector_size=4096)
        table = read(path, 4096)
        assert (table.scheme, table.sector_size, table.notes) == ("gpt", 4096, ())
        with loop_device(str(path), sector_size=4096, read_only=True) as device:
            assert read(device) == table
            told = sfdisk_json(device)["partitions"]
        found = [(p.offset // 4096, p.size // 4096, p.name) for p in table.partitions]
        assert found == [(p["start"], p["size"], p.get("name")) for p in told]

    @pytest.mark.parametrize("size", [24 * MIB, 100 * MIB])
    def test_move_and_grow(self, tmp_path: Path, size: int) -> None:
        path = make_disk(tmp_path / "disk.img", GPT_SCRIPT, sector_size=4096)
        before = read(path, 4096)
        move_backup_gpt(str(resize(path, size)), sector_size=4096)
        assert read(path, 4096).partitions == before.partitions
        part = grow_last_partition(str(path), sector_size=4096)
        after = read(path, 4096)
        assert grown(before, after) == [part]
        assert part and part.end == size - MIB
        renew_ids(str(path), sector_size=4096)
        assert read(path, 4096).disk_id != before.disk_id
        with loop_device(str(path), sector_size=4096, read_only=True) as device:
            assert_sgdisk_clean(device)
        assert_boot_code(path)

    def test_mbr(self, tmp_path: Path) -> None:
        path = make_disk(tmp_path / "disk.img", LOGICAL_SCRIPT, sector_size=4096)
        before = read(path, 4096)
        assert [p.number for p in before.partitions] == [1, 2, *range(5, 10)]
        part = grow_last_partition(str(resize(path, 100 * MIB)), sector_size=4096)
        assert part and part.end == 100 * MIB
        assert [p.number for p in grown(before, read(path, 4096))] == [2, 9]


class TestBlockDevices:
    pytestmark = needs_loop

    @pytest.mark.parametrize("size", [24 * MIB, 100 * MIB])
    def test_restored_onto_a_device(self, tmp_path: Path, size: int) -> None:
        """Copy, move, grow, renew and tell the kernel, as a restore does."""
        source = make_disk(tmp_path / "source.img", GPT_SCRIPT)
        target = tmp_path / "target.img"
        target.write_bytes(source.read_bytes()[:size].ljust(size, b"\0"))
        before = read(source)
        with loop_device(str(target)) as device:
            move_backup_gpt(device)
            assert read(device).partitions == before.partitions
            part = grow_last_partition(device)
            assert part and part.end == size - MIB
            ids = renew_ids(device)
            assert len(ids) == 4
            assert_sgdisk_clean(device)
            content = Path(device).read_bytes()
            head, tail = content[:MIB], content[-MIB:]
            tell_kernel(device)
            name = Path(device).name
            seen = Path(f"/sys/block/{name}/{name}p3/size").read_text()
            assert int(seen) * 512 == part.size
            for copy in (0, size - MIB):
                patch(Path(device), copy, bytes(MIB))
            tell_kernel(device)
            assert not Path(f"/sys/block/{name}/{name}p3").exists()
            tell_kernel(device)
            patch(Path(device), 0, head)
            patch(Path(device), size - MIB, tail)
        assert_sgdisk_clean(target)
        assert_boot_code(target)
        assert read(target).partitions[2].size == part.size


def test_a_table_that_no_tool_reads_moves_whole(tmp_path: Path) -> None:
    """256 entries, and entries that do not follow their header at once (as for U-Boot)."""
    path = make_disk(tmp_path / "disk.img", GPT_SCRIPT)
    tool("sgdisk", "--resize-table=256", str(path))
    tool("sgdisk", "--move-main-table=100", str(path))
    before = read(path)
    for size in (24 * MIB, 100 * MIB):
        move_backup_gpt(str(resize(path, size)))
        assert read(path).partitions == before.partitions
        assert struct.unpack_from("<Q", path.read_bytes(), 512 + 72) == (100,)
        assert_sgdisk_clean(path)


if not all(map(shutil.which, ("sfdisk", "sgdisk"))):
    pytest.skip("sfdisk or sgdisk is not installed", allow_module_level=True)
