"""An NBD client for tests, written from doc/proto.md of the NBD project: plain, and able to send
what no client should.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

SECONDS = 60


class Refused(Exception):
    """The server's error answer: ``number`` of the option reply or of the request's error, the
    message, and the byte that a structured error names."""

    def __init__(self, number: int, message: str = "", offset: int | None = None) -> None:
        super().__init__(f"{number}: {message}")
        self.number, self.message, self.offset = number, message, offset


class Info(NamedTuple):
    size: int
    flags: int
    block_sizes: tuple[int, int, int] | None
    texts: dict[int, str]


class NbdClient:
    def __init__(self, address: Path, *, structured: bool = True, no_zeroes: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SECONDS)
        self.socket.connect(str(address))
        self.structured = False
        self._cookie = 0
        magic, options, self.server_flags = struct.unpack(">8s8sH", self.take(18))
        assert (magic, options) == (b"NBDMAGIC", b"IHAVEOPT")
        self.no_zeroes = no_zeroes
        self.socket.sendall(struct.pack(">I", 1 | 2 * no_zeroes))
        if structured:
            assert self.option(8) == []
            self.structured = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def take(self, length: int) -> bytes:
        """Raises EOFError when the server hangs up."""
        content = b""
        while len(content) < length:
            part = self.socket.recv(length - len(content))
            if not part:
                raise EOFError
            content += part
        return content

    def hang_up(self) -> None:
        """Send no more, but go on to listen."""
        with suppress(OSError):  # the server was quicker
            self.socket.shutdown(socket.SHUT_WR)

    # --- options ---

    def send_option(self, option: int, content: bytes = b"") -> None:
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(content)) + content)

    def option(self, option: int, content: bytes = b"") -> list[tuple[int, bytes]]:
        """Answers before the acknowledgement. Raises Refused."""
        self.send_option(option, content)
        answers = []
        while True:
            magic, about, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, about) == (0x3E889045565A9, option)
            body = self.take(length)
            if kind == 1:
                return answers
            if kind >> 31:
                raise Refused(kind - (1 << 31), body.decode())
            answers.append((kind, body))

    def go(self, name: str, *, option: int = 7) -> Info:
        raw = name.encode()
        wanted = struct.pack(">HHHH", 3, 1, 2, 3)
        size = flags = -1
        blocks, texts = None, {}
        for kind, body in self.option(option, struct.pack(">I", len(raw)) + raw + wanted):
            assert kind == 3
            (info,) = struct.unpack(">H", body[:2])
            if info == 0:
                size, flags = struct.unpack(">QH", body[2:])
            elif info == 3:
                blocks = struct.unpack(">III", body[2:])
            else:
                texts[info] = body[2:].decode()
        return Info(size, flags, blocks, texts)

    def names(self) -> list[str]:
        answers = self.option(3)
        return [body[4 : 4 + struct.unpack(">I", body[:4])[0]].decode() for _, body in answers]

    def meta_context(self, export: str, *queries: str, option: int = 10) -> list[str]:
        texts = [export.encode(), *(query.encode() for query in queries)]
        body = struct.pack(">I", len(texts[0])) + texts[0] + struct.pack(">I", len(queries))
        body += b"".join(struct.pack(">I", len(text)) + text for text in texts[1:])
        return [answer[4:].decode() for _, answer in self.option(option, body)]

    # --- requests ---

    def send_request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        content: bytes = b"",
        magic: int = 0x25609513,
    ) -> int:
        """The request's cookie."""
        self._cookie += 1
        header = struct.pack(">IHHQQI", magic, flags, command, self._cookie, offset, length)
        self.socket.sendall(header + content)
        return self._cookie

    def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        """Raises Refused."""
        cookie = self.send_request(0, offset, length, flags=flags)
        if not self.structured:
            return self._simple(cookie, length)
        content = bytearray(length)
        done = 0
        while True:
            last, kind, body = self._chunk(cookie)
            if kind == 1:
                (at,) = struct.unpack(">Q", body[:8])
                content[at - offset : at - offset + len(body) - 8] = body[8:]
                done += len(body) - 8
            elif kind == 2:
                done += struct.unpack(">QI", body)[1]
            if last:
                assert done == length == len(content)
                return bytes(content)

    def call(self, command: int, offset: int = 0, length: int = 0, **more: int | bytes) -> bytes:
        """A request with a short answer. Raises Refused."""
        cookie = self.send_request(command, offset, length, **more)  # type: ignore[arg-type]
        if not self.structured:
            return self._simple(cookie, 0)
        last, _, body = self._chunk(cookie)
        assert last
        return body

    def block_status(self, offset: int, length: int, *, flags: int = 0) -> list[tuple[int, int]]:
        body = self.call(7, offset, length, flags=flags)
        return [struct.unpack(">II", body[at : at + 8]) for at in range(4, len(body), 8)]

    def _simple(self, cookie: int, length: int) -> bytes:
        magic, error, about = struct.unpack(">IIQ", self.take(16))
        assert (magic, about) == (0x67446698, cookie)
        if error:
            raise Refused(error)
        return self.take(length)

    def _chunk(self, cookie: int) -> tuple[bool, int, bytes]:
        magic, flags, kind, about, length = struct.unpack(">IHHQI", self.take(20))
        assert (magic, about) == (0x668E33EF, cookie)
        body = self.take(length)
        if kind >> 15:
            number, size = struct.unpack(">IH", body[:6])
            rest = body[6 + size :]
            offset = struct.unpack(">Q", rest)[0] if rest else None
            raise Refused(number, body[6 : 6 + size].decode(), offset)
        return bool(flags & 1), kind, body
