"""A repository behind a web server, to read from (RFC 9110, ranges: its chapter 14).

A plain file server is enough. Which objects there are is read from ``listing.txt`` beside
``repository.json`` if there is one (a name per line), else from the server's own lists of folders
in HTML. Failures that may pass (transport, 408, 429, 5xx) are tried again, later and later.
"""

from __future__ import annotations

import base64
import http.client
import netrc
import re
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from ssl import SSLCertVerificationError, create_default_context
from typing import NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit

from imager.errors import ImagerError, ObjectMissing, UsageError
from imager.store.base import ReadOnly, check_name, is_name

LISTING = "listing.txt"

_TIMEOUT_SECONDS = 30.0
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
_CHUNK_SIZE = 1 << 20
_MAX_LIST_SIZE = 64 << 20
_MAX_OBJECT_SIZE = 4 << 30  # packs are smaller
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")


class _Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    content: bytes


class _Broken(Exception):
    """The answer was cut off or makes no sense; it is asked for again."""


class HttpStore(ReadOnly):
    """Several threads may read at the same time; each answer has a connection of its own."""

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        pauses_seconds: tuple[float, ...] = _PAUSES_SECONDS,
    ) -> None:
        """Raises UsageError for an address that can't be one."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise UsageError(f"not the address of a repository: {_without_password(url)}")
        self._host, self._port = parts.hostname, port
        self._path = quote(parts.path.rstrip("/"), safe="/%")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        place = host if port is None else f"{host}:{port}"
        self.url = f"{parts.scheme}://{place}{self._path}"
        self._tls = create_default_context() if parts.scheme == "https" else None
        self._timeout = timeout_seconds
        self._pauses = pauses_seconds
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "imager"}
        login = _login(parts.username, parts.password, parts.hostname)
        if login is not None:
            self._headers["Authorization"] = login
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._listing: list[str] | None = None

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        check_name(name)
        if length == 0:
            self.size(name)
            return b""
        if length is None and not offset:
            return self._ask("GET", name).content
        last = "" if length is None else str(offset + length - 1)
        answer = self._ask("GET", name, wanted=(offset, length), extent=f"bytes={offset}-{last}")
        return answer.content

    def size(self, name: str) -> int:
        text = self._ask("HEAD", check_name(name)).headers.get("Content-Length", "")
        if not text.isascii() or not text.isdigit() or len(text) > 19:
            raise ImagerError(f"{self.url}/{name}: the server does not tell its length")
        return int(text)

    def names(self, folder: str) -> Iterator[str]:
        check_name(folder)
        if self._listing is None:
            self._listing = self._read_listing()
        listed = self._listing or list(self._walk(folder))
        yield from sorted(name for name in listed if name.startswith(f"{folder}/"))

    # --- lists ---

    def _read_listing(self) -> list[str]:
        try:
            content = self._ask("GET", LISTING, limit=_MAX_LIST_SIZE).content
        except ObjectMissing:
            return []
        lines = (line.strip() for line in content.decode(errors="replace").splitlines())
        return sorted({line for line in lines if is_name(line)})

    def _walk(self, folder: str) -> Iterator[str]:
        """Names below a folder, by the server's lists. Names get longer, so it comes to an end."""
        try:
            answer = self._ask("GET", f"{folder}/", limit=_MAX_LIST_SIZE)
        except ObjectMissing:
            return
        if "html" not in answer.headers.get("Content-Type", ""):
            raise self._no_list(folder)
        for entry in _entries(answer.content, f"{self._path}/{folder}/"):
            name = f"{folder}/{entry.rstrip('/')}"
            if not is_name(name):
                continue
            if entry.endswith("/"):
                yield from self._walk(name)
            else:
                yield name

    def _no_list(self, folder: str) -> ImagerError:
        return ImagerError(
            f"{self.url}/{folder}/: the server does not list what is in it",
            hint="let it list folders (autoindex); or, in the repository's folder, run: "
            f"find manifests packs -type f | sort > {LISTING}",
        )

    # --- one request ---

    def _ask(
        self,
        method: str,
        name: str,
        *,
        extent: str | None = None,
        wanted: tuple[int, int | None] = (0, None),
        limit: int = _MAX_OBJECT_SIZE,
    ) -> _Answer:
        """An answer of success, or what ``_failure`` makes of another."""
        headers = self._headers | ({} if extent is None else {"Range": extent})

        def exchange(connection: http.client.HTTPConnection) -> tuple[_Answer, bool]:
            connection.request(method, f"{self._path}/{name}", headers=headers)
            response = connection.getresponse()
            content = b""
            if response.status in (200, 206) and method != "HEAD":
                content = _body(response, wanted, limit)
            else:
                response.read(_CHUNK_SIZE)
            answer = _Answer(response.status, response.headers, content)
            return answer, response.isclosed() and not response.will_close

        answer = self._try(exchange, name)
        if answer.status == 416 and extent is not None:
            return answer._replace(content=b"")
        if answer.status not in (200, 206):
            raise self._failure(name, answer)
        return answer

    def _try(
        self, exchange: Callable[[http.client.HTTPConnection], tuple[_Answer, bool]], name: str
    ) -> _Answer:
        where = f"{self.url}/{name}"
        said = ""
        for pause in (0.0, *self._pauses):
            time.sleep(pause)
            connection = self._connection()
            reusable = False
            try:
                answer, reusable = exchange(connection)
            except SSLCertVerificationError as error:
                raise ImagerError(
                    f"{where}: the server's certificate is not trusted: {error.verify_message}"
                ) from None
            except (OSError, http.client.HTTPException, _Broken) as error:
                said = str(error) or type(error).__name__
                self._drop_idle()  # the others of the same age may be dead too
                continue
            finally:
                self._give_back(connection, reusable)
            if answer.status not in _TRY_AGAIN:
                return answer
            said = f"HTTP status {answer.status}"
        raise ImagerError(
            f"{where} can't be read: {said}",
            hint="check the network and the server, then run the command again",
        )

    def _failure(self, name: str, answer: _Answer) -> ImagerError:
        where = f"{self.url}/{name}"
        if answer.status in (404, 410):
            return ObjectMissing(f"{where} is missing")
        if answer.status in (401, 407):
            return ImagerError(
                f"{where}: the server wants a login",
                hint="put it into ~/.netrc, or into the address: https://USER:PASSWORD@HOST/…",
            )
        if answer.status == 403 and name.endswith("/"):
            return self._no_list(name.rstrip("/"))
        if 300 <= answer.status < 400:
            target = _without_password(answer.headers.get("Location", "elsewhere"))
            return ImagerError(f"{where} is redirected to {target}", hint="name that address")
        return ImagerError(f"{where}: HTTP status {answer.status}")

    # --- connections ---

    def _connection(self) -> http.client.HTTPConnection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        if self._tls is not None:
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=self._timeout, context=self._tls
            )
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)

    def _give_back(self, connection: http.client.HTTPConnection, reusable: bool) -> None:
        if not reusable:
            connection.close()
            return
        with self._lock:
            self._idle.append(connection)

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _body(response: http.client.HTTPResponse, wanted: tuple[int, int | None], limit: int) -> bytes:
    """What was wanted of the answer's content. Raises _Broken when it is cut off.

    A server that ignores ranges sends all of the object: what comes before is read and dropped.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _Broken("the server packs what was asked for as it is")
    offset, length = wanted
    if response.status == 206:
        found = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != offset:
            raise _Broken("the server sends another range than was asked for")
        offset = 0
    for _ in _chunks(response, offset):
        pass
    content = b"".join(_chunks(response, limit + 1 if length is None else length))
    if len(content) > limit:
        raise _Broken(f"more than {limit} bytes")
    if response.length and len(content) != length:
        raise _Broken("the connection ended in the middle")
    return content


def _chunks(response: http.client.HTTPResponse, length: int) -> Iterator[bytes]:
    while length and (chunk := response.read(min(length, _CHUNK_SIZE))):
        length -= len(chunk)
        yield chunk


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += (value for key, value in attrs if key == "href" and value)


def _entries(page: bytes, folder: str) -> Iterator[str]:
    """What a folder's HTML list links to right below the folder; folders end with a slash."""
    parser = _Links()
    parser.feed(page.decode(errors="replace"))
    for link in dict.fromkeys(parser.found):
        try:
            path = unquote(urlsplit(urljoin(folder, link)).path)
        except ValueError:
            continue
        entry = path.removeprefix(unquote(folder))
        if entry != path and entry and "/" not in entry[:-1]:
            yield entry


def _login(user: str | None, password: str | None, host: str) -> str | None:
    """Value of the Authorization header: from the address, else from ~/.netrc."""
    if user is None:
        try:
            found = netrc.netrc().authenticators(host)
        except (OSError, netrc.NetrcParseError):
            found = None
        if found is None:
            return None
        user, _, password = found
    else:
        user, password = unquote(user), unquote(password or "")
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)
