"""File trees that have everything a restore must bring back, and their description."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import struct
from pathlib import Path

# linux/posix_acl_xattr.h: version 2, then (tag, permissions, id) in the order of the tags
_ACL_UNDEFINED = 0xFFFFFFFF
_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, id)
    for tag, permissions, id in (
        (0x01, 6, _ACL_UNDEFINED),
        (0x02, 7, 4711),
        (0x04, 4, _ACL_UNDEFINED),
        (0x10, 7, _ACL_UNDEFINED),
        (0x20, 0, _ACL_UNDEFINED),
    )
)


def fill_tree(folder: Path, seed: int, files: int = 60) -> None:
    """Files of many sizes with owners, modes, times, xattrs, ACLs, links, holes, some deleted."""
    chance = random.Random(seed)
    paths = [folder / f"d{n % 5}" / f"file-{n}" for n in range(files)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(chance.randbytes(int(400_000 * chance.random() ** 3)))
    os.sync()
    for path in paths[::3]:
        path.unlink()
    (folder / "ä link").symlink_to("d1")
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "node", 0o600 | stat.S_IFBLK, os.makedev(8, 1))
    with (folder / "sparse").open("wb") as file:
        file.seek(5_000_000)
        file.write(b"after a hole")
    left = [path for path in paths if path.exists()]
    os.link(left[0], folder / "hardlink")
    os.setxattr(left[1], "system.posix_acl_access", _ACL)
    os.setxattr(left[1].parent, "system.posix_acl_default", _ACL)
    for path in left[2:]:
        path.chmod(chance.randrange(0o10000))
        os.chown(path, chance.randrange(1 << 16), chance.randrange(1 << 16))
        os.setxattr(path, "user.note", chance.randbytes(chance.randrange(1, 200)))
        os.utime(path, ns=(chance.randrange(1 << 60), chance.randrange(1 << 60)))


def describe_tree(folder: Path) -> dict[str, object]:
    """All of a tree, for comparing. Mount with noatime, or times of reading change by it."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path.relative_to(folder)): _describe(path) for path in paths}


def _describe(path: Path) -> tuple[object, ...]:
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
        (info.st_size, info.st_atime_ns, info.st_mtime_ns, info.st_ctime_ns),
        {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
    )
