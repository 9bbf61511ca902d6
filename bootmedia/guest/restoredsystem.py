"""A restored system on this machine's disks, mounted as its own fstab says, so that its data can be
brought back: see ``datascreen``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bootmedia.guest.attached import Volume, mounted, volumes
from imager.data.bringing import FstabLine, read_fstab
from imager.errors import ImagerError
from imager.process import run

_ROOT_KINDS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs"})
_ROOT_FOLDERS = ("", "@", "root", "@rootfs")

# Names that mean the same disk in this system.
_STABLE_NAMES = ("UUID=", "LABEL=", "PARTUUID=", "PARTLABEL=")

# Of mount(8): what says where a filesystem's content is. The others are for the running system.
_KEPT_OPTIONS = ("subvol=", "subvolid=")

REPOSITORY_POINT = "/run/imager-data"
"""Where a repository is mounted in the restored system that its fstab doesn't bring."""

Say = Callable[[str], object]


class RestoredSystem(NamedTuple):
    """``folder``: of the root, below the volume's own; ``host`` as its /etc/hostname says."""

    volume: Volume
    folder: str
    host: str


def restored_systems(note: Say) -> list[RestoredSystem]:
    """Root filesystems on attached disks that nobody uses."""
    found = []
    for volume in volumes():
        if volume.kind not in _ROOT_KINDS:
            continue
        try:
            with mounted(volume) as point:
                found += [
                    RestoredSystem(volume, folder, _host(point / folder))
                    for folder in _ROOT_FOLDERS
                    if (point / folder / "etc/fstab").is_file()
                ]
        except ImagerError as error:
            note(error.message)
    return found


def _host(root: Path) -> str:
    try:
        return (root / "etc/hostname").read_text(errors="replace").strip()
    except OSError:
        return ""


@contextmanager
def mounted_system(system: RestoredSystem, say: Say) -> Iterator[Path]:
    """The system's root, writable, with the filesystems of its fstab, and with /dev, /proc, /sys
    and /run for programs that run in it. ``say`` is told what is not there."""
    with ExitStack() as stack:
        point = stack.enter_context(mounted(system.volume, writable=True))
        root = point / system.folder
        if system.folder:  # a program's root has to be a mount point for mount(8) to work in it
            _mount(stack, root, "--bind", str(root))
        for line in sorted(read_fstab(root), key=lambda item: item.point):
            if line.point != "/":
                _mount_line(stack, root, line, say)
        for name in ("dev", "proc", "sys"):
            _mount(stack, root / name, "--bind", f"/{name}")
        _mount(stack, root / "run", "-t", "tmpfs", "run")
        _bring_names(stack, root)
        yield root


def _mount_line(stack: ExitStack, root: Path, line: FstabLine, say: Say) -> None:
    if not line.device.startswith(_STABLE_NAMES):
        say(f"{line.point} is not mounted: {line.device} may be another disk here")
        return
    options = [word for word in line.options.split(",") if word.startswith(_KEPT_OPTIONS)]
    kind = ["-t", line.kind] if line.kind != "auto" else []
    try:
        _mount(
            stack,
            root / line.point.lstrip("/"),
            *kind,
            *("-o", ",".join(["rw", *options])),
            line.device.replace('"', ""),
        )
    except ImagerError as error:
        say(f"{line.point} is not mounted: {error.message}")


def _mount(stack: ExitStack, point: Path, *words: str) -> None:
    """Raises ToolError. What is not a folder of the system's is not made: it is left alone."""
    if not point.is_dir() or point.is_symlink():
        raise ImagerError(f"{point} is no folder")
    run(["mount", *words, str(point)])
    stack.callback(run, ["umount", "-l", str(point)])


def _bring_names(stack: ExitStack, root: Path) -> None:
    """This system's name servers, for programs that run in the other."""
    here, there = Path("/etc/resolv.conf"), root / "etc/resolv.conf"
    if here.is_file() and there.is_file() and not there.is_symlink():
        run(["mount", "--bind", str(here), str(there)])
        stack.callback(run, ["umount", "-l", str(there)])


@contextmanager
def repository_from_disks(root: Path, repository: str, medium: Path | None) -> Iterator[str | None]:
    """A local repository that is not where the configuration says: looked for on the medium and on
    the attached disks by the ends of its path. Yields its path in the restored system."""
    parts = [part for part in repository.split("/") if part]
    ends = ["/".join(parts[first:]) for first in range(len(parts))]
    with ExitStack() as stack:
        for folder in _places(stack, medium):
            found = next((folder / end for end in ends if (folder / end).is_dir()), None)
            if found is not None:
                point = root / REPOSITORY_POINT.lstrip("/")
                point.mkdir(exist_ok=True)
                _mount(stack, point, "--bind", str(found))
                yield REPOSITORY_POINT
                return
        yield None


def _places(stack: ExitStack, medium: Path | None) -> Iterator[Path]:
    if medium is not None:
        yield medium
    for volume in volumes():
        try:
            yield stack.enter_context(mounted(volume))
        except ImagerError:
            continue
