"""What all readers of filesystems share: an entry, and what a reader can be asked.

Readers judge foreign bytes: whatever does not fit raises NotRecognized, a feature that they don't
know UnsupportedError, and a place that can't be read OSError or IntegrityError.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

PIECE_BYTES = 1 << 20
"""The most of a file's content that is in memory at once."""

# linux/posix_acl_xattr.h: version, then tag, permissions and id of each entry
_ACL_VERSION = 2
_ACL_NO_ID = 0xFFFFFFFF
_ACL_TAGS = {0x01: False, 0x02: True, 0x04: False, 0x08: True, 0x10: False, 0x20: False}
"""Whether an entry of that tag has an id."""

_LETTERS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


class Entry(NamedTuple):
    """A file, folder, link or device. Times in nanoseconds since 1970, sizes in bytes."""

    name: str
    """Undecodable bytes as surrogates, as in ``os.fsdecode``; empty of the top."""
    number: tuple[int, int]
    """Of subvolume (0 where there are none) and inode: equal for hard links."""
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int
    """Of a device, as ``os.makedev`` gives it."""

    @property
    def kind(self) -> str:
        return _LETTERS.get(stat.S_IFMT(self.mode), "unknown")

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)


class Piece(NamedTuple):
    """Content of a file at an offset."""

    offset: int
    content: bytes


class Reader(Protocol):
    """A filesystem, for reading. Not safe for several threads."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know: a journal that was replayed in memory."""

    def top(self) -> Entry: ...

    def entries(self, folder: Entry) -> Iterator[Entry]:
        """What is in a folder, as the filesystem has it in order, without ``.`` and ``..``."""

    def names(self, folder: Entry) -> Iterator[str]:
        """The same, only the names."""

    def find(self, folder: Entry, name: str) -> Entry | None:
        """One of a folder's entries."""

    def target(self, link: Entry) -> str:
        """Of a symbolic link."""

    def attributes(self, entry: Entry) -> Mapping[str, bytes]:
        """Extended attributes, as getxattr(2) gives them; ACLs too."""

    def pieces(self, file: Entry) -> Iterator[Piece]:
        """A file's content in order, at most ``PIECE_BYTES`` each; what is left out is a hole."""


def acl_attribute(entries: list[tuple[int, int, int]]) -> bytes:
    """An access control list as the kernel gives it out; of (tag, permissions, id).

    Raises ValueError for an unknown tag.
    """
    parts = [struct.pack("<I", _ACL_VERSION)]
    for tag, permissions, id in entries:
        if tag not in _ACL_TAGS:
            raise ValueError(f"unknown tag {tag} in an access control list")
        parts.append(struct.pack("<HHI", tag, permissions, id if _ACL_TAGS[tag] else _ACL_NO_ID))
    return b"".join(parts)
