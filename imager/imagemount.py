"""An image's filesystems, mounted read-only by the kernel.

A view (``coverage.view``) gives each volume out as a file; what the kernel writes to it, the replay
of a journal, stays in memory. Needs root, FUSE, loop devices, and a kernel that knows the
filesystem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from imager.allocation import AllocationMap, Companion, Filesystem, identify
from imager.allocation.model import all_used
from imager.blocksource import BlockSource, PartSource
from imager.bootdrivers import Aliases, BootDrivers, read_aliases, read_boot_drivers
from imager.coverage.files import mounted as mounted_view
from imager.coverage.view import open_view
from imager.errors import ImagerError
from imager.extents import Extents
from imager.imagesource import ImageSource
from imager.manifest import Manifest
from imager.repository import Repository
from imager.rootfolder import RootFolder

_MOUNTABLE = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "exfat", "f2fs", "ntfs"})
_CONTAINERS = frozenset({"lvm2", "md"})

# Debian's and Arch's subvolume, SUSE's, Fedora's: where a root lies in a Btrfs.
_ROOT_FOLDERS = ("", "@", "@/.snapshots/1/snapshot", "root", "@rootfs")

# Looking for a root takes a mount each.
_MOST_VOLUMES = 32


@dataclass(frozen=True)
class ImageVolume:
    """A partition or logical volume of an image; ``name`` is like "sda 2" or "vg/root"."""

    name: str
    source: BlockSource
    filesystem: Filesystem
    reason: str | None = None
    """Why it is not readable."""


class ImageDrivers(NamedTuple):
    """What an image's own root filesystem says; ``reason`` why it says nothing."""

    drivers: BootDrivers | None
    aliases: Aliases | None
    reason: str | None


def image_volumes(sources: Sequence[tuple[str, BlockSource, Manifest]]) -> list[ImageVolume]:
    """All volumes of an image's disks, logical ones too. Each source is a disk with its name."""
    found: list[ImageVolume] = []
    for name, source, manifest in sources:
        disk = next(item for item in manifest.disks if item.name == name)
        parts = [p for p in disk.table.partitions if p.kind != "extended" and p.end <= source.size]
        places = [(f"{name} {p.number}", p.offset, p.size) for p in parts]
        for label, offset, size in places or [(name, 0, source.size)]:
            part = PartSource(source, offset, size)
            found.append(ImageVolume(label, part, identify(part)))
    return [inner for volume in found for inner in _opened(volume, found)]


@contextmanager
def mounted(volume: ImageVolume) -> Iterator[Path]:
    """The folder where the volume is mounted read-only.

    Raises ImagerError saying why when it is not readable: not root, no FUSE, an unknown kind.
    """
    if volume.reason is not None:
        raise ImagerError(f"{volume.name} is not readable: {volume.reason}")
    with ExitStack() as stack:
        view = stack.enter_context(open_view(volume.source, Extents.whole(volume.source.size)))
        folder = stack.enter_context(
            mounted_view(view.path, volume.filesystem.kind, volume.source.logical_sector)
        )
        yield folder


def read_image_drivers(repository: Repository, manifest: Manifest) -> ImageDrivers:
    """Look into an image for its kernel, initramfs and modules; never raises for what is there."""
    try:
        with ExitStack() as stack:
            sources: list[tuple[str, BlockSource, Manifest]] = [
                (disk.name, stack.enter_context(ImageSource(repository, disk)), manifest)
                for disk in manifest.disks
            ]
            return _drivers_of(image_volumes(sources))
    except (ImagerError, OSError) as error:
        return ImageDrivers(None, None, f"the image's filesystems are not readable: {error}")


def _drivers_of(volumes: list[ImageVolume]) -> ImageDrivers:
    """Of the root filesystem, with the one that is mounted at its /boot."""
    reasons = []
    for volume in volumes[:_MOST_VOLUMES]:
        if volume.filesystem.kind not in _MOUNTABLE - {"vfat", "exfat", "ntfs"}:
            if volume.reason:
                reasons.append(f"{volume.name}: {volume.reason}")
            continue
        try:
            with mounted(volume) as folder:
                root = _root_in(folder)
                if root is not None:
                    return _read_root(root, volume, volumes)
        except (ImagerError, OSError) as error:
            reasons.append(f"{volume.name}: {error}")
    return ImageDrivers(
        None, None, "; ".join(reasons) or "none of its filesystems is the root of a Linux system"
    )


def _root_in(folder: Path) -> Path | None:
    for name in _ROOT_FOLDERS:
        inside = folder / name
        if (inside / "etc").is_dir() and RootFolder(inside).names("lib/modules"):
            return inside
    return None


def _read_root(root: Path, own: ImageVolume, volumes: list[ImageVolume]) -> ImageDrivers:
    with ExitStack() as stack:
        boot = None
        apart = _boot_volume(root, own, volumes)
        if apart is not None:
            boot = stack.enter_context(mounted(apart))
        drivers = read_boot_drivers(root, boot)
        aliases = read_aliases(root, drivers.kernel) if drivers else None
    return ImageDrivers(drivers, aliases, None if drivers else "it has no kernel modules")


def _boot_volume(root: Path, own: ImageVolume, volumes: list[ImageVolume]) -> ImageVolume | None:
    """The volume that its fstab mounts at /boot, by UUID, label or name."""
    for line in (RootFolder(root).text("etc/fstab") or "").splitlines():
        words = line.split()
        if len(words) < 2 or words[0].startswith("#") or words[1] != "/boot":
            continue
        for volume in volumes:
            names = {
                f"UUID={volume.filesystem.uuid}".lower(),
                f"LABEL={volume.filesystem.label}".lower(),
                f"/dev/mapper/{volume.name.replace('-', '--').replace('/', '-')}".lower(),
                f"/dev/{volume.name}".lower(),
            }
            if volume is not own and words[0].replace('"', "").lower() in names:
                return volume
    return None


# --- containers ---------------------------------------------------------------------------------


def _opened(volume: ImageVolume, others: list[ImageVolume]) -> list[ImageVolume]:
    """The volume itself, or what it holds."""
    kind = volume.filesystem.kind
    if kind in _CONTAINERS:
        return _inside(volume, others)
    if kind in _MOUNTABLE:
        member = volume.filesystem.member_of
        if member is not None and member.members not in (None, 1):
            reason = f"a {kind} over {member.members} devices"
            return [ImageVolume(volume.name, volume.source, volume.filesystem, reason)]
        return [volume]
    reason = "it is encrypted" if kind == "luks" else f"{kind} can't be mounted"
    return [ImageVolume(volume.name, volume.source, volume.filesystem, reason)]


def _inside(container: ImageVolume, others: list[ImageVolume]) -> list[ImageVolume]:
    """What the container's own reader looks into: plain logical volumes, the data of a mirror."""
    found: list[ImageVolume] = []

    def look_inside(source: BlockSource) -> tuple[Filesystem, AllocationMap]:
        inner = identify(source)
        found.extend(_opened(ImageVolume(source.path, source, inner), []))
        return inner, all_used(source, "not asked for")

    kind = container.filesystem.kind
    companions = [
        Companion(other.filesystem, other.source)
        for other in others
        if other is not container and _set_of(other) == _set_of(container) is not None
    ]
    try:
        module = import_module(f"imager.allocation.{kind}")
        module.allocation_map(container.source, container.filesystem, companions, look_inside)
    except (ImagerError, OSError, ValueError, LookupError) as error:
        return [ImageVolume(container.name, container.source, container.filesystem, str(error))]
    if not found:
        reason = f"nothing in this {kind} is plain enough to be read"
        return [ImageVolume(container.name, container.source, container.filesystem, reason)]
    return found


def _set_of(volume: ImageVolume) -> str | None:
    member = volume.filesystem.member_of
    return f"{member.set_kind} {member.set_id}" if member else None
