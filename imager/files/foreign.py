"""Reads NTFS, FAT and exFAT through the package fs-explorer, whose one door this is.

Its drivers are used by themselves: nothing is guessed, and nothing but the source is read. What
these filesystems don't have is made up: root owns everything, and everybody may read it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from imager.blocksource import BlockSource
from imager.errors import ImagerError, NotRecognized, UnsupportedError
from imager.files.model import PIECE_BYTES, Entry, Piece

_DRIVERS = {
    "ntfs": ("ntfs", "NTFSDriver"),
    "vfat": ("fat", "FATDriver"),
    "exfat": ("exfat", "ExFATDriver"),
}

_CACHE_BYTES = 16 << 20
_FOLDER, _FILE, _LINK = 0o40755, 0o100644, 0o120777
_NTFS_ENCRYPTED = 0x4000


class ForeignReader:
    """A ``Reader``; the subclasses name the driver."""

    kind: str
    notes: tuple[str, ...] = ()

    def __init__(self, source: BlockSource) -> None:
        """Raises UnsupportedError without the package, NotRecognized, OSError."""
        try:
            tree = import_module("fs_explorer.tree")
            io = import_module("fs_explorer.io.cache")
            self._errors = import_module("fs_explorer.errors")
            stats = import_module("fs_explorer.io.stats")
            parallel = import_module("fs_explorer.io.parallel")
        except ImportError as error:
            raise UnsupportedError(f"the Python package fs-explorer is missing: {error}") from None
        module, name = _DRIVERS[self.kind]
        driver = getattr(import_module(f"fs_explorer.filesystems.{module}"), name)
        context = tree.Context(
            cache=io.Cache(_CACHE_BYTES), stats=stats.Stats(), pool=parallel.Pool(1)
        )
        with self._translated():
            access = _access(source)
            self._tree: Any = driver.open(access, context, tree.ProbeHint.make(access))
            self._nodes: list[Any] = [self._tree.root()]
        self._numbers: dict[Any, int] = {}

    def top(self) -> Entry:
        return self._entry(self._nodes[0], "")

    def entries(self, folder: Entry) -> Iterator[Entry]:
        for node in self._children(folder):
            with self._translated():
                full = node if node.statted else self._tree.stat(node)
                found = self._entry(full, node.name)
            yield found

    def names(self, folder: Entry) -> Iterator[str]:
        return (node.name for node in self._children(folder))

    def find(self, folder: Entry, name: str) -> Entry | None:
        """Upper and lower case count as written here, as everywhere in ``imager files``."""
        return next((entry for entry in self.entries(folder) if entry.name == name), None)

    def target(self, link: Entry) -> str:
        with self._translated():
            target = self._tree.readlink(self._node(link))
        if not target:
            raise NotRecognized("a link without a target")
        return str(target)

    def attributes(self, entry: Entry) -> Mapping[str, bytes]:
        return {}

    def pieces(self, file: Entry) -> Iterator[Piece]:
        node = self._node(file)
        if self.kind == "ntfs" and node.extra.get("attributes", 0) & _NTFS_ENCRYPTED:
            raise UnsupportedError("it is encrypted (EFS): the key is not in the image")
        with self._translated():
            content = self._tree.open_file(node)
            ranges = content.data_ranges()
        for start, length in ranges if ranges is not None else [(0, file.size)]:
            for at in range(start, min(start + length, file.size), PIECE_BYTES):
                with self._translated():
                    wanted = min(PIECE_BYTES, start + length - at, file.size - at)
                    piece = Piece(at, content.read_exact(at, wanted))
                yield piece

    def _children(self, folder: Entry) -> Iterator[Any]:
        with self._translated():
            children = iter(self._tree.children(self._node(folder), True))
        while True:
            with self._translated():
                node = next(children, None)
            if node is None:
                return
            if node.error is not None:
                raise NotRecognized(f"{node.name}: {node.error}")
            yield node

    def _node(self, entry: Entry) -> Any:
        return self._nodes[entry.number[1]]

    def _entry(self, node: Any, name: str) -> Entry:
        kind = node.type.value
        mode = {"dir": _FOLDER, "volume": _FOLDER, "symlink": _LINK}.get(kind, _FILE)
        number = len(self._nodes)
        self._nodes.append(node)
        if node.inode is not None:  # the same number for each name of a file, and for a loop
            number = self._numbers.setdefault(node.inode, number)
        return Entry(
            name,
            (0, number),
            mode,
            0,
            0,
            node.size or 0,
            node.nlink or 1,
            node.atime_ns or 0,
            node.mtime_ns or 0,
            node.ctime_ns or node.mtime_ns or 0,
            0,
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The package's errors, and whatever foreign bytes make it stumble over, as ours."""
        try:
            yield
        except (ImagerError, OSError):
            raise
        except self._errors.FsExplorerError as error:
            raise NotRecognized(str(error)) from None
        except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
            raise NotRecognized(f"damaged: {error!r}") from None


class NtfsReader(ForeignReader):
    kind = "ntfs"


class FatReader(ForeignReader):
    kind = "vfat"


class ExfatReader(ForeignReader):
    kind = "exfat"


def _access(source: BlockSource) -> Any:
    """The source as the package reads."""
    base: Any = import_module("fs_explorer.io.source").RandomAccess

    class Access(base):  # type: ignore[misc]
        size = source.size

        def read_at(self, off: int, n: int) -> bytes:
            if off < 0:
                raise OSError(errno.EINVAL, "a negative offset")
            return source.pread(off, max(min(n, source.size - off), 0)) if n > 0 else b""

    return Access()
