"""Disks for tests: full of a pattern (so that nothing is zero by luck), partitioned, mounted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.errors import ToolError
from imager.loopdevice import loop_device
from imager.process import run

# Where many small repositories are made: fsync costs nothing there.
MEMORY_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

needs_loop = [
    pytest.mark.loop,
    pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root"),
]

# None of them discards, so that free space keeps the pattern.
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "nodiscard"],
    "ext2": ["mkfs.ext2", "-q", "-F", "-b", "1024", "-E", "nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-K"],
}
FSCK = {
    "ext4": ["e2fsck", "-f", "-n"],
    "ext2": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check"],
}

# Two partitions and a hole between them; ids that a restore must keep.
GPT_SCRIPT = """label: gpt
label-id: 11111111-2222-4333-8444-555555555555
start=2048, size=32768, type=L, uuid=AAAAAAAA-BBBB-4CCC-8DDD-EEEEEEEEEEE1, name="boot"
start=40960, size={rest}, type=L, uuid=AAAAAAAA-BBBB-4CCC-8DDD-EEEEEEEEEEE2, name="root"
"""


def make_file(path: Path, size: int, fill: int = 0xA5) -> Path:
    """A raw image without a zero in it, ``size`` bytes long."""
    chunk = bytes([fill]) * MIB
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(chunk[: min(MIB, size - start)])
    return path


def make_sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def make_random(path: Path, size: int, seed: int = 1) -> Path:
    """A raw image that does not compress, the same for the same seed."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(chance.randbytes(min(MIB, size - start)))
    return path


def make_gpt(path: Path, size: int = 64 * MIB, *, fill: int = 0xA5) -> Path:
    """A disk with a partition of 16 MiB and one of nearly the rest, without filesystems."""
    make_file(path, size, fill)
    script = GPT_SCRIPT.format(rest=size // 512 - 40960 - 2048)
    run(["sfdisk", "--quiet", "--wipe=never", str(path)], input_bytes=script.encode())
    return path


def make_filesystem(device: str | Path, kind: str) -> None:
    run([*MKFS[kind], str(device)])


def check_filesystem(device: str | Path, kind: str) -> None:
    """Raises ToolError when the filesystem has a fault."""
    run([*FSCK[kind], str(device)])


@contextlib.contextmanager
def loop_disk(path: Path, *, sector_size: int = 512) -> Iterator[str]:
    """A loop device over a whole disk, without the partitions that the kernel may know of it.

    They outlive the device otherwise: the next one of that number would have them.
    """
    forget = ["partx", "--delete"]
    with loop_device(str(path), sector_size=sector_size) as device:
        run([*forget, device], accept=(0, 1))
        try:
            yield device
        finally:
            run([*forget, device], accept=(0, 1))


@contextlib.contextmanager
def partitions_of(device: str) -> Iterator[list[str]]:
    """The partition devices of a loop device; this kernel doesn't look for them by itself."""
    run(["partx", "--add", device])
    try:
        name = Path(device).name
        yield sorted(f"/dev/{path.name}" for path in Path("/sys/block", name).glob(f"{name}p*"))
    finally:
        run(["partx", "--delete", device])


@contextlib.contextmanager
def mounted(device: str | Path, folder: Path, options: str = "noatime") -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    run(["mount", "-o", options, str(device), str(folder)])
    try:
        yield folder
    finally:
        unmount(folder)


def unmount(folder: Path, *, seconds: float = 20) -> None:
    """Also one that somebody who looks at all mounts (mkfs, udev) holds for a moment."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            run(["umount", str(folder)])
            return
        except ToolError as error:
            if "busy" not in error.message or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def digest(path: str | Path) -> str:
    """SHA-256 of a whole file or device."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_at(path: str | Path, offset: int, length: int) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(length)


def write_at(path: str | Path, offset: int, content: bytes) -> None:
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
