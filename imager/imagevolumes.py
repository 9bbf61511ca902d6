"""The places of an image that may hold a filesystem, each as a source to read from.

Those are its disks, their partitions, and the logical volumes inside of LVM2 and the data of md
mirrors, also where they lie on several disks of the image. People name one behind a colon:
``IMAGE:2`` or ``IMAGE/sda:2`` a partition, ``IMAGE:vg/root`` a logical volume, ``IMAGE:`` the only
one that there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import NamedTuple

from imager.allocation import AllocationMap, Companion, Filesystem, identify
from imager.allocation.model import all_used
from imager.blocksource import BlockSource, PartSource
from imager.errors import ImagerError, ObjectMissing, UsageError
from imager.imagesource import CACHE_BYTES, ImageSource
from imager.manifest import Disk
from imager.repository import Repository

MOUNTABLE = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "exfat", "f2fs", "ntfs"})
_CONTAINERS = frozenset({"lvm2", "md"})


class OpenDisk(NamedTuple):
    """A disk of an image, and the source that reads it."""

    disk: Disk
    source: BlockSource


@dataclass(frozen=True)
class ImageVolume:
    """A partition, a logical volume or a whole disk of an image."""

    name: str
    """For people: "sda 2", "vg/root", "sda"."""
    source: BlockSource
    filesystem: Filesystem
    reason: str | None = None
    """Why no filesystem can be read from it."""
    disk: str | None = None
    """None of what lies inside of a container: it may be on several disks."""
    number: int | None = None
    """Of the partition."""

    @property
    def file_name(self) -> str:
        """As the kernel names its device: sda2, nvme0n1p2, and below /dev/mapper vg-root."""
        if self.disk is None:
            return "-".join(part.replace("-", "--") for part in self.name.split("/"))
        return self.disk if self.number is None else partition_name(self.disk, self.number)


def partition_name(disk: str, number: int) -> str:
    """As the kernel's: sda2, nvme0n1p2."""
    return f"{disk}{'p' * disk[-1:].isdigit()}{number}"


class Address(NamedTuple):
    """``IMAGE[/DISK]:WHERE[/PATH]``, not yet looked up."""

    image: str
    """IMAGE or IMAGE/DISK."""
    rest: str
    """What stands behind the colon."""


def parse_address(text: str) -> Address:
    """Raises UsageError without a colon."""
    image, colon, rest = text.partition(":")
    if not colon or not image:
        raise UsageError(
            f"{text}: name a place in an image, as IMAGE:PARTITION/PATH",
            hint="for instance web1@latest:2/etc/fstab, or web1@latest:vg/root/etc/fstab",
        )
    return Address(image, rest)


@contextmanager
def open_disks(
    open_repository: Callable[[], Repository],
    disks: Sequence[Disk],
    *,
    cache_bytes: int = CACHE_BYTES,
) -> Iterator[list[OpenDisk]]:
    """The sources of some disks; each has a repository of its own, so all threads may read.

    ``cache_bytes``: of all together.
    """
    each = cache_bytes // len(disks)
    with ExitStack() as stack:
        yield [
            OpenDisk(
                disk, stack.enter_context(ImageSource(open_repository(), disk, cache_bytes=each))
            )
            for disk in disks
        ]


def disk_volumes(disks: Sequence[OpenDisk]) -> list[ImageVolume]:
    """Partitions as they stand in the tables; of a disk without partitions the disk itself."""
    found: list[ImageVolume] = []
    for disk, source in disks:
        parts = [p for p in disk.table.partitions if p.kind != "extended" and p.end <= source.size]
        for part in sorted(parts, key=lambda item: item.offset):
            window = PartSource(source, part.offset, part.size)
            label = f"{disk.name} {part.number}"
            found.append(
                ImageVolume(label, window, identify(window), disk=disk.name, number=part.number)
            )
        if not parts:
            found.append(ImageVolume(disk.name, source, identify(source), disk=disk.name))
    return found


def image_volumes(disks: Sequence[OpenDisk]) -> list[ImageVolume]:
    """All that may hold a filesystem: containers are left out for what is in them."""
    found = disk_volumes(disks)
    opened = [inner for volume in found for inner in _opened(volume, found)]
    # What lies over several disks is found on each of them.
    return list({(volume.disk, volume.name): volume for volume in opened}.values())


def find_volume(volumes: Sequence[ImageVolume], rest: str) -> tuple[ImageVolume, str]:
    """The volume that ``PARTITION/PATH``, ``VG/LV/PATH`` or ``/PATH`` is about, and the path.

    Raises ObjectMissing or UsageError with the names that there are.
    """
    first, _, path = rest.partition("/")
    if first == "":
        found = [volume for volume in volumes if volume.reason is None]
    elif first.isdecimal():
        found = [volume for volume in volumes if volume.number == int(first)]
    else:
        found = [volume for volume in volumes if first == volume.file_name]
        if not found:
            second, _, path = path.partition("/")
            found = [volume for volume in volumes if f"{first}/{second}" == volume.name]
    if len(found) == 1:
        return found[0], f"/{path}"
    known = ", ".join(_spoken(volume) for volume in volumes) or "nothing"
    if not found:
        raise ObjectMissing(f"the image has no {first or 'filesystem'}", hint=f"it has: {known}")
    raise UsageError(f"{first or 'the image'} is more than one: name one", hint=f"it has: {known}")


def _spoken(volume: ImageVolume) -> str:
    name = volume.name if volume.disk is None else volume.file_name
    return f"{name} ({volume.filesystem.kind})"


# --- containers ---------------------------------------------------------------------------------


def _opened(volume: ImageVolume, others: list[ImageVolume]) -> list[ImageVolume]:
    """The volume itself, or what it holds."""
    kind = volume.filesystem.kind
    if kind in _CONTAINERS:
        return _inside(volume, others)
    if kind in MOUNTABLE:
        member = volume.filesystem.member_of
        if member is not None and member.members not in (None, 1):
            return [replace(volume, reason=f"a {kind} over {member.members} devices")]
        return [volume]
    known = {"luks": "it is encrypted", "unknown": "nothing that is known"}
    return [replace(volume, reason=known.get(kind, f"{kind} holds no files that can be read"))]


def _inside(container: ImageVolume, others: list[ImageVolume]) -> list[ImageVolume]:
    """What the container's own reader looks into: plain logical volumes, the data of a mirror."""
    found: list[ImageVolume] = []
    kind = container.filesystem.kind

    def look_inside(source: BlockSource) -> tuple[Filesystem, AllocationMap]:
        inner = identify(source)
        if kind == "lvm2":
            volume = ImageVolume(source.path, source, inner)
        else:  # a mirror: each member shows all that it holds
            volume = replace(container, source=source, filesystem=inner)
        found.extend(_opened(volume, []))
        return inner, all_used(source, "not asked for")

    companions = [
        Companion(other.filesystem, other.source)
        for other in others
        if other is not container and _set_of(other) == _set_of(container) is not None
    ]
    try:
        module = import_module(f"imager.allocation.{kind}")
        module.allocation_map(container.source, container.filesystem, companions, look_inside)
    except (ImagerError, OSError, ValueError, LookupError) as error:
        return [replace(container, reason=str(error))]
    if not found:
        return [replace(container, reason=f"nothing in this {kind} is plain enough to be read")]
    return found


def _set_of(volume: ImageVolume) -> str | None:
    member = volume.filesystem.member_of
    return f"{member.set_kind} {member.set_id}" if member else None
