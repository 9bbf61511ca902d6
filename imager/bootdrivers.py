"""Which drivers an installed system has at hand when it boots, read from its own files.

Module names are with underscores, as in /proc/modules, whatever the files are called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from imager.errors import ImagerError
from imager.initramfs import read_cpio
from imager.rootfolder import RootFolder
from imager.sysfs import natural_key

# modules.alias of a distribution's kernel has some 2 MiB.
_MAX_LIST_BYTES = 32 << 20
_MAX_FILES = 100_000

_MODULE = re.compile(r"([^/]+)\.ko(?:\.(?:gz|xz|zst|bz2))?\Z")

# Names that distributions give to an initramfs; {} is the kernel's version or, on Arch, package.
_INITRAMFS = ("initrd.img-{}", "initramfs-{}.img", "initrd-{}", "initrd-{}.img", "initramfs-{}")

Aliases = Callable[[str], list[str]]
"""The modules that a modalias asks for."""


@dataclass(frozen=True)
class BootDrivers:
    """Of the kernel that boots by default."""

    kernel: str
    """Its version, as a folder in /lib/modules is called."""
    initramfs_modules: frozenset[str] | None
    """None when its initramfs can't be read: ``notes`` says why."""
    installed_modules: frozenset[str]
    """All modules on the root filesystem."""
    builtin: frozenset[str]
    kernels: tuple[str, ...] = ()
    """All versions that are installed, the newest first."""
    notes: tuple[str, ...] = ()

    def at_boot(self, module: str) -> bool | None:
        """Whether a module is there before the root filesystem is mounted; None if unknown."""
        name = module_name(module)
        if name in self.builtin:
            return True
        return None if self.initramfs_modules is None else name in self.initramfs_modules

    def installed(self, module: str) -> bool:
        """Whether the system has a module at all."""
        name = module_name(module)
        return name in self.builtin or name in self.installed_modules

    def knows(self, module: str) -> bool:
        """Whether anything of that name is there, in the initramfs either."""
        return self.installed(module) or bool(self.at_boot(module))


def module_name(text: str) -> str:
    """The one spelling of a module's name."""
    return text.replace("-", "_")


def read_boot_drivers(root: Path, boot: Path | None = None) -> BootDrivers | None:
    """The drivers of the system whose root is mounted at ``root``; None when it has no kernel
    modules (it is no root filesystem). ``boot``: where its /boot is mounted, if that is apart.

    Never raises for what it finds there; ``notes`` says what could not be read.
    """
    system = RootFolder(root)
    boots = RootFolder(boot) if boot is not None else None
    versions = sorted(_versions(system), key=natural_key, reverse=True)
    if not versions:
        return None
    kernel = _default(system, boots, versions)
    folder = f"lib/modules/{kernel}"
    notes: list[str] = []
    initramfs = _find_initramfs(system, boots, kernel)
    inside: frozenset[str] | None = None
    if initramfs is None:
        notes.append(f"no initramfs of kernel {kernel} was found")
    else:
        try:
            with initramfs.open("rb") as stream:
                inside = frozenset(_names(member.name for member in read_cpio(stream, want=_none)))
        except (ImagerError, OSError) as error:
            notes.append(f"{initramfs.name}: {error}")
    return BootDrivers(
        kernel=kernel,
        initramfs_modules=inside,
        installed_modules=frozenset(_names(_walk(system, folder))),
        builtin=frozenset(_names(_lines(system, f"{folder}/modules.builtin"))),
        kernels=tuple(versions),
        notes=tuple(notes),
    )


def read_aliases(root: Path, kernel: str) -> Aliases:
    """The kernel's own modules.alias, as what to ask for a device's modules."""
    known: dict[str, list[tuple[str, str]]] = {}
    for line in _lines(RootFolder(root), f"lib/modules/{kernel}/modules.alias"):
        words = line.split()
        if len(words) == 3 and words[0] == "alias":
            known.setdefault(words[1].partition(":")[0], []).append((words[1], words[2]))

    def ask(modalias: str) -> list[str]:
        candidates = known.get(modalias.partition(":")[0], [])
        found = (module for pattern, module in candidates if fnmatchcase(modalias, pattern))
        return list(dict.fromkeys(map(module_name, found)))

    return ask


def _versions(system: RootFolder) -> Iterator[str]:
    for name in system.names("lib/modules"):
        if system.path(f"lib/modules/{name}/modules.dep") or system.path(
            f"lib/modules/{name}/kernel"
        ):
            yield name


def _default(system: RootFolder, boots: RootFolder | None, versions: list[str]) -> str:
    """The newest that can boot: boot loaders' menus list that one first."""
    for version in versions:
        for name in _kernel_names(system, version):
            if _in_boot(system, boots, f"vmlinuz-{name}"):
                return version
    return versions[0]


def _kernel_names(system: RootFolder, version: str) -> list[str]:
    """By its version; on Arch files in /boot are named by the package."""
    package = (system.text(f"lib/modules/{version}/pkgbase") or "").strip()
    return [version, package] if package and "/" not in package else [version]


def _find_initramfs(system: RootFolder, boots: RootFolder | None, version: str) -> Path | None:
    for name in _kernel_names(system, version):
        for form in _INITRAMFS:
            if found := _in_boot(system, boots, form.format(name)):
                return found
    return system.path(f"lib/modules/{version}/initrd")


def _in_boot(system: RootFolder, boots: RootFolder | None, name: str) -> Path | None:
    return (boots.path(name) if boots else None) or system.path(f"boot/{name}")


def _walk(system: RootFolder, folder: str) -> Iterator[str]:
    top = system.path(folder)
    count = 0
    for _, _, names in os.walk(top) if top is not None else ():
        for name in names:
            count += 1
            if count > _MAX_FILES:
                return
            yield name


def _names(paths: Iterator[str]) -> Iterator[str]:
    for path in paths:
        if found := _MODULE.search(path):
            yield module_name(found[1])


def _lines(system: RootFolder, name: str) -> Iterator[str]:
    path = system.path(name)
    try:
        if path is None or path.stat().st_size > _MAX_LIST_BYTES:
            return
        with path.open(errors="replace") as file:
            yield from (line.strip() for line in file)
    except OSError:
        return


def _none(_: str) -> bool:
    return False
