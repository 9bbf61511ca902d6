"""Filesystems for the readers: filled with all kinds, and compared with the kernel's view."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from imager.blocksource import BlockSource, FileSource
from imager.files.comparing import digest
from imager.files.model import Entry, Reader
from imager.files.tree import Found, walk
from tests.loop.allocation_lab import differences, fill, mounted
from tests.support.trees import fill_tree

Tree = dict[str, object]


def fill_with_all(folder: Path, seed: int = 1) -> None:
    """Files, folders, links, devices, attributes, ACLs, holes, old and future times."""
    fill(folder, seed, files=80)
    (folder / "tree").mkdir()
    fill_tree(folder / "tree", seed)
    for name, seconds in (("old", -1_000_000_000), ("late", 5_000_000_000)):
        (folder / name).write_text(name)
        with contextlib.suppress(OSError, OverflowError):
            os.utime(folder / name, ns=(seconds * 10**9 + 1, seconds * 10**9 + 2))
    for length in (59, 60, 61, 200, 1000):
        (folder / f"link-{length}").symlink_to("x" * length)
    (folder / os.fsdecode(b"not \xff text\n")).touch()
    (folder / "empty").mkdir(mode=0o1777)
    for size in (1, 59, 60, 100, 150, 4095, 4096, 4097):
        (folder / f"size-{size}").write_bytes(bytes(n % 251 for n in range(size)))
    os.setxattr(folder / "old", "trusted.secret", b"\0\1")
    os.setxattr(folder / "old", "security.capability", b"\1\0\0\2" + bytes(16))
    for n in range(12):
        os.setxattr(folder / "size-100", f"user.number-{n}", b"value " * n)
    with (folder / "written-behind-holes").open("wb") as file:
        for at in (0, 1 << 16, 3 << 20, 9 << 20):
            file.seek(at)
            file.write(b"part")
        file.truncate(12 << 20)


def by_kernel(folder: Path) -> Tree:
    """What a mounted filesystem has. Sizes of folders are left out: nobody can use them."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path.relative_to(folder)): _seen(path) for path in paths}


def _seen(path: Path) -> object:
    info = path.lstat()
    content: object = None
    if stat.S_ISREG(info.st_mode):
        content = hashlib.blake2b(path.read_bytes(), digest_size=32).digest()
    elif stat.S_ISLNK(info.st_mode):
        content = str(path.readlink())
    names = os.listxattr(path, follow_symlinks=False)
    return (
        content,
        (info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_rdev),
        0 if stat.S_ISDIR(info.st_mode) else info.st_size,
        (info.st_atime_ns, info.st_mtime_ns, info.st_ctime_ns),
        {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
        info.st_ino,
    )


def by_reader(reader: Reader) -> Tree:
    top = Found("", reader.top())
    return {
        found.path.removeprefix("/") or ".": _read(reader, found.entry)
        for found in [top, *walk(reader, top)]
    }


def _read(reader: Reader, entry: Entry) -> object:
    content: object = None
    if entry.is_file:
        content = digest(reader, entry)
    elif entry.is_link:
        content = reader.target(entry)
    return (
        content,
        (entry.mode, entry.uid, entry.gid, entry.links, entry.rdev),
        0 if entry.is_folder else entry.size,
        (entry.atime_ns, entry.mtime_ns, entry.ctime_ns),
        dict(reader.attributes(entry)),
        entry.number[1],
    )


@contextlib.contextmanager
def reading(image: Path, open_one: Callable[[BlockSource], Reader]) -> Iterator[Reader]:
    with FileSource(image) as source:
        yield open_one(source)


def assert_as_the_kernel(
    image: Path, open_one: Callable[[BlockSource], Reader], options: str = "loop,ro"
) -> Reader:
    """Every entry, byte, time and attribute."""
    with mounted(image, options) as folder:
        expected = by_kernel(folder)
    with reading(image, open_one) as reader:
        found = by_reader(reader)
        for folder_path in ("", "/tree", "/many"):
            entry = reader.top()
            for name in filter(None, folder_path.split("/")):
                below = reader.find(entry, name)
                assert below is not None
                entry = below
            listed = sorted(item.name for item in reader.entries(entry))
            assert sorted(reader.names(entry)) == listed
            assert reader.find(entry, "no such name") is None
    assert differences(expected, found) == {}
    assert len(found) > 300
    return reader
