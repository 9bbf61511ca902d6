"""Real filesystems for the allocation tests: made, filled, poisoned, compared."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.allocation import AllocationMap, allocation_map
from imager.blocksource import FileSource
from imager.extents import Extents
from imager.process import run
from tests.support.disks import unmount

MIB = 1 << 20

# linux/fs.h: _IOWR('X', 119, int), _IOWR('X', 120, int); linux/ext4: _IOR('X', 125, __u32);
# linux/fsmap.h: _IOWR('X', 59, struct fsmap_head)
_FIFREEZE, _FITHAW, _SHUTDOWN, _GETFSMAP = 0xC0045877, 0xC0045878, 0x8004587D, 0xC0C0583B
SHUTDOWN_LOGFLUSH, SHUTDOWN_NOLOGFLUSH = 1, 2
_OWNER_FREE, _SPECIAL_OWNER = 1, 0x10


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: crash tests sync all the time."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 2 << 30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="imager-test-") as folder:
        yield Path(folder)


def make_image(path: Path, mkfs: list[str], size: int = 64 * MIB) -> Path:
    """A file full of 0xA5 (so that nothing is zero by luck) with a filesystem on it."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(b"\xa5" * MIB)
    run([*mkfs, str(path)])
    return path


@contextlib.contextmanager
def mounted(image: Path, options: str = "loop") -> Iterator[Path]:
    folder = image.with_name(f"{image.name}.mnt")
    folder.mkdir(exist_ok=True)
    for _ in range(5):  # two mounts at once may pick the same free loop device
        if not run(["mount", "-o", options, str(image), str(folder)], accept=(0, 32)).returncode:
            break
        time.sleep(0.2)
    else:
        run(["mount", "-o", options, str(image), str(folder)])
    try:
        yield folder
    finally:
        unmount(folder)


def device_of(folder: Path) -> Path:
    """The loop device of a mounted image."""
    return Path(run(["findmnt", "-n", "-o", "SOURCE", str(folder)]).stdout.decode().strip())


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    with opened(folder) as fd:
        fcntl.ioctl(fd, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, _FITHAW, 0)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def crash(folder: Path, mode: int) -> None:
    """The filesystem stops as if the power went: nothing more reaches the device."""
    with opened(folder) as fd:
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("=I", mode))


def free_by_kernel(folder: Path) -> Extents:
    """Free ranges (bytes) that the kernel reports for a mounted filesystem (ioctl_getfsmap(2))."""
    most = 100_000
    low = bytes(64)
    high = struct.pack("=IIQQQQ24x", *([0xFFFFFFFF] * 2), *([0xFFFFFFFFFFFFFFFF] * 3), 0)
    request = bytearray(struct.pack("=IIII48x", 0, 0, most, 0) + low + high + bytes(64 * most))
    with opened(folder) as fd:
        fcntl.ioctl(fd, _GETFSMAP, request)
    (entries,) = struct.unpack_from("=I", request, 12)
    assert 0 < entries < most
    records = struct.iter_unpack("=IIQQQQ24x", request[192 : 192 + 64 * entries])
    return Extents(
        (physical, length)
        for _, flags, physical, owner, _, length in records
        if flags & _SPECIAL_OWNER and owner == _OWNER_FREE
    )


def read_map(image: Path) -> AllocationMap:
    with FileSource(image) as source:
        found = allocation_map(source)
        assert found.used.end <= source.size
    return found


def poison(image: Path, used: Extents) -> int:
    """Overwrites every byte that the map calls unused; returns how many."""
    free = used.complement(image.stat().st_size)
    with image.open("r+b") as file:
        for extent in free:
            file.seek(extent.offset)
            file.write(b"\x5a" * extent.length)
    return free.total


def manifest(folder: Path) -> dict[str, object]:
    """Everything a restored tree must have the same: content, metadata, times, xattrs."""
    return {str(path.relative_to(folder)): _entry(path) for path in sorted(folder.rglob("*"))}


def differences(one: dict[str, object], other: dict[str, object]) -> dict[str, object]:
    """What two manifests say differently: short enough for a failed test to show."""
    names = sorted(one.keys() | other.keys())
    return {
        name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)
    }


def _entry(path: Path) -> tuple[object, ...]:
    info = path.lstat()
    content: object = None
    if stat.S_ISREG(info.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    elif stat.S_ISLNK(info.st_mode):
        content = str(path.readlink())
    names = os.listxattr(path, follow_symlinks=False)
    return (
        content,
        (info.st_ino, info.st_mode, info.st_nlink, info.st_uid, info.st_gid, info.st_rdev),
        (info.st_size, info.st_blocks, info.st_mtime_ns, info.st_ctime_ns),
        {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
    )


def fill(folder: Path, seed: int, files: int = 160, largest: int = 300_000) -> None:
    """Files of all kinds, fragmented by interleaved appends and deletions."""
    chance = random.Random(seed)
    paths = [folder / f"d{n % 7}" / f"file-{n}-{'x' * (n % 40)}" for n in range(files)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
    for _ in range(3):
        for path in chance.sample(paths, files):
            with path.open("ab") as file:
                file.write(chance.randbytes(int(largest / 3 * chance.random() ** 4)))
    os.sync()
    for path in chance.sample(paths, files // 3):
        path.unlink()
    _fill_special(folder, chance)
    for path in chance.sample([p for p in paths if p.exists()], files // 3):
        path.chmod(chance.randrange(0o1000))
        os.chown(path, chance.randrange(1 << 32), chance.randrange(1 << 16))
        os.setxattr(path, "user.note", chance.randbytes(chance.randrange(1, 600)))
        os.utime(path, ns=(chance.randrange(1 << 60), chance.randrange(1 << 60)))


def _fill_special(folder: Path, chance: random.Random) -> None:
    (folder / "short-link").symlink_to("d0")
    (folder / "long-link").symlink_to("t" * 200)
    (folder / "tiny").write_bytes(b"fits into an inode")
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "node", 0o600 | stat.S_IFBLK, os.makedev(8, 1))
    (folder / "many").mkdir()
    for n in range(300):
        (folder / "many" / f"{'name' * 20}{n}").touch()
    with (folder / "sparse").open("wb") as file:
        for _ in range(20):
            file.seek(chance.randrange(1 << 24))
            file.write(chance.randbytes(100))
    with (folder / "preallocated").open("wb") as file:
        file.write(b"start")
        with contextlib.suppress(OSError):  # not on block-mapped files
            os.posix_fallocate(file.fileno(), 0, 200_000)
    os.link(folder / "tiny", folder / "tiny-hardlink")


@contextlib.contextmanager
def damaged(image: Path, places: list[tuple[int, int]], chance: random.Random) -> Iterator[None]:
    """A few bytes changed in one of the places, and put back at the end."""
    offset, length = chance.choice(places)
    with image.open("r+b", buffering=0) as file:
        file.seek(offset)
        original = file.read(length)
        damaged = bytearray(original)
        for _ in range(chance.choice((1, 1, 2, 16, 200))):
            byte = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
            damaged[chance.randrange(len(damaged))] = byte
        file.seek(offset)
        file.write(damaged)
        try:
            yield
        finally:
            file.seek(offset)
            file.write(original)


def patch(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)
