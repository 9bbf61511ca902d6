"""A web server for files, on 127.0.0.1 only, that can do ranges, and fail when it is told to."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileServer(ThreadingHTTPServer):
    """``failures``: statuses for the next requests, 0 cuts the answer off in the middle."""

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool, lists: bool, login: str | None) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.ranges = ranges
        self.lists = lists
        self.login = login
        self.failures: list[int] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def answer(self, *, with_content: bool) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, asked))
        failure = self.server.failures.pop(0) if self.server.failures else None
        if failure:
            self.send_error(failure)
            return
        if self.server.login and self.headers.get("Authorization") != self.server.login:
            self.send_error(HTTPStatus.UNAUTHORIZED)
            return
        file = Path(self.translate_path(self.path))
        if file.is_dir():
            self.send_folder(file)
            return
        if not file.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_part(file, asked if self.server.ranges else None, with_content, failure == 0)

    def send_folder(self, folder: Path) -> None:
        if not self.server.lists:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        listing = self.list_directory(str(folder))
        assert isinstance(listing, io.BytesIO)
        self.wfile.write(listing.getvalue())

    def send_part(self, file: Path, asked: str | None, with_content: bool, cut: bool) -> None:
        size = file.stat().st_size
        first, end = 0, size
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        if found:
            first = int(found[1])
            end = min(int(found[2]) + 1, size) if found[2] else size
            if first >= size:
                self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if found else HTTPStatus.OK)
        if found:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - first))
        self.end_headers()
        if not with_content:
            return
        if cut:
            end = first + (end - first) // 2
            self.close_connection = True
        with file.open("rb") as source:
            source.seek(first)
            while first < end and (chunk := source.read(min(end - first, 1 << 20))):
                try:
                    self.wfile.write(chunk)
                except ConnectionError:
                    self.close_connection = True
                    return
                first += len(chunk)


@contextmanager
def file_server(
    folder: Path, *, ranges: bool = True, lists: bool = True, login: str | None = None
) -> Iterator[FileServer]:
    """The server itself, to be told to fail; ``login``: the Authorization header it wants."""
    with FileServer(folder, ranges=ranges, lists=lists, login=login) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def range_server(folder: Path) -> Iterator[str]:
    """A folder's address."""
    with file_server(folder) as server:
        yield server.url
