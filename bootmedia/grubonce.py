"""An entry of this machine's own GRUB that it takes at the next start, once.

GRUB reads ``next_entry`` from its environment block, and takes it out before it boots that entry:
so whatever comes of it, the start after it is the usual one. It can do so only where it can write
without knowing the filesystem: it writes the sectors of the block in place. The entry itself stands
in ``custom.cfg``, which every generated ``grub.cfg`` reads.

Source: GNU GRUB Manual 2.06, 16.2 "The GRUB environment block", and ``/etc/grub.d/00_header``,
``41_custom`` of GRUB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imager.allocation import identify
from imager.blocksource import FileSource
from imager.deviceuse import SYS_ROOT
from imager.errors import ImagerError
from imager.mounttable import mount_of
from imager.process import find_tool, run

_FOLDERS = ("grub", "grub2")  # Debian and Arch; Fedora and SUSE
_EDITORS = ("grub-editenv", "grub2-editenv")
_CONFIG, _CUSTOM, _ENVIRONMENT = "grub.cfg", "custom.cfg", "grubenv"
_NEXT = "next_entry"

# Where a sector that is written in place is still what the filesystem reads as the file.
_WRITABLE = ("ext2", "ext3", "ext4", "xfs", "vfat")

_ENTRY = """{begin}
menuentry "{title}" --id {id} --unrestricted {{
    search --no-floppy --fs-uuid --set=root {uuid}
    linux {kernel} {arguments}
    initrd {layers}
}}
{end}
"""


@dataclass(frozen=True)
class Entry:
    """``kernel`` and ``layers`` are files of the filesystem that GRUB's own folder lies on."""

    id: str
    title: str
    kernel: Path
    layers: Sequence[Path]
    arguments: str


class Grub:
    """GRUB as it is installed below a folder ``/boot``."""

    def __init__(self, boot: Path) -> None:
        self._boot = boot
        found = (boot / name for name in _FOLDERS)
        self._folder = next((path for path in found if (path / _CONFIG).is_file()), None)

    def refusals(self) -> list[str]:
        """Why it can't be told to start something once."""
        return list(self._reasons())

    def _reasons(self) -> Iterator[str]:
        if self._folder is None:
            yield f"there is no GRUB: no {self._boot}/grub/{_CONFIG}"
            return
        if next(filter(find_tool, _EDITORS), None) is None:
            yield f"{_EDITORS[0]} is not installed"
        config = self._folder / _CONFIG
        text = config.read_text(errors="replace")
        for word, what in ((_NEXT, "knows no entry for one start"), (_CUSTOM, "does not read it")):
            if word not in text:
                yield f"{config} {what} ({word}): make it anew with update-grub"
        yield from _unwritable(self._folder)

    def arrange(self, entry: Entry) -> None:
        """The next start takes the entry, the one after it is the usual one again.

        Raises ImagerError when something is not as ``refusals`` found it.
        """
        folder = self._open_folder()
        custom = folder / _CUSTOM
        text = _without(entry.id, _text_of(custom)) + self._words(entry)
        _replace(custom, text)
        self._edit("set", f"{_NEXT}={entry.id}")

    def cancel(self, entry_id: str) -> bool:
        """Forget the entry; whether there was one, or it was to be started."""
        if self._folder is None:
            return False
        was_next = self.next_entry() == entry_id
        if was_next:
            self._edit("unset", _NEXT)
        custom = self._folder / _CUSTOM
        text = _text_of(custom)
        rest = _without(entry_id, text)
        if rest != text:
            if rest.strip():
                _replace(custom, rest)
            else:
                custom.unlink()
                _sync(self._folder)
        return was_next or rest != text

    def next_entry(self) -> str | None:
        """What the next start takes, if not the usual."""
        if self._folder is None or not (self._folder / _ENVIRONMENT).exists():
            return None
        lines = (self._folder / _ENVIRONMENT).read_text(errors="replace").splitlines()
        values = [line.partition("=")[2] for line in lines if line.startswith(f"{_NEXT}=")]
        return values[-1] if values and values[-1] else None

    def _words(self, entry: Entry) -> str:
        folder = self._open_folder()
        with FileSource(_device_of(folder)) as source:
            uuid = identify(source).uuid
        if uuid is None:
            raise ImagerError(f"the filesystem of {folder} has no UUID for GRUB to find it by")
        return _ENTRY.format(
            begin=_begin(entry.id),
            end=_end(entry.id),
            title=entry.title,
            id=entry.id,
            uuid=uuid,
            kernel=_path_in_filesystem(entry.kernel),
            layers=" ".join(_path_in_filesystem(path) for path in entry.layers),
            arguments=entry.arguments,
        )

    def _edit(self, *words: str) -> None:
        folder = self._open_folder()
        editor = next(filter(find_tool, _EDITORS), _EDITORS[0])
        environment = folder / _ENVIRONMENT
        if not environment.exists():
            run([editor, str(environment), "create"])
        run([editor, str(environment), *words])
        _sync(environment)
        _sync(folder)

    def _open_folder(self) -> Path:
        if self._folder is None:
            raise ImagerError(f"there is no GRUB in {self._boot}")
        return self._folder


def _unwritable(folder: Path) -> Iterator[str]:
    """Why GRUB can't take ``next_entry`` out again: it would start the entry for ever."""
    environment = folder / _ENVIRONMENT
    if environment.is_symlink():
        yield f"{environment} is a link: GRUB cannot write there"
    try:
        device = _device_of(folder)
        if Path(device).name.startswith(("dm-", "md", "bcache", "zd")):
            yield f"{folder} lies on LVM, RAID or encryption ({device}): GRUB cannot write there"
            return
        with FileSource(device) as source:
            kind = identify(source).kind
    except ImagerError as error:
        yield error.message
        return
    if kind not in _WRITABLE:
        yield f"{folder} lies on {kind}: GRUB cannot write there"


def _device_of(folder: Path) -> str:
    """Raises ImagerError where the filesystem is on no single device, as with Btrfs and ZFS."""
    number = folder.stat().st_dev
    entry = SYS_ROOT / f"dev/block/{os.major(number)}:{os.minor(number)}"
    if not entry.exists():
        raise ImagerError(
            f"{folder} lies on a filesystem of several devices or none (Btrfs, ZFS, network): "
            "GRUB cannot write there"
        )
    return f"/dev/{entry.resolve().name.replace('!', '/')}"


def _path_in_filesystem(path: Path) -> str:
    """As GRUB names it: from the filesystem's own root."""
    path = path.resolve()
    mount = mount_of(path)
    if mount is None:
        raise ImagerError(f"{path}: it is not known what is mounted there")
    return str(Path(mount.root) / path.relative_to(mount.point))


def _begin(entry_id: str) -> str:
    return f"# begin {entry_id}"


def _end(entry_id: str) -> str:
    return f"# end {entry_id}"


def _without(entry_id: str, text: str) -> str:
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        inside = inside or line.strip() == _begin(entry_id)
        if not inside:
            kept.append(line)
        if line.strip() == _end(entry_id):
            inside = False
    return "".join(kept)


def _text_of(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    return text if not text or text.endswith("\n") else f"{text}\n"


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    _sync(new)
    new.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
