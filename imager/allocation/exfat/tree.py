"""The directory tree of exFAT: which clusters its entries lead to."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from imager.allocation.exfat.chain import Chains
from imager.allocation.exfat.layout import ENTRY_SIZE, FIRST_CLUSTER, Geometry
from imager.allocation.model import require
from imager.blocksource import BlockSource

BITMAP, UPCASE = 0x81, 0x82
_LABEL, _FILE, _GUID, _PADDING = 0x83, 0x85, 0xA0, 0xA1
_PRIMARIES = (BITMAP, UPCASE, _LABEL, _FILE, _GUID, _PADDING)
_STREAM = 0xC0
_IN_USE, _SECONDARY = 0x80, 0x40
_END = 0

_DIRECTORY = 0x10  # attribute of a file
_ALLOCATED, _NO_CHAIN = 1, 2  # flags of secondary entries

_MOST_DIRECTORY_BYTES = 256 << 20  # by the specification


class Allocation(NamedTuple):
    """Where an entry's data lies."""

    kind: int
    flags: int
    first_cluster: int
    length: int
    """Bytes."""
    is_directory: bool

    @property
    def is_contiguous(self) -> bool:
        """Whether it does without a chain in the FAT."""
        return bool(self.kind & _SECONDARY and self.flags & _NO_CHAIN)


class Tree:
    """All methods raise NotRecognized for damage, OSError for unreadable sectors."""

    def __init__(self, source: BlockSource, geometry: Geometry) -> None:
        self._source = source
        self._geometry = geometry
        self._chains = Chains(source, geometry)

    def root_clusters(self) -> list[int]:
        most = self._geometry.clusters_for(_MOST_DIRECTORY_BYTES)
        return list(self._chains.follow(self._geometry.root_cluster, most))

    def listed(self, clusters: Iterable[int]) -> Iterator[Allocation]:
        """What the entries of a directory have allocated, up to its end."""
        is_directory = False
        for cluster in clusters:
            offset = self._geometry.cluster_offset(cluster)
            entries = self._source.pread(offset, self._geometry.cluster_size)
            for at in range(0, len(entries), ENTRY_SIZE):
                kind, flags = entries[at], entries[at + 1]
                if kind == _END:
                    return
                if not kind & _IN_USE:
                    continue
                first, length = struct.unpack_from("<IQ", entries, at + 20)
                if kind & _SECONDARY:
                    if flags & _ALLOCATED and first:
                        is_sub = is_directory and kind == _STREAM
                        yield Allocation(kind, flags, first, length, is_sub)
                    continue
                require(kind in _PRIMARIES, f"unknown directory entry {kind:#x}")
                is_directory = kind == _FILE and bool(entries[at + 4] & _DIRECTORY)
                if kind in (BITMAP, UPCASE):
                    yield Allocation(kind, flags & 1 if kind == BITMAP else 0, first, length, False)

    def runs(self, allocation: Allocation) -> Iterator[tuple[int, int]]:
        """(first cluster, count), together exactly as many as the length needs."""
        geometry = self._geometry
        first, count = allocation.first_cluster, geometry.clusters_for(allocation.length)
        require(
            geometry.is_cluster(first) and 0 < count <= geometry.clusters,
            "an entry's clusters lie outside of the filesystem",
        )
        if allocation.is_contiguous:
            require(
                first + count <= FIRST_CLUSTER + geometry.clusters,
                "an entry's clusters lie outside of the filesystem",
            )
            yield first, count
            return
        found = 0
        for number in self._chains.follow(first, count):
            found += 1
            yield number, 1
        require(found == count, "a chain of clusters is shorter than its file")

    def clusters(self, allocation: Allocation) -> Iterator[int]:
        for first, count in self.runs(allocation):
            yield from range(first, first + count)

    def reachable(self) -> Iterator[tuple[int, int]]:
        """Every (first cluster, count) that the tree leads to. Since no cluster has two owners,
        there can't be more than the filesystem has: that bounds the walk."""
        root = self.root_clusters()
        yield from ((number, 1) for number in root)
        waiting: list[Iterable[int]] = [root]
        total = len(root)
        while waiting:
            for allocation in self.listed(waiting.pop()):
                total += self._geometry.clusters_for(allocation.length)
                require(total <= self._geometry.clusters, "clusters belong to several files")
                yield from self.runs(allocation)
                if allocation.is_directory:
                    waiting.append(self.clusters(allocation))
