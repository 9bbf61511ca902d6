"""Sources in memory, with whatever extents and bad sectors a test wants."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from imager.allocation import AllocationMap, Filesystem
from imager.capture import SourceDisk
from imager.diskidentity import DiskIdentity
from imager.errors import SourceError
from imager.extents import Extent, Extents
from imager.layout import DiskLayout, Volume
from imager.partitions import PartitionTable


class MemorySource:
    """A ``BlockSource`` over bytes. ``bad``: numbers of the sectors that fail with EIO."""

    path = "memory"
    is_device = False

    def __init__(
        self,
        content: bytes,
        *,
        sector: int = 512,
        data: Extents | None = None,
        bad: Iterable[int] = (),
    ) -> None:
        self.content = content
        self.size = len(content)
        self.logical_sector = self.physical_sector = sector
        self.bad = frozenset(bad)
        self.reads: list[Extent] = []
        self._data = Extents.whole(self.size) if data is None else data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.size:
            raise SourceError("read outside of the source")
        sectors = range(
            offset // self.logical_sector, -(-(offset + len(buffer)) // self.logical_sector)
        )
        if any(number in self.bad for number in sectors):
            buffer[:] = b"\xee" * len(buffer)  # a failed read may leave anything
            raise OSError(errno.EIO, "Input/output error")
        self.reads.append(Extent(offset, len(buffer)))
        buffer[:] = self.content[offset : offset + len(buffer)]

    def pread(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def data_extents(self) -> Extents:
        return self._data


def memory_disk(
    source: MemorySource, used: Extents | None = None, name: str = "disk"
) -> SourceDisk:
    """A disk without a partition table, of which a filesystem uses some bytes."""
    allocation = AllocationMap(Extents.whole(source.size) if used is None else used, "exact")
    volume = Volume(None, 0, source.size, Filesystem("unknown"), allocation)
    table = PartitionTable("none", source.logical_sector)
    return SourceDisk(name, source, DiskLayout(table, (volume,), source.size), DiskIdentity())
