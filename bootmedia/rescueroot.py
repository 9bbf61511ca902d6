"""The rescue system's root while it is gathered: files, and the libraries that they need.

A library in a folder of Python packages stays beside its user, who finds it by $ORIGIN. All
others go into the folder of the C library, where the dynamic linker looks without a cache: the
host's own folders (RUNPATH, /etc/ld.so.conf.d) don't exist in the rescue system.
"""

from __future__ import annotations

import stat
from functools import cached_property
from pathlib import Path

from bootmedia.cpio import File, Folder, Link, Tree
from bootmedia.elf import Elf, LibraryFinder, is_elf, read_elf
from imager.errors import ToolError

# Symbols and section headers below this many bytes are not worth a copy in memory.
_WORTH_CUTTING = 32 << 10


class RescueRoot:
    """``tree`` is what was gathered so far, ``warnings`` what could not be had."""

    def __init__(self, like: Path) -> None:
        """``like``: a dynamically linked program, which tells where the C library lies."""
        self.tree = Tree()
        self.warnings: list[str] = []
        self._finder = LibraryFinder()
        self._like = read_elf(like)
        self._inherited = self._like.search_folders()
        self._source_at: dict[str, Path] = {}
        self._moved: dict[Path, str] = {}

    @cached_property
    def _library_folder(self) -> str:
        libc = next((name for name in self._like.needed if name.startswith("libc.")), None)
        if libc is None:
            return "/lib"
        return str(self._finder.find(libc, self._like).parent)

    def move_folder(self, folder: Path, path: str) -> None:
        """Libraries below ``folder`` keep their place in it, which is ``path`` from now on."""
        self._moved[folder] = path

    def add_text(self, path: str, text: str, *, mode: int = 0o644) -> None:
        self.tree.add(File(path, mode, text.encode()))

    def add_bytes(self, path: str, content: bytes) -> None:
        self.tree.add(File(path, 0o644, content))

    def add_folder(self, path: str) -> None:
        self.tree.add(Folder(path))

    def add_link(self, path: str, target: str) -> None:
        self.tree.add(Link(path, target))

    def add_file(self, source: Path, path: str) -> None:
        """A file as it is, or an ELF file with all libraries that it needs.

        Raises ToolError when a library is missing; then nothing was added.
        """
        if not is_elf(source):
            mode = 0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644
            self.tree.add(File(path, mode, source))
            return
        wanted: dict[str, Elf] = {}
        self._gather(read_elf(source), path, wanted)
        for place, elf in wanted.items():
            self.tree.add(File(place, 0o755, _loaded_part(elf)))

    def add_library(self, name: str) -> bool:
        """A library that no ELF file names: it is opened while running. False if not installed."""
        try:
            source = self._finder.find(name, self._like, self._inherited)
            self.add_file(source, f"{self._library_folder}/{name}")
        except ToolError:
            return False
        return True

    def _gather(self, elf: Elf, path: str, wanted: dict[str, Elf]) -> None:
        """Put the file and what it needs into ``wanted``, by place in the rescue system."""
        if path in wanted or path in self.tree:
            return
        wanted[path] = elf
        if elf.interpreter is not None:
            wanted.setdefault(elf.interpreter, read_elf(Path(elf.interpreter)))
        for name in elf.needed:
            source = self._finder.find(name, elf, self._inherited)
            place = self._place(name, source)
            self._gather(read_elf(source), place, wanted)

    def _place(self, name: str, source: Path) -> str:
        """Where a library goes that was found at ``source`` under this name."""
        for folder, path in self._moved.items():
            if source.is_relative_to(folder):
                return f"{path}/{source.relative_to(folder)}"
        if name.startswith("ld-") and self._like.interpreter:
            return self._like.interpreter
        place = f"{self._library_folder}/{name}"
        if self._source_at.setdefault(place, source.resolve()) != source.resolve():
            return str(source)  # two of one name: its user knows this one by its full path
        return place


def _loaded_part(elf: Elf) -> Path | bytes:
    """The file, without the symbols and section headers that lie behind all that is loaded.

    Never more than that: moving loaded parts (strip) breaks libraries which patchelf edited.
    """
    size = elf.path.stat().st_size
    if size - elf.loaded_size < _WORTH_CUTTING:
        return elf.path
    with elf.path.open("rb") as file:
        loaded = bytearray(file.read(elf.loaded_size))
    offset, fields = (0x28, (8, 0x3A)) if elf.bits == 64 else (0x20, (4, 0x2E))
    width, counts = fields
    loaded[offset : offset + width] = bytes(width)  # e_shoff
    loaded[counts : counts + 6] = bytes(6)  # e_shentsize, e_shnum, e_shstrndx
    return bytes(loaded)
