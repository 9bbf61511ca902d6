"""A view of a source: a file, served through FUSE, in which unused bytes are errors.

Reading an unused byte is EIO. A read that begins in used bytes and runs into unused ones comes
back short, as at the end of a file: a program that only reads ahead gets what exists and asks
again for what it needs, and a program that needs the unused byte meets the error. To the byte:
the kernel keeps no pages of the file (direct I/O).

Some tools read a block only to learn that the device reaches that far. Such blocks (``filler``)
read as a random token instead, which the proof looks for in what the files hold.

What is written stays in the memory of the server, so that the kernel can replay a journal and the
source is never touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from imager.blocksource import BlockSource
from imager.errors import ToolError
from imager.extents import Extent, Extents
from imager.fuseserver import ServedFile, serve_files
from imager.process import run

TOKEN_SIZE = 16

# Devices write whole sectors; a replay never writes less.
_SECTOR = 512

# A journal is rarely larger than 1 GiB and replays to less; beyond it the view is full.
_MAX_WRITTEN_SECTORS = (256 << 20) // _SECTOR

# Enough to say where, and less than fills the pipe that nobody empties meanwhile.
_MAX_MISSES = 1000

_FILE_NAME = "volume"
_START_SECONDS = 20
_END_SECONDS = 10


class ViewUnavailable(ToolError):
    """FUSE does not work here."""


class SparseView:
    """The bytes of the view, without FUSE. Offsets and lengths in bytes."""

    def __init__(self, source: BlockSource, used: Extents, filler: Extents, token: bytes) -> None:
        """``filler``: what of the unused bytes reads as repetitions of ``token``."""
        self._source = source
        self._used = used
        self._filler = filler
        self._token = token
        self._written: dict[int, bytes] = {}
        self.misses: list[Extent] = []

    @property
    def size(self) -> int:
        return self._source.size

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes, up to the first unused one. Raises OSError (EIO) when the first
        is unused, and when the source is unreadable."""
        length = max(0, min(length, self.size - offset))
        content = bytearray()
        while len(content) < length:
            piece = self._piece(offset + len(content), length - len(content))
            if not piece:
                break
            content += piece
        if length and not content:
            self._miss(offset, length)
            raise OSError(errno.EIO, "an unused byte was read")
        return bytes(content)

    def write(self, offset: int, content: bytes) -> int:
        """Keep whole sectors in memory. Raises OSError: EINVAL for parts of sectors, ENOSPC."""
        if offset % _SECTOR or len(content) % _SECTOR or offset + len(content) > self.size:
            raise OSError(errno.EINVAL, "not whole sectors of the view")
        if len(self._written) + len(content) // _SECTOR > _MAX_WRITTEN_SECTORS:
            raise OSError(errno.ENOSPC, "too much is written to the view")
        for start in range(0, len(content), _SECTOR):
            self._written[(offset + start) // _SECTOR] = content[start : start + _SECTOR]
        return len(content)

    def _piece(self, at: int, length: int) -> bytes:
        """What can be had at ``at`` from one origin; nothing for an unused byte."""
        written = self._written.get(at // _SECTOR)
        if written is not None:
            return written[at % _SECTOR :][:length]
        length = self._before_written(at, length)
        used = next(self._used.within(at, length), None)
        if used is not None and used.offset == at:
            return self._source.pread(at, used.length)
        gap = length if used is None else used.offset - at
        filler = next(self._filler.within(at, gap), None)
        if filler is None or filler.offset != at:
            return b""
        return self._tokens(at, filler.length)

    def _before_written(self, at: int, length: int) -> int:
        if not self._written:
            return length
        sectors = range(at // _SECTOR + 1, (at + length - 1) // _SECTOR + 1)
        first = next((sector for sector in sectors if sector in self._written), None)
        return length if first is None else first * _SECTOR - at

    def _tokens(self, at: int, length: int) -> bytes:
        skipped = at % TOKEN_SIZE
        count = -(-(skipped + length) // TOKEN_SIZE)
        return (self._token * count)[skipped : skipped + length]

    def _miss(self, offset: int, length: int) -> None:
        if len(self.misses) < _MAX_MISSES:
            gap_end = next(iter(self._used.within(offset, length)), Extent(offset + length, 0))
            self.misses.append(Extent(offset, gap_end.offset - offset))


@dataclass
class View:
    """A served view: ``path`` of the file, and the ``token`` in its filler."""

    path: Path
    token: bytes
    _messages: Connection = field(repr=False)

    def misses(self) -> list[Extent]:
        """Unused bytes that were asked for since the last call, at most the first 1000 in all."""
        found = []
        with contextlib.suppress(EOFError):
            while self._messages.poll():
                found.append(Extent(*self._messages.recv()))
        return found


@contextlib.contextmanager
def open_view(source: BlockSource, used: Extents, filler: Extents | None = None) -> Iterator[View]:
    """Serve the view from a process of its own until the block ends.

    Raises ViewUnavailable when that does not work (no FUSE, no mfusepy, not permitted).
    """
    folder = Path(tempfile.mkdtemp(prefix="imager-view-"))
    sparse = SparseView(source, used, filler or Extents(), os.urandom(TOKEN_SIZE))
    try:
        with tempfile.TemporaryFile() as said, _server(sparse, folder, said) as messages:
            yield View(folder / _FILE_NAME, sparse._token, messages)
    finally:
        folder.rmdir()


@contextlib.contextmanager
def _server(sparse: SparseView, folder: Path, said: IO[bytes]) -> Iterator[Connection]:
    """Forked, so that it reads from any kind of source; a process of its own, so that a program
    that waits for the view never waits for this one."""
    context = multiprocessing.get_context("fork")
    messages, other_end = context.Pipe(duplex=False)
    process = context.Process(
        target=_serve, args=(sparse, folder, said, other_end, os.getpid()), daemon=True
    )
    process.start()
    other_end.close()
    try:
        if not _is_ready(messages):
            process.join(1)
            said.seek(0)
            reason = said.read(4096).decode(errors="replace").strip().splitlines()
            raise ViewUnavailable(
                f"FUSE does not work here: {reason[-1] if reason else 'no answer'}",
                hint="install fuse3 and the Python package mfusepy, and run as root",
            )
        yield messages
    finally:
        _stop(process, folder)
        messages.close()


def _is_ready(messages: Connection) -> bool:
    try:
        return messages.poll(_START_SECONDS) and messages.recv() == "ready"
    except EOFError:
        return False


def _stop(process: multiprocessing.process.BaseProcess, folder: Path) -> None:
    """On SIGTERM libfuse unmounts and ends; what is left after that is taken down by force."""
    process.terminate()
    process.join(_END_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    if folder.is_mount():
        run(["umount", "--lazy", str(folder)])


# --- in the server's process ---


def _serve(
    sparse: SparseView, folder: Path, said: IO[bytes], messages: Connection, parent: int
) -> None:
    os.setsid()  # Ctrl-C is for the program, which then ends this process in order
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # only then libfuse handles it
    _be_a_device_of(parent)
    os.dup2(said.fileno(), 2)
    try:
        _mount(sparse, folder, messages)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        messages.close()


def _be_a_device_of(parent: int) -> None:
    """By prctl(2): SIGTERM when the parent is killed, even if it just was (PR_SET_PDEATHSIG), and
    no waiting for writes that wait for this process (PR_SET_IO_FLUSHER)."""
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGTERM)
    libc.prctl(57, 1, 0, 0, 0)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)


def _mount(sparse: SparseView, folder: Path, messages: Connection) -> None:
    def read(offset: int, length: int) -> bytes:
        known = len(sparse.misses)
        try:
            return sparse.read(offset, length)
        finally:
            for miss in sparse.misses[known:]:
                messages.send(tuple(miss))

    file = ServedFile(_FILE_NAME, sparse.size, read, sparse.write)
    serve_files(
        folder,
        [file],
        source="imager-view",
        on_ready=lambda: messages.send("ready"),
        in_pages=False,
    )
