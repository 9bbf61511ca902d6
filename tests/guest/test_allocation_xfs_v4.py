"""Maps of XFS version 4, whose log is in use: most kernels of today mount it no more."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from imager.process import run
from tests.loop.allocation_lab import (
    MIB,
    SHUTDOWN_LOGFLUSH,
    SHUTDOWN_NOLOGFLUSH,
    crash,
    fill,
    make_image,
    manifest,
    mounted,
    poison,
    read_map,
)

KINDS = {
    "default": "-m crc=0",
    "1k": "-m crc=0 -b size=1024",
    "512": "-m crc=0 -b size=512 -i size=256 -n ftype=0",
    "log-version-1": "-m crc=0 -l version=1",
    "no-lazy-counters": "-m crc=0 -l lazy-count=0",
}


@pytest.mark.parametrize("name", KINDS)
def test_poisoned_copy_recovers_to_the_same_files(tmp_path: Path, name: str) -> None:
    small = ["env", "TEST_DIR=/", "TEST_DEV=/", "QA_CHECK_FS=1"]
    command = [*small, "mkfs.xfs", "-q", "-f", "-K", *KINDS[name].split()]
    image = make_image(tmp_path / "image", command, 64 * MIB)
    chance = random.Random(name)
    with mounted(image) as folder:
        fill(folder, len(name), files=60)
    found = read_map(image)
    assert (found.certainty, found.reason) == ("exact", None)
    with mounted(image) as folder:
        _work(folder, chance)
        crash(folder, chance.choice((SHUTDOWN_LOGFLUSH, SHUTDOWN_NOLOGFLUSH)))
    found = read_map(image)
    print(found.certainty, found.reason, found.used.total)
    assert found.certainty == "union", found.reason
    poisoned = Path(shutil.copy(image, tmp_path / "poisoned"))
    assert poison(poisoned, found.used) > 8 * MIB
    assert _after_recovery(poisoned) == _after_recovery(image)


def _work(folder: Path, chance: random.Random) -> None:
    files = [path for path in sorted(folder.glob("d*/file*")) if path.is_file()]
    for step, path in enumerate(chance.sample(files, len(files) // 2)):
        if step % 3 == 0:
            path.unlink()
        elif step % 3 == 1:
            os.truncate(path, chance.randrange(50_000))
        fresh = folder / f"d{step % 5}" / f"new{step}"
        with fresh.open("wb") as file:
            file.write(chance.randbytes(chance.randrange(60_000)))
            if chance.random() < 0.5:
                file.flush()
                os.fsync(file.fileno())


def _after_recovery(image: Path) -> dict[str, object]:
    with mounted(image) as folder:
        files = manifest(folder)
    run(["xfs_repair", "-n", str(image)])
    return files
