"""An image's filesystems, mounted read-only by the kernel.

A view (``coverage.view``) gives each volume out as a file; what the kernel writes to it, the replay
of a journal, stays in memory. Needs root, FUSE, loop devices, and a kernel that knows the
filesystem.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from imager.bootdrivers import Aliases, BootDrivers, read_aliases, read_boot_drivers
from imager.coverage.files import mounted as mounted_view
from imager.coverage.view import open_view
from imager.errors import ImagerError
from imager.extents import Extents
from imager.imagesource import ImageSource
from imager.imagevolumes import MOUNTABLE, ImageVolume, OpenDisk, image_volumes
from imager.manifest import Manifest
from imager.repository import Repository
from imager.rootfolder import RootFolder

# Debian's and Arch's subvolume, SUSE's, Fedora's: where a root lies in a Btrfs.
_ROOT_FOLDERS = ("", "@", "@/.snapshots/1/snapshot", "root", "@rootfs")

# Looking for a root takes a mount each.
_MOST_VOLUMES = 32


class ImageDrivers(NamedTuple):
    """What an image's own root filesystem says; ``reason`` why it says nothing."""

    drivers: BootDrivers | None
    aliases: Aliases | None
    reason: str | None


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
            disks = [
                OpenDisk(disk, stack.enter_context(ImageSource(repository, disk)))
                for disk in manifest.disks
            ]
            return _drivers_of(image_volumes(disks))
    except (ImagerError, OSError) as error:
        return ImageDrivers(None, None, f"the image's filesystems are not readable: {error}")


def _drivers_of(volumes: list[ImageVolume]) -> ImageDrivers:
    """Of the root filesystem, with the one that is mounted at its /boot."""
    reasons = []
    for volume in volumes[:_MOST_VOLUMES]:
        if volume.filesystem.kind not in MOUNTABLE - {"vfat", "exfat", "ntfs"}:
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
