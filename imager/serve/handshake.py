"""The first part of a connection: which export, and how to speak about it."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from imager.serve import wire
from imager.serve.export import Export
from imager.serve.stream import (
    Buffer,
    EncryptedStream,
    PlainStream,
    Stream,
    StreamEnded,
    read_exactly,
)
from imager.serve.wire import Answer, Info, Option, Transmission

# A client that sends nothing but options is up to no good.
_MAX_OPTIONS = 1000

_FLAGS = (
    Transmission.HAS_FLAGS
    | Transmission.READ_ONLY
    | Transmission.SEND_FLUSH
    | Transmission.SEND_DF
    | Transmission.CAN_MULTI_CONN
    | Transmission.SEND_CACHE
)
_PREFERRED_BLOCK = 4096


@dataclass
class Agreement:
    """What was agreed on with a client."""

    stream: Stream
    export: Export
    structured: bool
    allocation: bool
    """Whether it may ask for block status."""


class _Refused(Exception):
    """An option that can't be done; the client may try others."""

    def __init__(self, answer: Answer, message: str) -> None:
        super().__init__(message)
        self.answer = answer


def shake_hands(
    connection: socket.socket, exports: Mapping[str, Export], tls: ssl.SSLContext | None
) -> Agreement | None:
    """None when the client wanted no more. Raises OSError and StreamEnded when it is gone or
    doesn't speak the protocol."""
    return _Handshake(connection, exports, tls).run()


class _Handshake:
    def __init__(
        self,
        connection: socket.socket,
        exports: Mapping[str, Export],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._socket = connection
        self._exports = exports
        self._tls = tls
        self._stream: Stream = PlainStream(connection)
        self._structured = False
        self._context: str | None = None  # the export whose block status was asked for

    def run(self) -> Agreement | None:
        flags = wire.Handshake.FIXED_NEWSTYLE | wire.Handshake.NO_ZEROES
        self._stream.send([wire.GREETING.pack(wire.INIT_MAGIC, wire.OPTION_MAGIC, flags)])
        (client,) = wire.CLIENT_FLAGS.unpack(self._read(wire.CLIENT_FLAGS.size))
        if client & ~int(flags) or not client & wire.Handshake.FIXED_NEWSTYLE:
            raise StreamEnded  # by the protocol: nothing that could be answered
        padding = b"" if client & wire.Handshake.NO_ZEROES else wire.EXPORT_PADDING
        for _ in range(_MAX_OPTIONS):
            option, content = self._next_option()
            if option == Option.ABORT:
                self._answer(option, Answer.ACK)
                return None
            if option == Option.EXPORT_NAME:
                return self._by_name(content, padding)
            try:
                if content is None:
                    raise _Refused(Answer.TOO_BIG, "too long")
                chosen = self._do(option, content)
            except _Refused as refused:
                self._answer(option, refused.answer, str(refused).encode())
                continue
            if chosen is not None:
                return self._agreement(chosen)
        raise StreamEnded

    def _next_option(self) -> tuple[int, bytes | None]:
        """None instead of a content that is too long."""
        magic, option, length = wire.OPTION.unpack(self._read(wire.OPTION.size))
        if magic != wire.OPTION_MAGIC:
            raise StreamEnded
        if length <= wire.MAX_OPTION_LENGTH:
            return option, self._read(length)
        if length > wire.MAX_REQUEST:
            raise StreamEnded
        while length:
            length -= len(self._read(min(length, wire.MAX_OPTION_LENGTH)))
        return option, None

    def _do(self, option: int, content: bytes) -> Export | None:
        """Answer an option; an export when that ends the handshake."""
        if option == Option.STARTTLS:
            self._start_tls(content)
            return None
        if self._tls is not None and not isinstance(self._stream, EncryptedStream):
            raise _Refused(Answer.TLS_REQUIRED, "this server wants TLS first")
        if option == Option.LIST:
            self._list(content)
        elif option in (Option.INFO, Option.GO):
            export = self._inform(option, content)
            return export if option == Option.GO else None
        elif option == Option.STRUCTURED_REPLY:
            _check(not content, "this option has no content")
            self._structured = True
            self._answer(option, Answer.ACK)
        elif option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            self._meta_context(option, content)
        else:
            raise _Refused(Answer.UNSUPPORTED, "unknown option")
        return None

    def _start_tls(self, content: bytes) -> None:
        _check(not content, "this option has no content")
        _check(not isinstance(self._stream, EncryptedStream), "TLS was begun already")
        if self._tls is None:
            raise _Refused(Answer.POLICY, "this server has no certificate")
        self._answer(Option.STARTTLS, Answer.ACK)
        self._stream = EncryptedStream(self._socket, self._tls)
        self._structured, self._context = False, None  # what was said in the clear is forgotten

    def _list(self, content: bytes) -> None:
        _check(not content, "this option has no content")
        for export in self._exports.values():
            name = export.name.encode()
            self._answer(
                Option.LIST,
                Answer.SERVER,
                wire.U32.pack(len(name)) + name + export.description.encode(),
            )
        self._answer(Option.LIST, Answer.ACK)

    def _by_name(self, content: bytes | None, padding: bytes) -> Agreement:
        """The old way, which has no answer to a refusal but to hang up."""
        encrypted = isinstance(self._stream, EncryptedStream)
        if content is None or (self._tls is not None and not encrypted):
            raise StreamEnded
        try:
            export = self._find(content)
        except _Refused:
            raise StreamEnded from None
        self._stream.send([wire.EXPORT_ANSWER.pack(export.size, _FLAGS), padding])
        return self._agreement(export)

    def _inform(self, option: int, content: bytes) -> Export:
        reader = _Reader(content)
        export = self._find(reader.take(reader.number()))
        wanted = reader.list_of_short()
        reader.end()
        self._answer(option, Answer.INFO, wire.INFO_EXPORT.pack(Info.EXPORT, export.size, _FLAGS))
        texts = {Info.NAME: export.name, Info.DESCRIPTION: export.description}
        for kind, text in texts.items():
            if kind in wanted and text:
                self._answer(option, Answer.INFO, wire.U16.pack(kind) + text.encode())
        if Info.BLOCK_SIZE in wanted:
            sizes = wire.INFO_BLOCK_SIZE.pack(
                Info.BLOCK_SIZE, 1, _PREFERRED_BLOCK, wire.MAX_REQUEST
            )
            self._answer(option, Answer.INFO, sizes)
        self._answer(option, Answer.ACK)
        return export

    def _meta_context(self, option: int, content: bytes) -> None:
        _check(self._structured, "ask for structured replies first")
        reader = _Reader(content)
        if option == Option.SET_META_CONTEXT:
            self._context = None
        export = self._find(reader.take(reader.number()))
        queries = [reader.take(reader.number()) for _ in range(reader.number())]
        reader.end()
        listing = option == Option.LIST_META_CONTEXT
        asked = {wire.BASE_ALLOCATION, b"base:"} if listing else {wire.BASE_ALLOCATION}
        if asked & set(queries) or (listing and not queries):
            number = 0 if listing else _ALLOCATION_ID
            self._answer(option, Answer.META_CONTEXT, wire.U32.pack(number) + wire.BASE_ALLOCATION)
            if not listing:
                self._context = export.name
        self._answer(option, Answer.ACK)

    def _find(self, name: bytes) -> Export:
        """The empty name is the first one."""
        if len(name) > wire.MAX_NAME:
            raise _Refused(Answer.TOO_BIG, "the name is too long")
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise _Refused(Answer.INVALID, "the name is not UTF-8") from None
        export = next(iter(self._exports.values()), None) if not text else self._exports.get(text)
        if export is None:
            raise _Refused(Answer.UNKNOWN, "there is no such export")
        return export

    def _agreement(self, export: Export) -> Agreement:
        return Agreement(self._stream, export, self._structured, self._context == export.name)

    def _read(self, length: int) -> bytes:
        return read_exactly(self._stream, length)

    def _answer(self, option: int, answer: Answer, content: Buffer = b"") -> None:
        header = wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, answer, len(content))
        self._stream.send([header, content])


_ALLOCATION_ID = 1


class _Reader:
    """Numbers and strings of an option; a length that is not there is refused."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def take(self, length: int) -> bytes:
        part = self._content[self._at : self._at + length]
        _check(len(part) == length, "it ends early")
        self._at += length
        return part

    def number(self) -> int:
        return int(wire.U32.unpack(self.take(4))[0])

    def list_of_short(self) -> set[int]:
        (count,) = wire.U16.unpack(self.take(2))
        return set(struct.unpack(f">{count}H", self.take(2 * count)))

    def end(self) -> None:
        _check(self._at == len(self._content), "it is longer than it says")


def _check(right: bool, message: str) -> None:
    if not right:
        raise _Refused(Answer.INVALID, message)
