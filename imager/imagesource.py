"""An image's disk as a source: read at any offset, each block proved by its digest.

Blocks come through one cache that all threads share. Whoever misses a block reads it, and when
the disk is read in order, the records that follow it in the same pack too; others who want the
same block wait for it. A block that is damaged fails for those who read it, and only for them.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import NamedTuple, Self

from imager.blockmap import Run
from imager.errors import ImagerError, IntegrityError, SourceError
from imager.extents import Extents
from imager.format import FANOUT, RecordKind, State
from imager.manifest import Disk
from imager.pack import Decoder, Pack, pack_name
from imager.pipeline import PerThread
from imager.repository import Repository

CACHE_BYTES = 64 << 20

# Long enough for a disk or a web server to stream, short enough to be thrown away for nothing.
_READ_AHEAD_BYTES = 4 << 20

# Stretches of the map that stay at hand, of FANOUT blocks each (256 MiB of the disk).
_KEPT_STRETCHES = 32


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
        self, repository: Repository, disk: Disk, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """``repository`` is this source's own from now on: reading it elsewhere meanwhile is not
        safe. Raises IntegrityError when the map does not match the manifest."""
        self.path = f"{repository.store.url}:{disk.name}"
        self.size = disk.size
        self.logical_sector = self.physical_sector = disk.logical_sector
        self._repository = repository
        self._disk = disk
        self._unreadable = disk.unreadable
        self._map = repository.block_map(disk)
        self._lock = threading.Lock()
        self._decoders = PerThread(Decoder)
        self._capacity = max(cache_bytes // disk.block_size, 1)
        self._read_ahead = max(min(_READ_AHEAD_BYTES // disk.block_size, self._capacity // 2), 1)
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._stretches: OrderedDict[int, list[Run]] = OrderedDict()
        self._next = 0  # the block that a reader in order would want

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks.clear()
            self._stretches.clear()

    def pread(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; errors as the class says."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer; errors as the class says."""
        self._check(offset, len(buffer))
        at = 0
        while at < len(buffer):
            number, start = divmod(offset + at, self._disk.block_size)
            length = min(self._disk.block_size - start, len(buffer) - at)
            content = self._block(number)
            buffer[at : at + length] = (
                bytes(length) if content is None else memoryview(content)[start : start + length]
            )
            at += length

    def data_extents(self) -> Extents:
        """The blocks that are stored, in bytes."""
        unit = self._disk.block_size
        with self._lock:
            stored = Extents.from_sorted(
                (run.first * unit, run.blocks * unit)
                for run in self._map.runs()
                if run.place is not None or run.state == State.UNREADABLE
            )
        return stored.clip(0, self.size)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise SourceError(
                f"read outside of {self.path}: {length} bytes at byte {offset}, "
                f"of a size of {self.size}"
            )
        bad = next(self._unreadable.within(offset, length), None)
        if bad is not None:
            raise OSError(errno.EIO, f"byte {bad.offset} could not be read when it was imaged")

    # --- blocks ---

    def _block(self, number: int) -> bytes | None:
        """A block's content, None for zeros."""
        with self._lock:
            in_order, self._next = number == self._next, number + 1
            found = self._blocks.get(number)
            group = None
            if found is not None:
                self._blocks.move_to_end(number)
            else:
                run = self._run(number)
                if run.place is None:
                    if run.state == State.UNREADABLE:
                        raise OSError(errno.EIO, f"block {number} could not be read")
                    return None
                group = self._claim(number, in_order)
                found = group.futures[0]
        if group is not None:
            self._load(group)
        return found.result()

    def _claim(self, number: int, in_order: bool) -> _Group:
        """Take it upon this thread to load a block, and those that follow when it's in order."""
        runs = [self._run(number)]
        place = runs[0].place
        assert place is not None
        pack = self._repository.pack(place.pack)
        while in_order and len(runs) < self._read_ahead:
            after = number + len(runs)
            if after >= self._disk.blocks or after in self._blocks:
                break
            run = self._run(after)
            if run.place != (place.pack, place.ordinal + len(runs)):
                break
            runs.append(run)
        futures: list[Future[bytes]] = []
        for run in runs:
            future: Future[bytes] = Future()
            self._blocks[run.first] = future
            futures.append(future)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return _Group(pack, place.ordinal, runs, futures)

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
                with self._lock:
                    if self._blocks.get(run.first) is future:
                        del self._blocks[run.first]
                future.set_exception(error)

    def _decoded(self, pack: Pack, first: int, n: int, run: Run, raw: bytes | None) -> bytes:
        ordinal = first + n
        where = (
            f"{self._repository.store.url}/{pack_name(pack.id)}, record {ordinal} (block at byte "
            f"{run.first * self._disk.block_size}, {self._where(run)})"
        )
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
            return self._decoders.get().decode(entry, pack.frame(raw, first, ordinal))
        except IntegrityError as error:
            raise IntegrityError(f"{where}: {error.message}") from None

    def _where(self, run: Run) -> str:
        return self._disk.where(run.first * self._disk.block_size)

    # --- the map ---

    def _run(self, number: int) -> Run:
        """What the map says of one block."""
        index, n = divmod(number, FANOUT)
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
        return stretch[n]
