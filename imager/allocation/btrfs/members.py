"""The devices of a Btrfs that are at hand, read by device number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from imager.allocation.btrfs.chunks import ChunkMap, Place
from imager.allocation.btrfs.superblock import Superblock, read_superblock
from imager.allocation.model import Companion, require
from imager.blocksource import BlockSource
from imager.errors import ImagerError, NotRecognized

# Nodes lie in clusters; reading their neighbourhood saves most of the seeks.
_WINDOW = 256 << 10  # bytes
_WINDOWS = 64


class MemberMissing(NotRecognized):
    """What is needed lies on a device that is not at hand."""


class Members:
    """Reads logical ranges through whichever devices there are."""

    def __init__(
        self, source: BlockSource, superblock: Superblock, companions: Iterable[Companion]
    ) -> None:
        """Raises NotRecognized when a companion is not of this filesystem in this state."""
        self._devices = {superblock.device.id: (superblock.device.uuid, _Windows(source))}
        for companion in companions:
            other = _superblock_of(companion.source)
            number = other.device.id
            require(number not in self._devices, f"two devices say that they are number {number}")
            require(_state(other) == _state(superblock), f"device {number} is of another time")
            self._devices[number] = (other.device.uuid, _Windows(companion.source))

    def copies(self, chunks: ChunkMap, address: int, length: int) -> Iterator[bytes]:
        """Each copy of a logical range that can be read; unreadable ones are left out.

        Raises NotRecognized outside of all chunks, and MemberMissing at the end if a copy lies
        on a missing device.
        """
        missing: set[int] = set()
        for pieces in chunks.chunk_of(address, length).copies_of(address, length):
            try:
                yield b"".join(self._read(place, size) for place, size in pieces)
            except MemberMissing:
                missing |= {place.device for place, _ in pieces} - self._devices.keys()
            except OSError:
                continue
        if missing:
            numbers = ", ".join(map(str, sorted(missing)))
            raise MemberMissing(f"device {numbers} of the filesystem is not here")

    def _read(self, place: Place, length: int) -> bytes:
        if place.device not in self._devices:
            raise MemberMissing(f"device {place.device} is not here")
        uuid, windows = self._devices[place.device]
        require(uuid == place.uuid, f"device {place.device} is another one")
        return windows.read(place.offset, length)


def _superblock_of(companion: BlockSource) -> Superblock:
    try:
        superblock = read_superblock(companion)
        superblock.check(companion.size)
    except ImagerError as doubt:
        raise NotRecognized(f"{companion.path}: {doubt}") from None
    return superblock


def _state(superblock: Superblock) -> tuple[object, ...]:
    """What all devices of a filesystem have the same."""
    return (
        superblock.metadata_fsid,
        superblock.generation,
        superblock.root,
        superblock.chunk_root,
        superblock.log_root,
        superblock.devices,
        superblock.node_size,
        superblock.sector_size,
        superblock.digest_kind,
    )


class _Windows:
    """Recently read pieces of a source."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        """Raises NotRecognized outside of the source, OSError for unreadable sectors."""
        require(offset + length <= self._source.size, "a stripe ends behind its device")
        start = offset // _WINDOW * _WINDOW
        if offset + length > start + _WINDOW:
            return self._source.pread(offset, length)
        try:
            return self._window(start)[offset - start : offset - start + length]
        except OSError:  # a bad sector, perhaps only nearby
            return self._source.pread(offset, length)

    def _window(self, start: int) -> bytes:
        if start in self._kept:
            self._kept.move_to_end(start)
            return self._kept[start]
        window = self._source.pread(start, min(_WINDOW, self._source.size - start))
        self._kept[start] = window
        if len(self._kept) > _WINDOWS:
            self._kept.popitem(last=False)
        return window
