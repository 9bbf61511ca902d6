"""The ISO writer, judged by xorriso, isoinfo, sgdisk and fsck.vfat."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from bootmedia import iso as iso_module
from bootmedia.hybrid import ISO_BLOCK
from bootmedia.iso import (
    BIOS_IMAGE,
    EFI_IMAGE,
    BootImages,
    IsoFile,
    IsoInfo,
    IsoPlan,
    read_iso_file,
    write_iso,
)
from imager.errors import FormatError, ImagerError, IntegrityError, SourceError, UsageError
from imager.process import run
from imager.progress import NullProgress
from tests.support.disks import MIB, make_sparse

GIB = 1 << 30
CREATED = 1_700_000_000
MEDIUM_ID = "0123456789abcdef"

# Loaders that nobody starts: where they lie is what counts here.
BOOT = BootImages(
    bios=bytes(range(256)) * 40, efi=b"\xe5" * 300 * ISO_BLOCK, hybrid=b"\x90" * 510 + b"\x55\xaa"
)
LONG = "n" * 250
FILES = {
    f".imager/{MEDIUM_ID}": b"",
    "boot/grub/grub.cfg": b"set timeout=3\n",
    "images/packs/4f/4f1c.pack": os.urandom(3 * MIB + 17),
    "images/packs/4f/4F1C.pack": b"differs in case only",
    "images/a name, with spaces": b"1",
    "images/größe-日本": b"2",
    f"images/{LONG}": b"3",
    "a/b/c/d/e/f/g/deep": b"4",
    **{f"many/{number:04}.manifest.json": b"%d" % number for number in range(300)},
}


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {' '.join(missing)}")


def plan(
    files: dict[str, bytes | Path] | None = None, *, boot: BootImages | None = BOOT
) -> IsoPlan:
    files = dict(FILES) if files is None else files
    listed = tuple(IsoFile(path, source) for path, source in files.items())
    return IsoPlan("IMAGER_RESCUE", MEDIUM_ID, listed, boot, CREATED)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IsoInfo]:
    path = tmp_path_factory.mktemp("iso") / "rescue.iso"
    return path, write_iso(plan(), path)


def test_it_says_what_was_written(written: tuple[Path, IsoInfo]) -> None:
    path, info = written
    assert info.size == path.stat().st_size
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    digests = {file.path: (file.size, file.digest) for file in info.files}
    for name, content in FILES.items():
        assert digests.pop(name) == (len(content), blake3(content).hexdigest())
    assert set(digests) == {BIOS_IMAGE, EFI_IMAGE}


def test_its_files_are_read(written: tuple[Path, IsoInfo]) -> None:
    path, _ = written
    for name, content in FILES.items():
        assert read_iso_file(path, name) == content
    with pytest.raises(FormatError, match="has no nothing"):
        read_iso_file(path, "nothing")
    with pytest.raises(FormatError, match="at most 100"):
        read_iso_file(path, "images/packs/4f/4f1c.pack", limit=100)


@needs("xorriso")
def test_xorriso_extracts_the_same(written: tuple[Path, IsoInfo], tmp_path: Path) -> None:
    path, _ = written
    run(["xorriso", "-osirrox", "on", "-indev", str(path), "-extract", "/", str(tmp_path / "out")])
    found = {
        str(file.relative_to(tmp_path / "out")): file.read_bytes()
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    }
    assert found.pop("boot/boot.cat")
    assert found.pop(EFI_IMAGE) == BOOT.efi
    assert len(found.pop(BIOS_IMAGE)) == len(BOOT.bios)
    assert found == FILES


@needs("isoinfo")
def test_isoinfo_lists_the_same(written: tuple[Path, IsoInfo]) -> None:
    path, _ = written
    listed = run(["isoinfo", "-i", str(path), "-R", "-f"]).stdout.decode().splitlines()
    assert {f"/{name}" for name in FILES} <= set(listed)
    plain = run(["isoinfo", "-i", str(path), "-f"]).stdout.decode().splitlines()
    assert len(plain) == len(set(plain))
    head = run(["isoinfo", "-i", str(path), "-d"]).stdout.decode()
    assert "Volume id: IMAGER_RESCUE" in head
    assert "El Torito VD version 1 found" in head


@needs("xorriso")
def test_every_way_to_boot_is_there(written: tuple[Path, IsoInfo]) -> None:
    path, _ = written
    command = ["xorriso", "-indev", str(path)]
    reports = ["-report_el_torito", "plain", "-report_system_area", "plain"]
    said = " ".join(run([*command, *reports]).stdout.decode().split())
    assert f"El Torito img path : 1 /{BIOS_IMAGE}" in said
    assert "El Torito img opts : 1 boot-info-table grub2-boot-info" in said
    assert f"El Torito img path : 2 /{EFI_IMAGE}" in said
    assert "grub2-mbr" in said
    assert "MBR partition : 1 0x80 0xee" in said
    assert f"GPT partition path : 1 /{EFI_IMAGE}" in said


@needs("sgdisk")
def test_sgdisk_finds_nothing_wrong(written: tuple[Path, IsoInfo]) -> None:
    path, _ = written
    said = run(["sgdisk", "-v", str(path)]).stdout.decode()
    assert "No problems found" in said
    shown = run(["sgdisk", "-i", "1", str(path)]).stdout.decode()
    assert "EFI system partition" in shown
    first = int(shown.split("First sector: ")[1].split()[0])
    assert path.read_bytes()[first * 512 :].startswith(BOOT.efi)


def test_the_boot_image_knows_where_it_lies(written: tuple[Path, IsoInfo]) -> None:
    path, _ = written
    image = read_iso_file(path, BIOS_IMAGE)
    descriptor, block, length, checksum = struct.unpack_from("<IIII", image, 8)
    assert (descriptor, length) == (16, len(image))
    content = path.read_bytes()
    assert content[block * ISO_BLOCK :].startswith(image)
    assert checksum == sum(struct.unpack(f"<{len(image[64:]) // 4}I", image[64:])) % (1 << 32)
    assert struct.unpack_from("<Q", image, 2548) == (block * 4 + 5,)
    assert struct.unpack_from("<Q", content, 0x1B0) == (block * 4 + 4,)


def test_the_same_plan_gives_the_same_bytes(
    written: tuple[Path, IsoInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another time zone, another second, and from files instead of memory."""
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        files: dict[str, bytes | Path] = {}
        for number, (name, content) in enumerate(FILES.items()):
            files[name] = tmp_path / str(number)
            (tmp_path / str(number)).write_bytes(content)
        info = write_iso(plan(files), tmp_path / "again.iso")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert info == written[1]
    assert (tmp_path / "again.iso").read_bytes() == written[0].read_bytes()


def test_another_medium_has_other_ids(tmp_path: Path) -> None:
    small = plan({"a": b"a"})
    for name, one in (("1", small), ("2", replace(small, medium_id="f" * 16))):
        write_iso(one, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in "12")
    assert first[0x1B8:0x1BC] != second[0x1B8:0x1BC]
    assert first[512 + 56 : 512 + 72] != second[512 + 56 : 512 + 72]


def test_data_only(tmp_path: Path) -> None:
    write_iso(plan({"images/x": b"x" * 5000}, boot=None), tmp_path / "volume2.iso")
    assert read_iso_file(tmp_path / "volume2.iso", "images/x") == b"x" * 5000
    assert (tmp_path / "volume2.iso").read_bytes()[: 16 * ISO_BLOCK] == bytes(16 * ISO_BLOCK)


@needs("xorriso")
def test_file_of_more_than_4_gib(tmp_path: Path) -> None:
    """It has several extents; the ends and the border are looked at."""
    size = 4 * GIB + 3 * MIB + 5
    large = make_sparse(tmp_path / "large", size)
    with large.open("r+b") as file:
        for offset, mark in ((0, b"begin"), (4 * GIB - 2, b"border"), (size - 3, b"end")):
            file.seek(offset)
            file.write(mark)
    path = tmp_path / "large.iso"
    info = write_iso(plan({"images/large": large, "after": b"after"}), path)
    digest = {file.path: file.digest for file in info.files}["images/large"]
    hasher = blake3()
    hasher.update_mmap(large)
    assert digest == hasher.hexdigest()
    found = run(["xorriso", "-indev", str(path), "-find", "/images", "-exec", "lsdl"])
    assert str(size) in found.stdout.decode()
    assert read_iso_file(path, "after") == b"after"


# --- what goes wrong -----------------------------------------------------------------------------


class Meddler(NullProgress):
    """Does something, once, when the first large piece of a source has been written."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle = meddle
        self._done = False

    def advance(self, amount: int) -> None:
        if amount >= MIB and not self._done:
            self._done = True
            self._meddle()


def rewrite(source: Path) -> None:
    with source.open("r+b") as file:
        file.write(b"new")


@pytest.mark.parametrize(
    ("meddle", "reason"),
    [
        (lambda source: os.truncate(source, 5 * MIB), "ended 4194304 bytes too early"),
        (lambda source: os.truncate(source, 10 * MIB), "changed while the ISO was written"),
        (rewrite, "changed while the ISO was written"),
    ],
    ids=["shorter", "longer", "rewritten"],
)
def test_a_source_that_changes(
    meddle: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    source = make_sparse(tmp_path / "source", 9 * MIB)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(SourceError, match=f"source: {reason}"):
        write_iso(plan({"x": source}), out / "x.iso", Meddler(lambda: meddle(source)))
    assert not list(out.iterdir())


def test_a_source_that_changed_before_its_turn(tmp_path: Path) -> None:
    source = make_sparse(tmp_path / "source", MIB)
    files: dict[str, bytes | Path] = {"first": bytes(MIB), "x": source}
    with pytest.raises(SourceError, match="source: changed while"):
        write_iso(plan(files), tmp_path / "x.iso", Meddler(lambda: rewrite(source)))


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        write_iso(plan({"x": tmp_path / "missing"}), tmp_path / "x.iso")


def test_a_disk_that_keeps_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of a pack falls over on its way to the disk. The ISO never gets its name."""
    honest = os.pwrite
    packed = FILES["images/packs/4f/4f1c.pack"]

    def flipping(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) == len(packed):
            data = memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
        return honest(descriptor, data, offset)

    monkeypatch.setattr(iso_module.os, "pwrite", flipping)
    with pytest.raises(IntegrityError, match=r"4f1c\.pack does not hold what was written"):
        write_iso(plan(), tmp_path / "x.iso")
    assert not list(tmp_path.iterdir())


def test_an_older_iso_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.iso"
    path.write_bytes(b"older")
    with pytest.raises(SourceError):
        write_iso(plan({"x": tmp_path / "missing"}), path)
    assert path.read_bytes() == b"older"


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ImagerError, match="/proc"):
        write_iso(plan({"x": b"x"}), Path("/proc/x.iso"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(iso_module.os, "pwrite", full)
    with pytest.raises(ImagerError, match="No space left"):
        write_iso(plan({"x": b"x"}), tmp_path / "x.iso")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/absolute", "not a path"),
        ("a//b", "not a path"),
        ("a/../b", "not a path"),
        ("", "not a path"),
        ("a\0b", "not a path"),
        ("n" * 251, "more than 250 bytes"),
        ("a/b/c/d/e/f/g/h/i", "more than 7 folders"),
    ],
)
def test_names_that_no_iso_can_hold(path: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        write_iso(plan({path: b"x"}), tmp_path / "x.iso")


def test_plans_that_no_iso_can_hold(tmp_path: Path) -> None:
    twice = replace(plan(), files=(IsoFile("a", b"1"), IsoFile("a", b"2")))
    lower = replace(plan(), volume_id="lower")
    heavy = replace(plan(), boot=replace(BOOT, efi=bytes(32 * MIB)))
    for wrong, reason in ((twice, "twice"), (lower, "volume id"), (heavy, "32 MiB")):
        with pytest.raises(UsageError, match=reason):
            write_iso(wrong, tmp_path / "x.iso")


def test_what_is_no_iso(written: tuple[Path, IsoInfo], tmp_path: Path) -> None:
    """Damage of every kind in the directories is an error in words, never a traceback or a hang."""
    content = written[0].read_bytes()[: 60 * ISO_BLOCK]
    path = tmp_path / "damaged"
    seeded = hashlib.sha256(b"damage").digest()
    for number in range(300):
        damaged = bytearray(content)
        for step in range(4):
            seeded = hashlib.sha256(seeded + bytes([number % 256, step])).digest()
            where = int.from_bytes(seeded[:4], "little") % (len(content) - 16 * ISO_BLOCK)
            damaged[16 * ISO_BLOCK + where] = seeded[4]
        path.write_bytes(damaged[: len(content) if number % 3 else len(content) // 2])
        try:
            read_iso_file(path, "boot/grub/grub.cfg")
        except FormatError as error:
            assert str(path) in error.message
    for start in (b"", b"nothing"):
        path.write_bytes(start)
        with pytest.raises(FormatError):
            read_iso_file(path, "x")
