"""Maps of FAT, exFAT and F2FS that a real kernel wrote, clean and in the middle of work."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.loopdevice import loop_device
from imager.process import run
from tests.loop.allocation_lab import MIB, crash, make_image, poison, read_map

# Type for mount, mkfs, size in MiB, checker.
KINDS: dict[str, tuple[str, str, int, str]] = {
    "fat12": ("vfat", "mkfs.vfat -F 12 -s 8", 12, "fsck.vfat -n"),
    "fat16": ("vfat", "mkfs.vfat -F 16 -s 4", 32, "fsck.vfat -n"),
    "fat32": ("vfat", "mkfs.vfat -F 32 -s 1", 40, "fsck.vfat -n"),
    "exfat": ("exfat", "mkfs.exfat -c 4K", 48, "fsck.exfat -n"),
    "f2fs": ("f2fs", "mkfs.f2fs -q -f -t 0", 96, "fsck.f2fs --dry-run"),
    "f2fs-compression": (
        "f2fs",
        "mkfs.f2fs -q -f -t 0 -O extra_attr,compression,sb_checksum,inode_checksum",
        96,
        "fsck.f2fs --dry-run",
    ),
}
DIRTY = {name: kind for name, kind in KINDS.items() if kind[0] != "f2fs"}
NO_SYNC = 2  # linux/f2fs.h: F2FS_GOING_DOWN_NOSYNC


def _make(path: Path, name: str) -> Path:
    _, mkfs, size, _ = KINDS[name]
    return make_image(path, mkfs.split(), size * MIB)


@contextlib.contextmanager
def _mounted(image: Path, name: str) -> Iterator[Path]:
    folder = image.with_name(f"{image.name}.mnt")
    folder.mkdir(exist_ok=True)
    with loop_device(str(image)) as device:
        run(["mount", "-t", KINDS[name][0], device, str(folder)])
        try:
            yield folder
        finally:
            run(["umount", str(folder)])


def _work(folder: Path, chance: random.Random, steps: int) -> None:
    """Interleaved appends, truncates, renames and removals; some of it synced."""
    for step in range(steps):
        files = sorted(path for path in folder.glob("d*/*") if path.is_file())
        action = chance.randrange(10)
        if len(files) < 12 or action < 5:
            path = folder / f"d{step % 4}" / f"a file of step {step}"
            path = chance.choice(files) if files and action < 2 else path
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as file:
                file.write(chance.randbytes(int(200_000 * chance.random() ** 3)))
                if chance.random() < 0.3:
                    file.flush()
                    os.fsync(file.fileno())
        elif action == 5:
            os.truncate(chance.choice(files), chance.randrange(50_000))
        elif action == 6:
            chance.choice(files).rename(folder / "d0" / f"renamed in {step}")
        else:
            chance.choice(files).unlink()


def _files(image: Path, name: str) -> dict[str, object]:
    """What a mount shows, with the errors of what can't be read."""
    with _mounted(image, name) as folder:
        return {str(path.relative_to(folder)): _seen(path) for path in sorted(folder.rglob("*"))}


def _seen(path: Path) -> object:
    """No more than the start of a file whose size is nonsense."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.sha256(file.read(4 * MIB)).hexdigest()
    except OSError as error:
        return error.errno


@pytest.mark.parametrize("name", KINDS)
def test_nothing_unused_is_missed(tmp_path: Path, name: str) -> None:
    image = _make(tmp_path / "image", name)
    for seed in range(2):  # the second mount finds holes
        with _mounted(image, name) as folder:
            _work(folder, random.Random(seed), 120)
    before = _files(image, name)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    print(f"{len(found.used)} ranges, {found.used.total} bytes used, {len(before)} files")
    assert poison(image, found.used) > image.stat().st_size // 8
    run([*KINDS[name][3].split(), str(image)])
    assert _files(image, name) == before


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DIRTY)
def test_copy_in_the_middle_of_work(tmp_path: Path, name: str, seed: int) -> None:
    image, copy, poisoned = (tmp_path / part for part in ("image", "copy", "poisoned"))
    _make(image, name)
    chance = random.Random(seed)
    with _mounted(image, name) as folder:
        _work(folder, chance, 60)
    with _mounted(image, name) as folder:
        _work(folder, chance, chance.randrange(10, 80))
        shutil.copyfile(image, copy)
    found = read_map(copy)
    print(found.certainty, found.reason, found.used.total)
    assert found.certainty in ("union", "all")
    shutil.copyfile(copy, poisoned)
    poison(poisoned, found.used)
    assert _files(poisoned, name) == _files(copy, name)


@pytest.mark.parametrize("synced", [True, False])
def test_f2fs_that_crashed_before_its_first_checkpoint(tmp_path: Path, synced: bool) -> None:
    """The checkpoint of the last unmount is still the newest."""
    image, poisoned = tmp_path / "image", tmp_path / "poisoned"
    _make(image, "f2fs")
    with _mounted(image, "f2fs") as folder:
        _work(folder, random.Random(1), 60)
    with _mounted(image, "f2fs") as folder:
        with (folder / "d0" / "new").open("wb") as file:
            file.write(b"?" * 100_000)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        crash(folder, NO_SYNC)
    found = read_map(image)
    print(found.certainty, found.reason)
    assert found.certainty == ("all" if synced else "exact"), found.reason
    shutil.copyfile(image, poisoned)
    poison(poisoned, found.used)
    assert _files(poisoned, "f2fs") == _files(image, "f2fs")


def test_mounted_f2fs_is_used_whole(tmp_path: Path) -> None:
    image, copy = _make(tmp_path / "image", "f2fs"), tmp_path / "copy"
    with _mounted(image, "f2fs") as folder:
        _work(folder, random.Random(1), 30)
        run(["sync", "-f", str(folder)])
        shutil.copyfile(image, copy)
    found = read_map(copy)
    assert (found.certainty, found.reason) == ("all", "f2fs: it was not unmounted")
