"""The second part of a connection: requests and their replies.

The connection's thread reads requests and answers at once what is in the cache. What must be read
from the repository goes to workers, so that a slow block holds up nobody else; replies may overtake
each other, as the protocol allows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import NamedTuple

from imager.errors import ImagerError, IntegrityError
from imager.imagesource import Piece
from imager.serve import wire
from imager.serve.handshake import Agreement
from imager.serve.stream import Buffer, StreamEnded, buffered
from imager.serve.wire import Chunk, Command, CommandFlag, Error, Status

OnError = Callable[[str, Exception], None]
"""Is told the export's name and why a read failed."""

_WORKERS = 4
_MAX_WAITING = 128  # requests without an answer; by then the client has to wait

# Chunks of structured replies are sent together until they have so many bytes. A simple reply must
# be had whole before it begins, so large ones are few at a time.
_BATCH_BYTES = 1 << 20
_large_replies = threading.Semaphore(2)

_ALLOCATION_ID = 1
_ZEROS = bytes(256 << 10)
_WRITES = {Command.WRITE, Command.TRIM, Command.WRITE_ZEROES}
_READING_FLAGS = {
    Command.READ: CommandFlag.DF,
    Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
}


class Request(NamedTuple):
    flags: int
    command: int
    cookie: int
    offset: int
    length: int


def transmit(agreement: Agreement, on_error: OnError) -> None:
    """Until the client says good-bye. Raises OSError, StreamEnded when it is just gone."""
    _Transmission(agreement, on_error).run()


class _Transmission:
    def __init__(self, agreement: Agreement, on_error: OnError) -> None:
        self._stream = agreement.stream
        self._export = agreement.export
        self._structured = agreement.structured
        self._allocation = agreement.allocation
        self._on_error = on_error
        self._todo: SimpleQueue[Request | None] = SimpleQueue()
        self._room = threading.Semaphore(_MAX_WAITING)
        self._workers: list[threading.Thread] = []
        self._idle = 0
        self._idle_lock = threading.Lock()
        self._broken = False

    def run(self) -> None:
        try:
            for request in self._requests():
                if self._broken:
                    return
                self._take(request)
        finally:
            for _ in self._workers:
                self._todo.put(None)
            for worker in self._workers:
                worker.join()

    def _requests(self) -> Iterator[Request]:
        reader = buffered(self._stream)
        size = wire.REQUEST.size
        while True:
            header = reader.read(size)
            if len(header) < size:
                raise StreamEnded
            magic, *rest = wire.REQUEST.unpack(header)
            if magic != wire.REQUEST_MAGIC:
                raise StreamEnded  # nobody knows where the next request begins
            request = Request(*rest)
            if request.command == Command.DISCONNECT:
                return
            if request.command == Command.WRITE:
                left = request.length
                while left:  # it comes, whatever the answer will be
                    count = len(reader.read(min(left, len(_ZEROS))))
                    if not count:
                        raise StreamEnded
                    left -= count
            yield request

    def _take(self, request: Request) -> None:
        wrong = self._judge(request)
        if wrong is not None:
            self._fail(request, wrong, wrong.name)
        elif request.command == Command.READ:
            ready = self._ready(request)
            if ready is None:
                self._hand_over(request)
            else:
                self._send_pieces(request, ready)
        elif request.command == Command.BLOCK_STATUS:
            self._hand_over(request)
        else:  # a flush, or a hint to read something soon
            self._succeed(request)

    def _judge(self, request: Request) -> Error | None:
        """What is wrong with a request."""
        if request.command in _WRITES:
            return Error.EPERM
        if request.command in (Command.FLUSH, Command.CACHE):
            known: int = 0
        elif request.command in _READING_FLAGS:
            known = _READING_FLAGS[Command(request.command)]
        else:
            return Error.EINVAL
        # A flag that is always allowed, and has no meaning where nothing is written.
        if request.flags & ~int(known | CommandFlag.FUA):
            return Error.EINVAL
        if request.command == Command.FLUSH:
            return None
        if not request.length or request.offset + request.length > self._export.size:
            return Error.EINVAL
        if request.command == Command.READ:
            if request.length > wire.MAX_REQUEST:
                return Error.EOVERFLOW if self._structured else Error.EINVAL
            if request.flags & CommandFlag.DF and not self._structured:
                return Error.EINVAL
        if request.command == Command.BLOCK_STATUS and not self._allocation:
            return Error.EINVAL
        return None

    # --- workers ---

    def _hand_over(self, request: Request) -> None:
        self._room.acquire()
        with self._idle_lock:
            wanted = self._idle <= 0 and len(self._workers) < _WORKERS
            self._idle -= not wanted
        if wanted:
            worker = threading.Thread(target=self._work, name="nbd-worker", daemon=True)
            worker.start()
            self._workers.append(worker)
        self._todo.put(request)

    def _work(self) -> None:
        while (request := self._todo.get()) is not None:
            try:
                if not self._broken:
                    self._serve(request)
            except OSError:  # the client is gone; its thread notices too
                self._broken = True
            finally:
                self._room.release()
                with self._idle_lock:
                    self._idle += 1

    def _serve(self, request: Request) -> None:
        if request.command == Command.BLOCK_STATUS:
            self._send_status(request)
        elif self._structured and not request.flags & CommandFlag.DF:
            self._send_chunks(request)
        elif request.length <= _BATCH_BYTES:
            self._send_whole(request)
        else:
            with _large_replies:
                self._send_whole(request)

    def _ready(self, request: Request) -> list[Piece] | None:
        try:
            return self._export.ready_pieces(request.offset, request.length)
        except (ImagerError, OSError):
            return None  # a worker will find out

    # --- replies ---

    def _send_pieces(self, request: Request, pieces: list[Piece]) -> None:
        """What is all there."""
        if not self._structured:
            self._send_simple(request, _contents(pieces))
        elif request.flags & CommandFlag.DF:
            header = _data_header(request, request.offset, request.length, wire.CHUNK_DONE)
            self._stream.send([header, *_contents(pieces)])
        else:
            parts: list[Buffer] = []
            at, last = request.offset, len(pieces) - 1
            for n, piece in enumerate(pieces):
                parts += _chunk(request, at, piece, wire.CHUNK_DONE * (n == last))
                at += piece.length
            self._stream.send(parts)

    def _send_chunks(self, request: Request) -> None:
        """As they come, up to the byte that can't be read."""
        at = request.offset
        parts: list[Buffer] = []
        held = 0
        pieces = _joined(self._export.pieces(request.offset, request.length))
        while True:
            try:
                piece = next(pieces, None)
            except (ImagerError, OSError) as error:
                if parts:
                    self._stream.send(parts)
                self._report(error)
                self._fail(request, Error.EIO, _message(error), at)
                return
            if piece is None:
                break
            at += piece.length
            held += piece.length if piece.content is not None else 0
            done = wire.CHUNK_DONE * (at == request.offset + request.length)
            parts += _chunk(request, at - piece.length, piece, done)
            if held >= _BATCH_BYTES or done:
                self._stream.send(parts)
                parts, held = [], 0

    def _send_whole(self, request: Request) -> None:
        """A simple reply, or one that must not be cut."""
        at = request.offset
        pieces = []
        try:
            for piece in self._export.pieces(request.offset, request.length):
                pieces.append(piece)
                at += piece.length
        except (ImagerError, OSError) as error:
            self._report(error)
            self._fail(request, Error.EIO, _message(error), at)
            return
        self._send_pieces(request, pieces)

    def _send_status(self, request: Request) -> None:
        extents: list[list[int]] = []
        most = 1 if request.flags & CommandFlag.REQ_ONE else wire.MAX_EXTENTS
        try:
            for length, is_data in self._export.allocation(request.offset, request.length):
                status = 0 if is_data else int(Status.HOLE | Status.ZERO)
                if extents and extents[-1][1] == status:
                    extents[-1][0] += length
                elif len(extents) == most:
                    break
                else:
                    extents.append([length, status])
        except (ImagerError, OSError) as error:
            self._report(error)
            if not extents:
                self._fail(request, Error.EIO, _message(error), request.offset)
                return
        content = wire.U32.pack(_ALLOCATION_ID)
        content += b"".join(wire.EXTENT.pack(*extent) for extent in extents)
        self._stream.send([_chunk_header(request, Chunk.BLOCK_STATUS, len(content)), content])

    def _succeed(self, request: Request) -> None:
        if self._structured:
            self._stream.send([_chunk_header(request, Chunk.NONE, 0)])
        else:
            self._send_simple(request, [])

    def _send_simple(self, request: Request, contents: list[Buffer]) -> None:
        header = wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie)
        self._stream.send([header, *contents])

    def _fail(
        self, request: Request, error: Error, message: str, offset: int | None = None
    ) -> None:
        if not self._structured:
            self._stream.send(
                [wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, request.cookie)]
            )
            return
        text = message.encode(errors="replace")[: wire.MAX_MESSAGE]
        content = wire.CHUNK_ERROR.pack(error, len(text)) + text
        if offset is not None and request.command == Command.READ:
            kind, content = Chunk.ERROR_OFFSET, content + wire.CHUNK_OFFSET.pack(offset)
        else:
            kind = Chunk.ERROR
        self._stream.send([_chunk_header(request, kind, len(content)), content])

    def _report(self, error: Exception) -> None:
        self._on_error(self._export.name, error)


def _message(error: Exception) -> str:
    """For the client: what is damaged is no secret to who may read it, where it lies is."""
    return "damaged" if isinstance(error, IntegrityError) else "cannot be read"


def _contents(pieces: Iterable[Piece]) -> list[Buffer]:
    """Zeros in full."""
    found: list[Buffer] = []
    for length, content in pieces:
        if content is not None:
            found.append(content)
            continue
        for at in range(0, length, len(_ZEROS)):
            found.append(memoryview(_ZEROS)[: length - at])
    return found


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Neighbouring zeros as one; what came before an error comes before it here too."""
    zeros = 0
    try:
        for piece in pieces:
            if piece.content is None:
                zeros += piece.length
                continue
            if zeros:
                yield Piece(zeros, None)
                zeros = 0
            yield piece
    except (ImagerError, OSError):
        if zeros:
            yield Piece(zeros, None)
        raise
    if zeros:
        yield Piece(zeros, None)


def _chunk(request: Request, offset: int, piece: Piece, flags: int) -> list[Buffer]:
    if piece.content is not None:
        return [_data_header(request, offset, piece.length, flags), piece.content]
    header = wire.CHUNK.pack(
        wire.STRUCTURED_REPLY_MAGIC, flags, Chunk.OFFSET_HOLE, request.cookie, wire.HOLE.size
    )
    return [header + wire.HOLE.pack(offset, piece.length)]


def _data_header(request: Request, offset: int, length: int, flags: int) -> bytes:
    return wire.DATA_CHUNK.pack(
        wire.STRUCTURED_REPLY_MAGIC,
        flags,
        Chunk.OFFSET_DATA,
        request.cookie,
        wire.CHUNK_OFFSET.size + length,
        offset,
    )


def _chunk_header(request: Request, kind: Chunk, length: int) -> bytes:
    """Of the last chunk of a reply."""
    return wire.CHUNK.pack(
        wire.STRUCTURED_REPLY_MAGIC, wire.CHUNK_DONE, kind, request.cookie, length
    )
