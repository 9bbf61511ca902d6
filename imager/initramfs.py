"""Reading an initramfs: cpio archives one after another, some of them compressed.

A boot loader concatenates what the kernel then unpacks piece by piece (Linux
Documentation/driver-api/early-userspace/buffer-format.rst, init/initramfs.c, lib/decompress.c).
All of it is foreign: sizes are checked, and memory stays bounded whatever the bytes say.
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import zstandard

from imager.errors import FormatError, UnsupportedError

_MAGICS = (b"070701", b"070702")
_HEADER_BYTES = 110
_TRAILER = "TRAILER!!!"
_HEX = re.compile(rb"[0-9A-Fa-f]{104}")

_MAX_NAME_BYTES = 4096  # PATH_MAX
_MAX_MEMBERS = 1_000_000
_MAX_UNPACKED = 8 << 30  # more than any machine unpacks into its memory at boot
MAX_CONTENT = 256 << 20
"""Bytes of one member that are handed out; a larger one has no content here."""

_CHUNK = 64 << 10
# zstd has no limit on what it makes of a piece of input: 128 KiB from 4 bytes at the most.
_INPUT_PIECE = 1 << 10
_MAX_WINDOW = 128 << 20  # the kernel's own limit (ZSTD_WINDOWSIZE_MAX)
_XZ_MEMORY = 256 << 20

_COMPRESSED: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x5d\0\0", "lzma"),
    (b"BZh", "bzip2"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x89LZO", "lzo"),
)


@dataclass(frozen=True)
class CpioMember:
    """``mode`` as in stat; ``size`` in bytes. A symbolic link's content is its target.

    ``content`` is None when it was not wanted, or is more than ``MAX_CONTENT``.
    """

    name: str
    mode: int
    size: int
    content: bytes | None


Wanted = Callable[[str], bool]


def read_cpio(stream: BinaryIO, *, want: Wanted = lambda name: True) -> Iterator[CpioMember]:
    """The members of an initramfs in order; content only of those whose name is wanted.

    Raises FormatError for damaged bytes and UnsupportedError for a compression that can't be
    read here (lz4, lzo). Of hard links the last has the content.
    """
    source = _Source(stream.read)
    count = 0
    while source.skip_zeros():
        if source.peek(6) in _MAGICS:
            members = _archive(source, want)
        else:
            members = _compressed_archives(source, want)
        for member in members:
            count += 1
            if count > _MAX_MEMBERS:
                raise FormatError(f"initramfs: more than {_MAX_MEMBERS} members")
            yield member


def _compressed_archives(source: _Source, want: Wanted) -> Iterator[CpioMember]:
    unpacked = _Source(_Unpacked(source).read)
    while unpacked.skip_zeros():
        if unpacked.peek(6) not in _MAGICS:
            raise FormatError(f"initramfs: no cpio archive at unpacked byte {unpacked.position}")
        yield from _archive(unpacked, want)


def _archive(source: _Source, want: Wanted) -> Iterator[CpioMember]:
    """The members up to the trailer."""
    while True:
        member = _member(source, want)
        if member.name == _TRAILER:
            return
        yield member


def _member(source: _Source, want: Wanted) -> CpioMember:
    at = source.position
    header = source.take(_HEADER_BYTES)
    if header[:6] not in _MAGICS or not _HEX.fullmatch(header[6:]):
        raise FormatError(f"initramfs: no member of a cpio archive at byte {at}")
    fields = [int(header[i : i + 8], 16) for i in range(6, _HEADER_BYTES, 8)]
    mode, size, name_size = fields[1], fields[6], fields[11]
    if not 1 < name_size <= _MAX_NAME_BYTES:
        raise FormatError(f"initramfs: a name of {name_size} bytes at byte {at}")
    name = os.fsdecode(source.take(name_size).rstrip(b"\0"))
    source.skip(-(_HEADER_BYTES + name_size) % 4)
    content = None
    if size <= MAX_CONTENT and name != _TRAILER and want(name):
        content = source.take(size)
    else:
        source.skip(size)
    source.skip_padding(-size % 4)
    return CpioMember(name, mode, size, content)


class _Source:
    """Bytes in order, with a look ahead."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._ahead = b""
        self.position = 0

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        while len(self._ahead) < size and (more := self._read(_CHUNK)):
            self._ahead += more
        return self._ahead[:size]

    def some(self, most: int) -> bytes:
        """One to ``most`` bytes, none at the end."""
        self.peek(1)
        piece, self._ahead = self._ahead[:most], self._ahead[most:]
        self.position += len(piece)
        return piece

    def give_back(self, piece: bytes) -> None:
        self._ahead = piece + self._ahead
        self.position -= len(piece)

    def take(self, size: int) -> bytes:
        pieces = []
        while size > 0:
            piece = self.some(min(size, _CHUNK))
            if not piece:
                raise FormatError(f"initramfs: it ends at byte {self.position} within a member")
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def skip(self, size: int) -> None:
        while size > 0:
            size -= len(self.take(min(size, _CHUNK)))

    def skip_padding(self, size: int) -> None:
        """Of the last member of a cut archive it may be missing."""
        while size > 0 and (piece := self.some(size)):
            size -= len(piece)

    def skip_zeros(self) -> bool:
        """Go to the next byte that isn't zero; False at the end."""
        while piece := self.some(_CHUNK):
            if rest := piece.lstrip(b"\0"):
                self.give_back(rest)
                return True
        return False


class _Decompressor(Protocol):
    """What zlib, bz2, lzma and zstandard have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


class _Unpacked:
    """One compressed stream; what follows it goes back to the source."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._kind = _compression(source)
        self._decompressor, self._step = _decompressor(self._kind)
        self._size = 0
        self._ended = False

    def read(self, size: int) -> bytes:
        """Some bytes; none at the end of the compressed stream."""
        while not self._ended:
            piece = self._source.some(_INPUT_PIECE)
            if not piece:
                raise FormatError(f"initramfs: its {self._kind} stream is cut off")
            try:
                unpacked = self._step(piece)
            except (zlib.error, OSError, ValueError, EOFError, lzma.LZMAError) as error:
                raise FormatError(f"initramfs: damaged {self._kind} stream: {error}") from None
            except zstandard.ZstdError as error:
                raise FormatError(f"initramfs: damaged zstd stream: {error}") from None
            if self._decompressor.eof:
                self._ended = True
                self._source.give_back(self._decompressor.unused_data)
            self._size += len(unpacked)
            if self._size > _MAX_UNPACKED:
                raise FormatError(f"initramfs: unpacks to more than {_MAX_UNPACKED >> 30} GiB")
            if unpacked:
                return unpacked
        return b""


def _compression(source: _Source) -> str:
    head = source.peek(6)
    for magic, kind in _COMPRESSED:
        if head.startswith(magic):
            return kind
    raise FormatError(
        f"initramfs: neither a cpio archive nor a known compression at byte {source.position} "
        f"({head.hex()})"
    )


def _decompressor(kind: str) -> tuple[_Decompressor, Callable[[bytes], bytes]]:
    """A decompressor and its step. None of them makes more than some tens of MiB of 1 KiB: bzip2
    900 kB from about 40 bytes, zstd 128 KiB from 4."""
    if kind == "gzip":
        inflate = zlib.decompressobj(wbits=31)
        return inflate, inflate.decompress
    if kind == "zstd":
        zstd = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
        return zstd, zstd.decompress
    if kind == "bzip2":
        burrows = bz2.BZ2Decompressor()
        return burrows, burrows.decompress
    if kind in ("xz", "lzma"):
        form = lzma.FORMAT_XZ if kind == "xz" else lzma.FORMAT_ALONE
        markov = lzma.LZMADecompressor(form, memlimit=_XZ_MEMORY)
        return markov, markov.decompress
    raise UnsupportedError(
        f"initramfs: compressed with {kind}, which can't be unpacked here",
        hint="make the initramfs with zstd, gzip or xz",
    )
