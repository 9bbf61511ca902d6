"""Which kernel modules belong to a device, and in which order they are loaded.

Reads the text files that depmod(8) and the kernel's build leave in ``/lib/modules/VERSION``
(modules.dep(5); Linux Documentation/kbuild/kbuild.rst for the two of built-in modules):

- ``modules.dep``: ``PATH: DEPENDENCY…``, all of them, also the indirect ones
- ``modules.alias``: ``alias PATTERN NAME``, where a pattern is a shell's
- ``modules.softdep``: ``softdep NAME pre: NAME… post: NAME…``
- ``modules.builtin``: paths of what is in the kernel itself
- ``modules.builtin.modinfo``: ``NAME.KEY=VALUE`` with zero bytes between
- ``modules.builtin.alias``: as ``modules.alias``; written by this project for the rescue system,
  instead of the former

Only the standard library is used: the rescue system loads its drivers by this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Self

INDEX_FILES = (
    "modules.dep",
    "modules.alias",
    "modules.softdep",
    "modules.builtin",
    "modules.builtin.modinfo",
    "modules.builtin.alias",
)

_MAX_INDEX_SIZE = 64 << 20  # the largest that distributions have is 2 MiB
_SUFFIX = re.compile(r"\.ko(?:\.(?:gz|xz|zst))?\Z")
_WILDCARD = re.compile(r"[*?[]")
_BRACKETS = re.compile(r"(\[[^]]*\])")


class SoftDependency(NamedTuple):
    """What helps a module if it is there: before and after it."""

    before: tuple[str, ...]
    after: tuple[str, ...]


class _Pattern(NamedTuple):
    literal: str  # up to the first wildcard: most devices are told apart by that alone
    pattern: str
    name: str


def normal_name(text: str) -> str:
    """A module's name as the kernel has it: ``virtio-blk`` and ``virtio_blk`` are the same."""
    return text.replace("-", "_")


def module_name(path: str | Path) -> str:
    """``nvme_core`` of ``kernel/drivers/nvme/host/nvme-core.ko.xz``."""
    return normal_name(_SUFFIX.sub("", Path(path).name))


class ModuleIndex:
    """The modules of one kernel. Names may be given with ``-`` or ``_``."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """``texts``: contents of those of ``INDEX_FILES`` that exist, by name.

        Lines that cannot be read are passed over: a driver less, but the others are found.
        """
        self.paths: dict[str, Path] = {}
        self.dependencies: dict[str, tuple[str, ...]] = {}
        self.softdeps: dict[str, SoftDependency] = {}
        self.builtin: set[str] = set()
        self._exact: dict[str, list[str]] = {}
        self._patterns: dict[str, list[_Pattern]] = {}
        self._parse_dependencies(texts.get("modules.dep", ""))
        self._parse_softdeps(texts.get("modules.softdep", ""))
        self.builtin.update(map(module_name, texts.get("modules.builtin", "").split()))
        self.builtin_aliases = list(_builtin_aliases(texts))
        for pattern, name in self.builtin_aliases:
            self._add_alias(pattern, name)
        for pattern, name in aliases(texts.get("modules.alias", "")):
            self._add_alias(pattern, name)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The index in ``/lib/modules/VERSION``. Files that are missing count as empty."""
        return cls.from_reader(lambda name: _read_bounded(folder / name))

    @classmethod
    def from_reader(cls, read: Callable[[str], bytes | None]) -> Self:
        """The index from files that ``read`` gives by name, None for those that are missing."""
        contents = {name: read(name) for name in INDEX_FILES}
        return cls(
            {
                name: content.decode(errors="replace")
                for name, content in contents.items()
                if content is not None
            }
        )

    def __contains__(self, name: str) -> bool:
        """Whether there is a file for this module."""
        return normal_name(name) in self.paths

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def is_builtin(self, name: str) -> bool:
        """Whether the kernel itself holds this module."""
        return normal_name(name) in self.builtin

    def modules_for(self, modalias: str) -> list[str]:
        """Names of the modules for a device's ``modalias``, or for any other alias (``fs-ext4``).

        Those in the kernel itself are among them (``is_builtin``).
        """
        wanted = _normal_alias(modalias)
        found = list(self._exact.get(wanted, ()))
        # A pattern without a bus of its own is in the family without a name.
        for family in dict.fromkeys((_family(wanted), "")):
            found += (
                entry.name
                for entry in self._patterns.get(family, ())
                if wanted.startswith(entry.literal) and fnmatchcase(wanted, entry.pattern)
            )
        return list(dict.fromkeys(found))

    def load_order(self, name: str) -> list[Path]:
        """Files to load for a module, in order, as paths below the folder of the index.

        Its soft dependencies before it, its dependencies, itself, its soft dependencies after it.
        Nothing for a module that is in the kernel or that does not exist.
        """
        return [self.paths[each] for each in self._closure(normal_name(name))]

    def resolve(self, text: str) -> list[str]:
        """Modules that a soft dependency or a user names: by name, else by alias."""
        name = normal_name(text)
        if name in self.paths or name in self.builtin:
            return [name]
        return self.modules_for(text)

    def _closure(self, first: str) -> dict[str, None]:
        """With a stack, not by recursion: chains come from a file."""
        done: dict[str, None] = {}
        stack: list[tuple[str, bool]] = [(first, False)]
        entered: set[str] = set()
        while stack:
            name, needs_are_done = stack.pop()
            if needs_are_done:
                done[name] = None
            elif name in self.paths and name not in entered:
                entered.add(name)
                soft = self.softdeps.get(name, SoftDependency((), ()))
                after = [other for text in soft.after for other in self.resolve(text)]
                before = [other for text in soft.before for other in self.resolve(text)]
                # modules.dep names what must come first last
                before += reversed(self.dependencies[name])
                stack += [(other, False) for other in reversed(after)]
                stack.append((name, True))
                stack += [(other, False) for other in reversed(before)]
        return done

    def _parse_dependencies(self, text: str) -> None:
        for line in text.splitlines():
            path, colon, needs = line.partition(":")
            if colon and _is_relative(path):
                name = module_name(path)
                self.paths[name] = Path(path)
                self.dependencies[name] = tuple(map(module_name, needs.split()))

    def _parse_softdeps(self, text: str) -> None:
        for line in text.splitlines():
            match line.split():
                case ["softdep", name, *words]:
                    self.add_softdep(name, words)

    def add_softdep(self, name: str, words: Iterable[str]) -> None:
        """One soft dependency in the words of modprobe.d(5): ``pre: NAME… post: NAME…``."""
        before, after = self.softdeps.get(normal_name(name), SoftDependency((), ()))
        found = {"pre:": list(before), "post:": list(after)}
        current: list[str] = []
        for word in words:
            if word in found:
                current = found[word]
            elif word not in current:
                current.append(word)
        self.softdeps[normal_name(name)] = SoftDependency(
            tuple(found["pre:"]), tuple(found["post:"])
        )

    def _add_alias(self, pattern: str, name: str) -> None:
        normal = _normal_alias(pattern)
        wildcard = _WILDCARD.search(normal)
        if wildcard is None:
            self._exact.setdefault(normal, []).append(name)
        else:
            entry = _Pattern(normal[: wildcard.start()], normal, name)
            self._patterns.setdefault(_family(entry.literal), []).append(entry)


def aliases(text: str) -> Iterator[tuple[str, str]]:
    """Pairs of pattern and module name from the text of a ``modules.alias``."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 3 and words[0] == "alias":
            # patterns of DMI strings may hold spaces
            yield " ".join(words[1:-1]), normal_name(words[-1])


def _builtin_aliases(texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from aliases(texts.get("modules.builtin.alias", ""))
    for record in texts.get("modules.builtin.modinfo", "").split("\0"):
        key, equals, value = record.partition("=")
        name, dot, kind = key.partition(".")
        if equals and dot and kind == "alias":
            yield value, normal_name(name)


def _family(text: str) -> str:
    """The bus that an alias begins with."""
    bus, colon, _ = text.partition(":")
    return bus if colon else ""


def _normal_alias(text: str) -> str:
    """As kmod does: ``-`` is ``_``, but not in the ranges of a pattern."""
    if "-" not in text:
        return text
    parts = _BRACKETS.split(text)
    return "".join(part if part.startswith("[") else normal_name(part) for part in parts)


def _is_relative(path: str) -> bool:
    """Kept within the folder: the index may be a foreign one."""
    return bool(path) and not path.startswith("/") and ".." not in path.split("/")


def _read_bounded(file: Path) -> bytes | None:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_INDEX_SIZE)
    except OSError:
        return None
