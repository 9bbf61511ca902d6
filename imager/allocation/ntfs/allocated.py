"""The allocation map of NTFS.

Used are the clusters that $Bitmap marks, those that any MFT record in use lists (some writers
leave clusters of files out of $Bitmap), and everything behind the last cluster, with the copy
of the boot sector. The sizes of files don't matter: $Bitmap and runs count whole clusters.

A log that waits to be replayed and a hibernated Windows (its fast start too) know of clusters
that the disk doesn't show as used yet: that is a doubt. Every doubt is an error here, and the
caller takes it as "all of it".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imager.allocation import bitmap
from imager.allocation.model import AllocationMap, Filesystem, require
from imager.allocation.ntfs.boot import BOOT_SECTOR_SIZE, BootSector
from imager.allocation.ntfs.identity import DIRTY
from imager.allocation.ntfs.logfile import check_clean
from imager.allocation.ntfs.record import (
    DATA,
    FILE_NAME,
    VOLUME_INFORMATION,
    Attribute,
    attributes,
    runs,
)
from imager.allocation.ntfs.stream import Stream
from imager.allocation.ntfs.volume import CLUSTER_BITMAP, LOG_FILE, VOLUME, Volume
from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

_VERSIONS = ((1, 2), (3, 0), (3, 1))
_CHKDSK_UNDERWAY = 0x4000

_PIECE_SIZE = 1 << 20  # bytes of $Bitmap read at once
_MOST_EXTRA_RUNS = 1 << 20  # a bound on memory

_NAME_OFFSET = 66  # bytes; in a file name attribute
_HIBERNATION_FILE = "hiberfil.sys".encode("utf-16-le")
_HIBERNATED = b"hibr"  # in either case; ntfs-3g's volume.c (ntfs_volume_check_hiberfile)


def allocation_map(source: BlockSource, filesystem: Filesystem) -> AllocationMap:
    """Raises NotRecognized for any doubt, OSError for unreadable sectors."""
    boot = BootSector.parse(source.pread(0, BOOT_SECTOR_SIZE))
    if boot is None:
        raise NotRecognized("no NTFS boot sector")
    boot.check(source.size)
    volume = Volume(source, boot)
    is_dirty = _is_dirty(volume)
    check_clean(volume.stream(LOG_FILE))
    used = Extents.from_sorted(_ascending(boot, volume.stream(CLUSTER_BITMAP), source.size))
    extra = _outside(_Files(source, boot, volume).used_ranges(), used)
    doubts = [
        *(["it is marked dirty"] if is_dirty else []),
        *(["clusters of files are free in its $Bitmap"] if extra else []),
    ]
    if doubts:
        used = used.union(Extents(extra))
        return AllocationMap(used, "union", f"{filesystem.kind}: {', '.join(doubts)}")
    return AllocationMap(used, "exact")


def _is_dirty(volume: Volume) -> bool:
    """Raises NotRecognized for a version that is not known, or a repair under way."""
    for attribute in volume.record(VOLUME):
        if attribute.kind == VOLUME_INFORMATION and attribute.value:
            require(len(attribute.value) >= 12, "$Volume is damaged")
            major, minor, flags = struct.unpack_from("<BBH", attribute.value, 8)
            require((major, minor) in _VERSIONS, f"unknown version {major}.{minor}")
            require(not flags & _CHKDSK_UNDERWAY, "chkdsk was not finished")
            return bool(flags & DIRTY)
    raise NotRecognized("$Volume says no version")


def _ascending(boot: BootSector, marks: Stream, source_size: int) -> Iterator[tuple[int, int]]:
    """What $Bitmap marks, and all that lies behind the last cluster, in bytes."""
    size = -(-boot.clusters // 8)
    require(size <= marks.initialized_size, "$Bitmap is too short")
    unit = boot.cluster_size
    for start in range(0, size, _PIECE_SIZE):
        raw = marks.read(start, min(_PIECE_SIZE, size - start))
        edges = bitmap.cut(bitmap.edges(raw), boot.clusters - start * 8)
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            yield (start * 8 + first) * unit, (end - first) * unit
    end = boot.clusters * unit
    yield end, source_size - end


def _outside(ranges: Iterator[tuple[int, int]], used: Extents) -> list[tuple[int, int]]:
    extra: list[tuple[int, int]] = []
    for offset, length in ranges:
        if not used.covers(offset, length):
            extra.append((offset, length))
            require(len(extra) <= _MOST_EXTRA_RUNS, "too many clusters are free in $Bitmap")
    return extra


class _Files:
    """All that MFT records say of clusters."""

    def __init__(self, source: BlockSource, boot: BootSector, volume: Volume) -> None:
        self._source = source
        self._boot = boot
        self._volume = volume

    def used_ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of every run. Raises NotRecognized for a damaged record, and
        for a hibernated Windows."""
        unit = self._boot.cluster_size
        for record in self._volume.records_in_use():
            found = list(attributes(record))
            if any(map(_names_hibernation_file, found)):
                self._check_awake(found)
            for attribute in found:
                if attribute.value is not None:
                    continue
                for place, count in runs(attribute, self._boot.clusters):
                    if place is not None:
                        yield place * unit, count * unit

    def _check_awake(self, file: list[Attribute]) -> None:
        start = b"".join(map(self._start_of, file))
        require(bool(start), "hiberfil.sys can't be read")
        require(
            start[: len(_HIBERNATED)].lower() != _HIBERNATED,
            "it holds a hibernated Windows (or one shut down for a fast start)",
        )

    def _start_of(self, attribute: Attribute) -> bytes:
        """The first bytes of a file's main data, else nothing."""
        if attribute.kind != DATA or attribute.is_named or attribute.lowest_vcn:
            return b""
        if attribute.value is not None:
            return attribute.value
        first = next(iter(runs(attribute, self._boot.clusters)), None)
        if first is None or first.cluster is None:
            return bytes(len(_HIBERNATED))
        return self._source.pread(first.cluster * self._boot.cluster_size, len(_HIBERNATED))


def _names_hibernation_file(attribute: Attribute) -> bool:
    if attribute.kind != FILE_NAME or attribute.value is None:
        return False
    return attribute.value[_NAME_OFFSET:].lower() == _HIBERNATION_FILE
