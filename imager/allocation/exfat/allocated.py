"""The allocation map of exFAT.

Used are: the boot regions and the FAT, the clusters that the allocation bitmap marks, and
everything behind the last cluster. What the boot sector says of percents is not looked at.

There is no journal. When the filesystem was not unmounted, a directory entry may be on the disk
before the bitmap knows of its clusters: then the clusters that the directory tree leads to are
used as well.

Every doubt is an error here, and the caller takes it as "all of it".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from imager.allocation import bitmap
from imager.allocation.exfat.layout import BOOT_SECTOR_SIZE, FIRST_CLUSTER, Geometry
from imager.allocation.exfat.tree import BITMAP, UPCASE, Allocation, Tree
from imager.allocation.model import AllocationMap, Filesystem, require
from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

_PIECE_SIZE = 1 << 20  # bytes of the bitmap read at once
_MOST_EXTRA_RUNS = 1 << 20  # a bound on memory


def allocation_map(source: BlockSource, filesystem: Filesystem) -> AllocationMap:
    """Raises NotRecognized or UnsupportedError for any doubt, OSError for unreadable sectors."""
    geometry = Geometry.parse(source.pread(0, BOOT_SECTOR_SIZE))
    if geometry is None:
        raise NotRecognized("no exFAT boot sector")
    geometry.check(source)
    tree = Tree(source, geometry)
    root = tree.root_clusters()
    found = _system_files(tree, root)
    marks = list(tree.clusters(found[BITMAP]))
    used = Extents.from_sorted(_ascending(source, geometry, found[BITMAP], marks))
    for number in (*root, *marks, *tree.clusters(found[UPCASE])):
        require(_covers(geometry, used, number), "its bitmap calls the metadata free")
    if not geometry.is_dirty:
        return AllocationMap(used, "exact")
    used = used.union(Extents(_outside(tree.reachable(), geometry, used)))
    return AllocationMap(used, "union", f"{filesystem.kind}: it was not unmounted")


def _system_files(tree: Tree, root: list[int]) -> dict[int, Allocation]:
    """Bitmap and up-case table: the root directory must have one of each."""
    listed = [item for item in tree.listed(root) if item.kind in (BITMAP, UPCASE)]
    found = {item.kind: item for item in listed}
    require(len(listed) == len(found) == 2, "it has not one bitmap and one up-case table")
    require(found[BITMAP].flags == 0, "its bitmap belongs to a second FAT")
    return found


def _ascending(
    source: BlockSource, geometry: Geometry, allocation: Allocation, marks: list[int]
) -> Iterator[tuple[int, int]]:
    """Used ranges in bytes. ``marks``: the clusters of the bitmap."""
    size = -(-geometry.clusters // 8)
    require(allocation.length == size, "its bitmap has not the size that it should have")
    # The Linux driver takes that for granted.
    require(marks == list(range(marks[0], marks[0] + len(marks))), "its bitmap is fragmented")
    yield 0, geometry.heap_offset
    unit, start = geometry.cluster_size, geometry.cluster_offset(marks[0])
    for at in range(0, size, _PIECE_SIZE):
        raw = source.pread(start + at, min(_PIECE_SIZE, size - at))
        edges = bitmap.cut(bitmap.edges(raw), geometry.clusters - at * 8)
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            offset = geometry.cluster_offset(FIRST_CLUSTER + at * 8 + first)
            yield offset, (end - first) * unit
    end = geometry.cluster_offset(FIRST_CLUSTER + geometry.clusters)
    yield end, source.size - end


def _outside(
    runs: Iterable[tuple[int, int]], geometry: Geometry, used: Extents
) -> Iterator[tuple[int, int]]:
    extra = 0
    for first, count in runs:
        if not _covers(geometry, used, first, count):
            yield geometry.cluster_offset(first), count * geometry.cluster_size
            extra += 1
            require(extra <= _MOST_EXTRA_RUNS, "too many clusters are free in its bitmap")


def _covers(geometry: Geometry, used: Extents, first: int, count: int = 1) -> bool:
    return used.covers(geometry.cluster_offset(first), count * geometry.cluster_size)
