"""The loaders on an EFI system partition: the system's own, and the one that firmware without a
boot entry looks for (UEFI Specification 2.10, 3.5.1.1: \\EFI\\BOOT\\BOOT{machine}.EFI)."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from imager.errors import ImagerError

_SUFFIXES = {"x86_64": "x64", "aarch64": "aa64", "i686": "ia32", "riscv64": "riscv64"}

# Folders below \EFI that are no system's own, and one that starts no Linux.
_NOT_SYSTEMS = frozenset({"boot", "tools"})
_LAST = frozenset({"microsoft"})

# What a shim starts from its own folder: GRUB, and the manager of keys.
_BESIDE_SHIM = ("grub{}.efi", "mm{}.efi")


@dataclass(frozen=True)
class Loader:
    """``file`` as it lies in the mounted partition; ``path`` as firmware spells it."""

    file: Path
    path: str
    system: str
    """The name of its folder, like debian."""

    @property
    def is_shim(self) -> bool:
        return self.file.name.lower().startswith("shim")


def suffix() -> str:
    """What this machine's architecture is called in loaders' names."""
    return _SUFFIXES.get(platform.machine(), "x64")


def find_loader(esp: Path, machine: str | None = None) -> Loader | None:
    """The installed system's own loader: a signed shim before GRUB before systemd-boot.

    ``esp``: where the partition is mounted. The fallback itself when there is no other.
    """
    machine = machine or suffix()
    top = _inside(esp, "EFI")
    if top is None:
        return None
    folders = [folder for folder in _folders(top) if folder.name.lower() not in _NOT_SYSTEMS]
    folders.sort(key=lambda folder: (folder.name.lower() in _LAST, folder.name.lower()))
    for name in (f"shim{machine}.efi", f"grub{machine}.efi", f"systemd-boot{machine}.efi"):
        for folder in folders:
            if found := _inside(folder, name):
                return _loader(esp, found)
    for folder in folders:
        if found := _inside(folder, "Boot", "bootmgfw.efi"):
            return _loader(esp, found)
    found = _inside(top, "BOOT", f"BOOT{machine}.EFI")
    return _loader(esp, found) if found else None


def fill_fallback(esp: Path, machine: str | None = None) -> tuple[str, ...]:
    """Put the system's own loader at the fallback path when nothing is there; the paths of the
    new files, none when it is filled already.

    ``esp``: mounted for writing. Raises ImagerError when there is no loader to put there, or no
    room.
    """
    machine = machine or suffix()
    if _inside(esp, "EFI", "BOOT", f"BOOT{machine}.EFI"):
        return ()
    loader = find_loader(esp, machine)
    if loader is None:
        raise ImagerError("the EFI system partition has no boot loader that is known here")
    folder = _inside(esp, "EFI", "BOOT") or loader.file.parents[1] / "BOOT"
    copies = [(loader.file, folder / f"BOOT{machine.upper()}.EFI")]
    if loader.is_shim:
        for form in _BESIDE_SHIM:
            found = _inside(loader.file.parent, form.format(machine))
            if found and not _inside(folder, found.name):
                copies.insert(0, (found, folder / found.name))  # the one that counts comes last
    try:
        folder.mkdir(exist_ok=True)
        _check_room(esp, copies)
        for source, target in copies:
            _copy(source, target)
    except OSError as error:
        raise ImagerError(f"the fallback path could not be filled: {error}") from None
    return tuple(_firmware_path(esp, target) for _, target in reversed(copies))


def _check_room(esp: Path, copies: list[tuple[Path, Path]]) -> None:
    needed = sum(source.stat().st_size for source, _ in copies)
    free = shutil.disk_usage(esp).free
    if needed > free:
        raise ImagerError(
            f"the fallback path needs {needed} bytes on the EFI system partition; {free} are free"
        )


def _copy(source: Path, target: Path) -> None:
    """Whole and durable, or not at all."""
    partial = target.with_name("imager.tmp")
    try:
        with source.open("rb") as content, partial.open("wb") as copy:
            shutil.copyfileobj(content, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        partial.rename(target)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def _loader(esp: Path, file: Path) -> Loader:
    return Loader(file, _firmware_path(esp, file), file.relative_to(esp).parts[1])


def _firmware_path(esp: Path, file: Path) -> str:
    return "\\" + "\\".join(file.relative_to(esp).parts)


def _inside(folder: Path, *names: str) -> Path | None:
    """A path below, in whatever case it is written: FAT doesn't tell."""
    for name in names:
        found = next((e for e in _entries(folder) if e.name.lower() == name.lower()), None)
        if found is None:
            return None
        folder = found
    return folder


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _entries(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from sorted(folder.iterdir())
