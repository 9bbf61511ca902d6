"""The master file table, and the streams of the filesystem's own files."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imager.allocation.model import require
from imager.allocation.ntfs.boot import BootSector
from imager.allocation.ntfs.record import (
    ATTRIBUTE_LIST,
    BITMAP,
    DATA,
    Attribute,
    attributes,
    is_in_use,
    is_record,
    without_fixups,
)
from imager.allocation.ntfs.stream import Stream
from imager.blocksource import BlockSource
from imager.errors import NotRecognized

# Numbers of MFT records.
MFT, LOG_FILE, VOLUME, CLUSTER_BITMAP = 0, 2, 3, 6

_PIECE_SIZE = 1 << 20  # bytes of the MFT read at once; a multiple of every record size
_MOST_LIST_BYTES = 256 << 10  # what Windows limits an attribute list to
_MOST_BITMAP_BYTES = 64 << 20  # 512 million files


class Volume:
    """Reads records through the $MFT's own runs."""

    def __init__(self, source: BlockSource, boot: BootSector) -> None:
        """Raises NotRecognized for a damaged $MFT, OSError."""
        self._source = source
        self._boot = boot
        offset = boot.mft_cluster * boot.cluster_size
        base = self._parse(source.pread(offset, boot.record_size))
        # Extension records of a fragmented $MFT lie in the pieces before the ones they describe.
        self._mft = Stream(source, boot, _first_piece(base, DATA))
        require(self._mft.starts_at(offset), "the $MFT doesn't start where the boot sector says")
        for piece in self._later_pieces(MFT, base, DATA):
            self._mft.append(piece)
        self._mft.check_complete()
        self.record_count = self._mft.initialized_size // boot.record_size
        self._in_use = self._mft_bitmap(base)

    def record(self, number: int) -> list[Attribute]:
        """The attributes of a record that must be in use; errors as in the constructor."""
        size = self._boot.record_size
        return self._parse(self._mft.read(number * size, size))

    def stream(self, number: int) -> Stream:
        """A file's main data; it must not be resident. Errors as in the constructor."""
        base = self.record(number)
        stream = Stream(self._source, self._boot, _first_piece(base, DATA))
        for piece in self._later_pieces(number, base, DATA):
            stream.append(piece)
        stream.check_complete()
        return stream

    def records_in_use(self) -> Iterator[bytes]:
        """Every record in use, without fixups. Errors as in the constructor."""
        size = self._boot.record_size
        end = self.record_count * size
        for start in range(0, end, _PIECE_SIZE):
            piece = self._mft.read(start, min(_PIECE_SIZE, end - start))
            for at in range(0, len(piece), size):
                raw = piece[at : at + size]
                if not is_record(raw):
                    number = (start + at) // size
                    require(not self._is_marked(number), f"MFT record {number} is damaged")
                elif is_in_use(raw):
                    yield without_fixups(raw)

    def _is_marked(self, number: int) -> bool:
        return bool(self._in_use[number // 8] >> number % 8 & 1)

    def _mft_bitmap(self, base: list[Attribute]) -> bytes:
        first = next((piece for piece in base if piece.kind == BITMAP), None)
        if first is None or first.value is not None:
            bits = first.value if first and first.value else b""
        else:
            stream = Stream(self._source, self._boot, first)
            for piece in self._later_pieces(MFT, base, BITMAP):
                stream.append(piece)
            stream.check_complete()
            require(stream.size <= _MOST_BITMAP_BYTES, "too many MFT records")
            bits = stream.read(0, stream.initialized_size)
        require(len(bits) * 8 >= self.record_count, "the $MFT's bitmap is too short")
        return bits

    def _parse(self, raw: bytes) -> list[Attribute]:
        require(is_record(raw) and is_in_use(raw), "an MFT record is damaged")
        return list(attributes(without_fixups(raw)))

    def _later_pieces(self, number: int, base: list[Attribute], kind: int) -> Iterator[Attribute]:
        """Pieces of an unnamed attribute in other records, in order."""
        for lowest, other in sorted(self._listed(base, kind)):
            if lowest == 0:
                continue
            require(other != number, "a stream has two pieces in one record")
            yield _find(self.record(other), kind, lowest)

    def _listed(self, base: list[Attribute], kind: int) -> Iterator[tuple[int, int]]:
        """(lowest VCN, record) by the attribute list, if there is one."""
        raw = self._attribute_list(base)
        at = 0
        while at < len(raw):
            require(at + 26 <= len(raw), "an attribute list is damaged")
            found, length, name_length, lowest, reference = struct.unpack_from("<IHBxQQ", raw, at)
            require(length >= 26, "an attribute list is damaged")
            if found == kind and name_length == 0:
                yield lowest, reference & (1 << 48) - 1
            at += length

    def _attribute_list(self, base: list[Attribute]) -> bytes:
        found = next((piece for piece in base if piece.kind == ATTRIBUTE_LIST), None)
        if found is None:
            return b""
        if found.value is not None:
            return found.value
        stream = Stream(self._source, self._boot, found)
        stream.check_complete()
        require(stream.size <= _MOST_LIST_BYTES, "an attribute list is too long")
        return stream.read(0, stream.size)


def _first_piece(record: list[Attribute], kind: int) -> Attribute:
    return _find(record, kind, 0)


def _find(record: list[Attribute], kind: int, lowest_vcn: int) -> Attribute:
    for piece in record:
        if piece.kind == kind and not piece.is_named and piece.lowest_vcn == lowest_vcn:
            return piece
    raise NotRecognized("an MFT record lacks an attribute")
