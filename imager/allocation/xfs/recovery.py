"""What a recovery of the log would do to the blocks that tell free from used, done in memory.

Only copies of buffers (XFS_LI_BUF) change free space by themselves. All that a recovery reads
besides is noted as *touched*, and counts as used.

Source: Linux fs/xfs/libxfs/xfs_log_format.h, fs/xfs/xfs_log_recover.c, xfs_buf_item_recover.c,
xfs_inode_item_recover.c, xfs_icreate_item.c, xfs_dquot_item_recover.c. Items are in the byte
order of the machine that wrote them; only little-endian ones get here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from imager.allocation.model import require
from imager.allocation.xfs.layout import BASIC_BLOCK, BY_BLOCK, BY_SIZE, Superblock
from imager.allocation.xfs.log import Operation
from imager.errors import UnsupportedError

_CLIENTS = (0x69, 0xAA)
_START, _COMMIT, _CONTINUES, _CONTINUED, _END, _UNMOUNT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20

_TRANSACTION_MAGIC = b"NART"
_TRANSACTION_HEADER = 16  # bytes

_INODE, _BUFFER, _QUOTA, _INODES_CREATED = 0x123B, 0x123C, 0x123D, 0x123F
# Intents to free, to map, to count references or owners, to change attributes, to exchange
# ranges, each with its "done"; and quotas turned off. See ``allocated`` for why they don't count.
_HARMLESS = frozenset({0x1236, 0x1237, 0x123E, *range(0x1240, 0x124A)})

_CHUNK = 128  # bytes for each bit of a buffer item's map
_CANCELLED = 0x2
_TYPE_SHIFT = 11
# Kinds of buffers that tell of free space: AGF, AGFL, superblock, some btrees; 0: old kernels
_TELLING = frozenset({0, 4, 5, 6, 18})
_TREE = 4

# Bounds memory: what is held of transactions and of copies, and how many buffers are touched.
_MOST_HELD = 96 << 20  # bytes
_OVERHEAD = 256  # bytes that Python adds to anything held
_MOST_TOUCHED = 1 << 19


class Place(NamedTuple):
    """A buffer, in basic blocks."""

    block: int
    length: int


@dataclass
class Overlay:
    """The outcome: newer content of buffers that tell of free space, and what else is read."""

    chunks: dict[Place, dict[int, bytes]] = field(default_factory=dict)
    """By number of 128 bytes within the buffer."""
    touched: set[Place] = field(default_factory=set)

    def patch(self, place: Place, data: bytes) -> bytes:
        """The buffer as a recovery would leave it, but for its checksum."""
        chunks = self.chunks.get(place)
        if not chunks:
            return data
        patched = bytearray(data)
        for number, chunk in chunks.items():
            patched[number * _CHUNK : (number + 1) * _CHUNK] = chunk
        return bytes(patched)


@dataclass
class _Item:
    """A change: its first region says what and of how many regions it is."""

    regions: list[bytearray] = field(default_factory=list)
    expected: int = 0
    seen: int = 0

    @property
    def is_complete(self) -> bool:
        return self.seen == self.expected != 0

    @property
    def kind(self) -> int:
        return _u16(self.regions[0], 0)

    @property
    def tells_of_free_space(self) -> bool:
        """Whether its content matters; asked once the first region is whole."""
        return (
            self.kind == _BUFFER
            and len(self.regions[0]) >= 6
            and _u16(self.regions[0], 4) >> _TYPE_SHIFT in _TELLING
        )


@dataclass
class _Transaction:
    header: bytearray = field(default_factory=bytearray)
    items: list[_Item] = field(default_factory=list)

    @property
    def held(self) -> int:
        """Bytes of memory, roughly."""
        regions = (region for item in self.items for region in item.regions)
        return 2 * _OVERHEAD + sum(_OVERHEAD + len(region) for region in regions)


def recover(operations: Iterable[Operation], superblock: Superblock) -> Overlay:
    """Raises NotRecognized for damage, UnsupportedError for what is unknown or too much."""
    recovery = _Recovery(superblock)
    for operation in operations:
        recovery.feed(operation)
    return recovery.overlay


class _Recovery:
    """Collects transactions from their pieces; those that commit count, in that order."""

    def __init__(self, superblock: Superblock) -> None:
        self.overlay = Overlay()
        self._superblock = superblock
        self._end = superblock.size // BASIC_BLOCK
        self._transactions: dict[int, _Transaction] = {}
        self._held = 0

    # --- transactions -------------------------------------------------------------------------

    def feed(self, operation: Operation) -> None:
        number, client, flags, data = operation
        require(client in _CLIENTS, "an operation of an unknown client in the log")
        transaction = self._transactions.get(number)
        if transaction is None:
            # One without a start began before the tail: all it changed is on the disk.
            if flags & _START:
                self._transactions[number] = _Transaction()
                self._hold(2 * _OVERHEAD)
            return
        flags &= ~_END
        if flags & _CONTINUED:
            flags &= ~_CONTINUES
        if flags in (_COMMIT, _UNMOUNT):
            if flags == _COMMIT:
                self._commit(transaction)
            del self._transactions[number]
            self._hold(-transaction.held)
        elif flags == _CONTINUED:
            self._continue(transaction, data)
        else:
            require(flags in (0, _CONTINUES), f"unknown flags {flags:#x} in the log")
            self._add(transaction, data)

    def _add(self, transaction: _Transaction, data: bytes) -> None:
        """A new region."""
        if not data:
            return
        if len(transaction.header) < _TRANSACTION_HEADER:
            self._add_header(transaction, data)
            return
        if not transaction.items or transaction.items[-1].is_complete:
            require(len(data) >= 4, "a change in the log has no type")
            transaction.items.append(_Item(expected=_u16(data, 2)))
            require(transaction.items[-1].expected > 0, "a change without content in the log")
        item = transaction.items[-1]
        item.seen += 1
        if item.seen == 1 or item.tells_of_free_space:
            item.regions.append(bytearray(data))
            self._hold(_OVERHEAD + len(data))

    def _continue(self, transaction: _Transaction, data: bytes) -> None:
        """The rest of a region that did not fit into its record."""
        if len(transaction.header) < _TRANSACTION_HEADER:
            self._add_header(transaction, data)
            return
        require(bool(transaction.items), "a continued change without a start in the log")
        item = transaction.items[-1]
        if item.seen == len(item.regions):
            item.regions[-1] += data
            self._hold(len(data))

    def _add_header(self, transaction: _Transaction, data: bytes) -> None:
        transaction.header += data
        require(
            transaction.header.startswith(_TRANSACTION_MAGIC)
            and len(transaction.header) <= _TRANSACTION_HEADER,
            "a transaction in the log has no header",
        )

    def _hold(self, length: int) -> None:
        self._held += length
        if self._held > _MOST_HELD:
            raise UnsupportedError("too much in a dirty log")

    def _commit(self, transaction: _Transaction) -> None:
        """Cancellations count last (xlog_recover_reorder_trans)."""
        cancelled = []
        for item in transaction.items:
            require(item.is_complete, "a transaction in the log is not whole")
            if item.kind == _BUFFER:
                place, flags = self._buffer(item)
                if flags & _CANCELLED:
                    cancelled.append(place)
                else:
                    self._touch(place)
                    self._copy(place, flags, item)
            else:
                self._note(item)
        for place in cancelled:
            self.overlay.touched.discard(place)
            self._hold(-len(self.overlay.chunks.pop(place, ())) * (_CHUNK + _OVERHEAD))

    # --- buffers ------------------------------------------------------------------------------

    def _buffer(self, item: _Item) -> tuple[Place, int]:
        require(len(item.regions[0]) >= 20, "a damaged buffer in the log")
        flags, count, block = struct.unpack_from("<HHq", item.regions[0], 4)
        return self._place(block, count), flags

    def _copy(self, place: Place, flags: int, item: _Item) -> None:
        """Lays the logged regions over what is known of the buffer."""
        if not item.tells_of_free_space:
            return
        copied = dict(self._logged_chunks(place, item))
        magic = bytes(copied[0][:4]) if 0 in copied else None
        is_tree = flags >> _TYPE_SHIFT == _TREE
        if is_tree and magic is not None and magic not in (*BY_BLOCK, *BY_SIZE):
            return  # of inodes, owners and so on
        chunks = self.overlay.chunks.setdefault(place, {})
        self._hold(len(copied.keys() - chunks.keys()) * (_CHUNK + _OVERHEAD))
        chunks.update(copied)

    def _logged_chunks(self, place: Place, item: _Item) -> Iterator[tuple[int, bytes]]:
        """A run of bits may have several regions; each region has a run's start or goes on."""
        form = item.regions[0]
        words = struct.unpack_from("<I", form, 16)[0]
        require(20 + 4 * words <= len(form), "a damaged buffer in the log")
        bits = int.from_bytes(form[20 : 20 + 4 * words], "little")
        regions = iter(item.regions[1:])
        left = memoryview(b"")
        for number in range(bits.bit_length()):
            if not bits >> number & 1:
                require(not left, "a buffer in the log has more content than it says")
                continue
            if not left:
                left = memoryview(next(regions, b""))
            require(
                len(left) >= _CHUNK and (number + 1) * _CHUNK <= place.length * BASIC_BLOCK,
                "a buffer in the log has less content than it says",
            )
            yield number, bytes(left[:_CHUNK])
            left = left[_CHUNK:]
        require(
            not left and next(regions, None) is None,
            "a buffer in the log has more content than it says",
        )

    # --- other items --------------------------------------------------------------------------

    def _note(self, item: _Item) -> None:
        form = item.regions[0]
        if item.kind == _INODE:
            require(len(form) in (52, 56), "a damaged inode in the log")
            block, count = struct.unpack_from("<qi", form, 36 if len(form) == 52 else 40)
            self._touch(self._place(block, count))
        elif item.kind == _QUOTA:
            require(len(form) >= 24, "a damaged quota in the log")
            block, count = struct.unpack_from("<qi", form, 8)
            self._touch(self._place(block, count * self._superblock.basic_blocks_per_block))
        elif item.kind == _INODES_CREATED:
            require(len(form) >= 28, "damaged new inodes in the log")
            group, first, _, _, count = struct.unpack_from(">5I", form, 4)
            unit = self._superblock.basic_blocks_per_block
            start = group * self._superblock.group_blocks + first
            self._touch(self._place(start * unit, count * unit))
        elif item.kind not in _HARMLESS:
            raise UnsupportedError(f"an unknown change {item.kind:#x} in a dirty log")

    def _place(self, block: int, count: int) -> Place:
        require(
            block >= 0 and 0 < count <= self._end - block,
            "the log changes blocks outside of the filesystem",
        )
        return Place(block, count)

    def _touch(self, place: Place) -> None:
        self.overlay.touched.add(place)
        if len(self.overlay.touched) > _MOST_TOUCHED:
            raise UnsupportedError("too much in a dirty log")


def _u16(data: bytes | bytearray, offset: int) -> int:
    return data[offset] | data[offset + 1] << 8
