"""An image's disk as a source: read at any offset, each block proved by its digest.

Blocks come through a cache that all threads share, and several disks can. Whoever misses a block
reads it, and when the disk is read in order, the records that follow it in the same pack too;
others who want the same block wait for it. A block that is damaged fails for those who read it, and
only for them.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple, Self

import zstandard

from imager.blockmap import Run
from imager.errors import ImagerError, IntegrityError, SourceError
from imager.extents import Extents
from imager.format import FANOUT, Entry, Place, RecordKind, State, digest_of
from imager.manifest import Disk
from imager.pack import Pack, pack_name
from imager.pipeline import PerThread
from imager.repository import Repository

CACHE_BYTES = 64 << 20

# Long enough for a disk or a web server to stream, short enough to be thrown away for nothing.
_READ_AHEAD_BYTES = 2 << 20

# Several clients, or connections of one, read at so many places; the requests of one place may
# overtake each other by so many blocks.
_KEPT_PLACES = 16
_OVERTAKEN_BLOCKS = 8

# Stretches of the map that stay at hand, of FANOUT blocks each (256 MiB of the disk).
_KEPT_STRETCHES = 32


class Piece(NamedTuple):
    """``length`` bytes of a disk; no content is zeros. Not to be written to."""

    length: int
    content: memoryview | None


class BlockCache:
    """Contents of blocks by their digests, at most so many bytes: what was used last stays."""

    def __init__(self, capacity_bytes: int = CACHE_BYTES) -> None:
        self.capacity_bytes = capacity_bytes
        self.lock = threading.Lock()
        """Is held by the callers of all methods."""
        self._blocks: OrderedDict[bytes, Future[bytes]] = OrderedDict()
        self._sizes: dict[bytes, int] = {}
        self._passing: set[bytes] = set()
        self._bytes = 0

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._blocks

    def get(self, digest: bytes) -> Future[bytes] | None:
        """What is there, or on its way, and counts as used now."""
        found = self._blocks.get(digest)
        if found is not None:
            self._blocks.move_to_end(digest)
        return found

    def add(self, digest: bytes, size: int, *, passing: bool) -> Future[bytes]:
        """A block that the caller will read; ``passing``: likely to be wanted only once."""
        future: Future[bytes] = Future()
        self._blocks[digest] = future
        self._sizes[digest] = size
        if passing:
            self._passing.add(digest)
        self._bytes += size
        while self._bytes > self.capacity_bytes and len(self._blocks) > 1:
            self._forget(next(iter(self._blocks)))
        return future

    def used_up(self, digest: bytes) -> None:
        """One that was read to its end: if it came by read-ahead it is the next to go. So a stream
        goes through a few buffers, and leaves alone what others read again."""
        if digest in self._passing and digest in self._blocks:
            self._blocks.move_to_end(digest, last=False)

    def drop(self, digest: bytes, future: Future[bytes]) -> None:
        """One that could not be read."""
        if self._blocks.get(digest) is future:
            self._forget(digest)

    def _forget(self, digest: bytes) -> None:
        del self._blocks[digest]
        self._bytes -= self._sizes.pop(digest)
        self._passing.discard(digest)


class _Group(NamedTuple):
    """Neighbouring blocks whose records are neighbours in a pack too."""

    pack: Pack
    first_ordinal: int
    runs: list[Run]
    futures: list[Future[bytes]]


class ImageSource:
    """A disk of an image as a ``BlockSource``; any number of threads may read. A context manager.

    Zero and unused blocks read as zeros. Reading what could not be read when the image was made
    raises OSError (EIO), a damaged or missing block IntegrityError or ObjectMissing with its
    place, a range outside of the disk SourceError.
    """

    is_device = False

    def __init__(
        self,
        repository: Repository,
        disk: Disk,
        *,
        cache_bytes: int = CACHE_BYTES,
        cache: BlockCache | None = None,
    ) -> None:
        """``repository`` is this source's own from now on: reading it elsewhere meanwhile is not
        safe. ``cache``: one that is shared. Raises IntegrityError when the map does not match the
        manifest."""
        self.path = f"{repository.store.url}:{disk.name}"
        self.size = disk.size
        self.logical_sector = self.physical_sector = disk.logical_sector
        self._repository = repository
        self._disk = disk
        self._unreadable = disk.unreadable
        self._map = repository.block_map(disk)
        self._lock = threading.Lock()
        self._decoders = PerThread(zstandard.ZstdDecompressor)
        self._cache = cache or BlockCache(cache_bytes)
        capacity = self._cache.capacity_bytes // disk.block_size
        self._read_ahead = max(min(_READ_AHEAD_BYTES // disk.block_size, capacity // 2), 1)
        self._stretches: OrderedDict[int, list[Run]] = OrderedDict()
        # Where readers in order would go on, and how many blocks were read there at once.
        self._places: deque[tuple[int, int]] = deque(maxlen=_KEPT_PLACES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stretches.clear()

    def pread(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; errors as the class says."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer; errors as the class says."""
        at = 0
        for length, content in self.pieces(offset, len(buffer)):
            buffer[at : at + length] = bytes(length) if content is None else content
            at += length

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """The same without copies, block by block: an error comes at the byte where it is."""
        self._check(offset, length)
        bad = next(self._unreadable.within(offset, length), None)
        end = offset + length if bad is None else bad.offset
        unit = self._disk.block_size
        while offset < end:
            number, start = divmod(offset, unit)
            stop = min(start + end - offset, unit)
            yield _piece(self._block(number, to_end=stop == unit), start, stop)
            offset += stop - start
        if bad is not None:
            raise OSError(errno.EIO, f"byte {bad.offset} could not be read when it was imaged")

    def ready_pieces(self, offset: int, length: int) -> list[Piece] | None:
        """The same when it is all at hand, else None; raises SourceError only."""
        self._check(offset, length)
        if next(self._unreadable.within(offset, length), None) is not None:
            return None
        unit, end = self._disk.block_size, offset + length
        found = []
        with self._lock:
            while offset < end:
                number, start = divmod(offset, unit)
                if number // FANOUT not in self._stretches:
                    return None
                run = self._run(number)
                content = None
                if run.place is not None:
                    with self._cache.lock:
                        future = self._cache.get(run.digest)
                    if future is None or not future.done() or future.exception() is not None:
                        return None
                    content = future.result()
                stop = min(start + end - offset, unit)
                if run.place is not None and stop == unit:
                    with self._cache.lock:
                        self._cache.used_up(run.digest)
                found.append(_piece(content, start, stop))
                offset += stop - start
        return found

    def allocation(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Lengths in bytes, and whether a block is stored there (or could not be read)."""
        self._check(offset, length)
        unit, end = self._disk.block_size, offset + length
        while offset < end:
            first = offset // unit
            with self._lock:
                runs = self._stretch(first // FANOUT)
                stop = first
                is_data = _is_data(runs[first % FANOUT])
                for run in runs[first % FANOUT :]:
                    if _is_data(run) != is_data:
                        break
                    stop += 1
            until = min(stop * unit, end)
            yield until - offset, is_data
            offset = until

    def data_extents(self) -> Extents:
        """The blocks that are stored, in bytes."""
        unit = self._disk.block_size
        with self._lock:
            stored = Extents.from_sorted(
                (run.first * unit, run.blocks * unit) for run in self._map.runs() if _is_data(run)
            )
        return stored.clip(0, self.size)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise SourceError(
                f"read outside of {self.path}: {length} bytes at byte {offset}, "
                f"of a size of {self.size}"
            )

    # --- blocks ---

    def _block(self, number: int, *, to_end: bool) -> bytes | None:
        """A block's content, None for zeros. ``to_end``: its end is read too."""
        while True:
            with self._lock:
                run = self._run(number)
                if run.place is None:
                    if run.state == State.UNREADABLE:
                        raise OSError(errno.EIO, f"block {number} could not be read")
                    return None
                with self._cache.lock:
                    found = self._cache.get(run.digest)
                    if found is not None and to_end:
                        self._cache.used_up(run.digest)
                group = self._claim(run, run.place) if found is None else None
            if group is not None:
                self._load(group)
                return group.futures[0].result()
            if found is not None and found.exception() is None:  # it waits for another thread
                return found.result()
            # That one failed, for itself: it may have read the same block from another place.

    def _claim(self, wanted: Run, place: Place) -> _Group | None:
        """Take it upon this thread to load a block, and those that follow when it's in order."""
        pack = self._repository.pack(place.pack)
        most = self._blocks_at_once(wanted.first)
        runs = [wanted, *self._following(wanted.first, place, most - 1)]
        futures: list[Future[bytes]] = []
        with self._cache.lock:
            for run in runs:
                if run.digest in self._cache:  # another disk's source was quicker
                    break
                future = self._cache.add(run.digest, self._disk.block_size, passing=most > 1)
                futures.append(future)
        if not futures:
            return None
        self._places.append((wanted.first + len(futures), most))
        return _Group(pack, place.ordinal, runs[: len(futures)], futures)

    def _following(self, number: int, place: Place, most: int) -> Iterator[Run]:
        """The blocks behind one whose records follow its own."""
        for n in range(1, min(most + 1, self._disk.blocks - number)):
            run = self._run(number + n)
            if run.place != (place.pack, place.ordinal + n):
                return
            yield run

    def _blocks_at_once(self, number: int) -> int:
        """More and more where a reader goes on in order."""
        for end, blocks in self._places:
            if 0 <= number - end < _OVERTAKEN_BLOCKS:
                return min(4 * blocks, self._read_ahead)
        return 1

    def _load(self, group: _Group) -> None:
        """Give each future of the group its content or its error."""
        pack, first = group.pack, group.first_ordinal
        count = min(len(group.runs), len(pack.entries) - first)
        raw: bytes | None = None
        if count > 1:
            try:
                raw = pack.read(first, count)
            except (ImagerError, OSError):
                raw = None  # each by itself then: some may be there
        for n, (run, future) in enumerate(zip(group.runs, group.futures, strict=True)):
            try:
                future.set_result(self._decoded(pack, first, n, run, raw))
            except BaseException as error:
                with self._cache.lock:
                    self._cache.drop(run.digest, future)
                future.set_exception(error)

    def _decoded(self, pack: Pack, first: int, n: int, run: Run, raw: bytes | None) -> bytes:
        ordinal = first + n
        try:
            if ordinal >= len(pack.entries):
                raise IntegrityError("there is no such record")
            entry = pack.entries[ordinal]
            if entry.kind != RecordKind.BLOCK or entry.digest != run.digest:
                raise IntegrityError("another block")
            length = min(self._disk.block_size, self.size - run.first * self._disk.block_size)
            if entry.content_length != length:
                raise IntegrityError(f"has {entry.content_length} bytes instead of {length}")
            if raw is None:
                raw, first = pack.read(ordinal, 1), ordinal
            return _decode(self._decoders.get(), entry, pack.frame(raw, first, ordinal))
        except IntegrityError as error:
            offset = run.first * self._disk.block_size
            where = f"{self._repository.store.url}/{pack_name(pack.id)}, record {ordinal}"
            raise IntegrityError(
                f"{where} (block at byte {offset}, {self._disk.where(offset)}): {error.message}"
            ) from None

    # --- the map ---

    def _run(self, number: int) -> Run:
        """What the map says of one block."""
        return self._stretch(number // FANOUT)[number % FANOUT]

    def _stretch(self, index: int) -> list[Run]:
        """A run for each of the blocks below a page of the map."""
        stretch = self._stretches.get(index)
        if stretch is None:
            first = index * FANOUT
            stretch = [
                run._replace(first=run.first + at, blocks=1)
                for run in self._map.runs(first, first + FANOUT)
                for at in range(run.blocks)
            ]
            self._stretches[index] = stretch
            if len(self._stretches) > _KEPT_STRETCHES:
                self._stretches.popitem(last=False)
        else:
            self._stretches.move_to_end(index)
        return stretch


def _decode(decompressor: zstandard.ZstdDecompressor, entry: Entry, frame: memoryview) -> bytes:
    """A block's content without a copy. Its digest vouches for it, so the frame's own checksum is
    not looked at. Raises IntegrityError."""
    try:
        if zstandard.frame_content_size(frame) != entry.content_length:
            raise IntegrityError("decompresses to another length")
        content = decompressor.decompress(frame, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise IntegrityError(f"cannot be decompressed: {error}") from None
    if len(content) != entry.content_length or digest_of(content) != entry.digest:
        raise IntegrityError("the content does not match its digest")
    return content


def _is_data(run: Run) -> bool:
    return run.place is not None or run.state == State.UNREADABLE


def _piece(content: bytes | None, start: int, stop: int) -> Piece:
    return Piece(stop - start, None if content is None else memoryview(content)[start:stop])
