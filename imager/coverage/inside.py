"""What containers hold: the filesystems in logical volumes and mirrors, with and without the bytes
that the container's map calls unused."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from imager.allocation import AllocationMap, Companion, Filesystem, allocation_map, identify
from imager.allocation.model import LookInside, require
from imager.blocksource import BlockSource
from imager.extents import Extents


@dataclass(frozen=True)
class Holding:
    """A device with its map, to be proved."""

    source: BlockSource
    filesystem: Filesystem
    allocation: AllocationMap
    bare: BlockSource
    """The source, without what the maps of the containers around it call unused."""

    @property
    def set_id(self) -> str | None:
        """Shared by all devices of one container."""
        member = self.filesystem.member_of
        return f"{member.set_kind} {member.set_id}" if member else None


def is_container(filesystem: Filesystem) -> bool:
    return filesystem.kind in ("lvm2", "md")


def contents(container: Holding, others: Sequence[Holding]) -> list[Holding]:
    """What could be looked into, of the part of a container that lies on this device.

    ``others``: everything that is captured together with it. Raises ImagerError or OSError when
    the container cannot be opened without its unused bytes.
    """
    members = [other for other in others if other is not container and _are_one(container, other)]
    found = _open(container, members)
    bare = _open(container, members, found)
    require(len(bare) == len(found), "it shows less without its unused bytes")
    return [
        Holding(source, filesystem, allocation, without)
        for (source, filesystem, allocation), (without, *_) in zip(found, bare, strict=True)
    ]


_Found = list[tuple[BlockSource, Filesystem, AllocationMap]]


class _Kind(Protocol):
    def __call__(
        self,
        source: BlockSource,
        filesystem: Filesystem,
        companions: Sequence[Companion],
        look_inside: LookInside,
    ) -> AllocationMap: ...


def _are_one(one: Holding, other: Holding) -> bool:
    return one.set_id is not None and one.set_id == other.set_id


def _open(container: Holding, members: Sequence[Holding], known: _Found | None = None) -> _Found:
    """What the container's reader looks into; a second time (``known``) without unused bytes."""
    found: _Found = []

    def look_inside(source: BlockSource) -> tuple[Filesystem, AllocationMap]:
        if known is None:
            inner = identify(source), allocation_map(source)
        else:
            require(len(found) < len(known), "it shows more without its unused bytes")
            inner = known[len(found)][1:]
        found.append((source, *inner))
        return inner

    def end_of(holding: Holding) -> BlockSource:
        return holding.source if known is None else Bare(holding.bare, holding.allocation.used)

    companions = [Companion(member.filesystem, end_of(member)) for member in members]
    _reader(container.filesystem.kind)(
        end_of(container), container.filesystem, companions, look_inside
    )
    return found


def _reader(kind: str) -> _Kind:
    if kind == "lvm2":
        from imager.allocation.lvm2 import allocation_map as read_group

        return read_group
    from imager.allocation.md import allocation_map as read_array

    return read_array


class Bare:
    """A source without its unused bytes: reading one raises OSError (EIO)."""

    def __init__(self, source: BlockSource, used: Extents) -> None:
        self._source = source
        self._used = used
        self.path = source.path
        self.size = source.size
        self.logical_sector = source.logical_sector
        self.physical_sector = source.physical_sector
        self.is_device = source.is_device

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._check(offset, len(buffer))
        self._source.read_into(offset, buffer)

    def pread(self, offset: int, length: int) -> bytes:
        self._check(offset, length)
        return self._source.pread(offset, length)

    def data_extents(self) -> Extents:
        return self._source.data_extents()

    def _check(self, offset: int, length: int) -> None:
        if not self._used.covers(offset, length):
            raise OSError(errno.EIO, f"an unused byte of {self.path} was read")
