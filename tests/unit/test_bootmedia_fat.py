"""The FAT writer, judged by fsck.vfat and mtools."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bootmedia.fat import fat_image
from imager.errors import UsageError
from imager.process import run

needs_readers = pytest.mark.skipif(
    not (shutil.which("fsck.vfat") and shutil.which("mcopy")),
    reason="dosfstools and mtools are not installed",
)

CREATED = 1_700_000_000


def image(files: dict[str, bytes]) -> bytes:
    return fat_image(files, serial=0x1234ABCD, label="IMAGER", created=CREATED)


FAT12 = {
    "EFI/BOOT/BOOTX64.EFI": bytes(range(256)) * 9,
    "EFI/BOOT/empty": b"",
    "boot/grub/grub.cfg": b"configfile\n",
    # More entries than one cluster holds.
    **{f"MANY/F{number:04}.BIN": b"%d" % number for number in range(200)},
}
FAT16 = {"LARGE.BIN": bytes(range(251)) * 40_000, "A/B": b"b"}


@needs_readers
@pytest.mark.parametrize(("files", "kind"), [(FAT12, b"FAT12"), (FAT16, b"FAT16")])
def test_others_read_what_was_written(files: dict[str, bytes], kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "fat.img"
    path.write_bytes(image(files))
    assert path.read_bytes()[54:59] == kind
    run(["fsck.vfat", "-n", str(path)])
    for name, content in list(files.items())[:10]:
        assert run(["mtype", "-i", str(path), f"::{name}"]).stdout == content
    listed = run(["mdir", "-i", str(path), "-/", "-b", "::"]).stdout.decode().upper()
    assert all(f"::/{name.upper()}" in listed for name in files)
    assert "1234-ABCD" in run(["mdir", "-i", str(path), "::"]).stdout.decode()


@needs_readers
@pytest.mark.parametrize("clusters", [4068, 4069, 4084, 4085, 4101, 4102])
def test_nobody_mistakes_the_kind(clusters: int, tmp_path: Path) -> None:
    path = tmp_path / "fat.img"
    path.write_bytes(image({"F": bytes(clusters * 2048)}))
    run(["fsck.vfat", "-n", str(path)])


def test_the_same_files_give_the_same_bytes() -> None:
    backwards = dict(reversed(FAT12.items()))
    assert image(FAT12) == image(backwards)
    assert len(image(FAT12)) % 2048 == 0


@pytest.mark.parametrize(
    "files",
    [
        {"TOOLONGNAME": b""},
        {"A.LONG": b""},
        {"Ä": b""},
        {"A//B": b""},
        {"": b""},
        {"../A": b""},
        {"a": b"x", "A": b"x"},
        {"A": b"", "A/B": b""},
        {f"F{number}": b"" for number in range(512)},
        {"HUGE": bytes(130 << 20)},
    ],
    ids=lambda files: next(iter(files)) or "nothing",
)
def test_what_it_cannot_hold_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(UsageError, match="FAT"):
        image(files)
