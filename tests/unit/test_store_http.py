"""Stores that are only read: a web server, and volumes as one. With a real server."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.errors import ImagerError, ObjectMissing, UsageError
from imager.repository import Repository
from imager.store import open_store
from imager.store.http import HttpStore, _entries
from imager.store.local import LocalStore
from imager.store.union import UnionStore, VolumeMissing
from tests.support.commandline import imager
from tests.support.httpserver import FileServer, file_server, range_server

NAME = "packs/4f/4f1c.pack"
CONTENT = random.Random(1).randbytes(3_000_001)
QUICK = (0.0, 0.0, 0.0)


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "repository")
    store.create(NAME, CONTENT)
    return store


@pytest.fixture(params=[True, False], ids=["ranges", "no-ranges"])
def server(request: pytest.FixtureRequest, local: LocalStore) -> Iterator[FileServer]:
    with file_server(local.folder, ranges=request.param) as running:
        yield running


def quick(server: FileServer) -> HttpStore:
    return HttpStore(server.url, timeout_seconds=5, pauses_seconds=QUICK)


def test_ranges(server: FileServer) -> None:
    store = quick(server)
    assert store.read(NAME) == CONTENT
    assert store.size(NAME) == len(CONTENT)
    for offset in (0, 1, 4096, len(CONTENT) - 1, len(CONTENT), len(CONTENT) + 1, 1 << 40):
        assert store.read(NAME, offset) == CONTENT[offset:]
        for length in (0, 1, 100, 2_000_000, 10_000_000):
            assert store.read(NAME, offset, length) == CONTENT[offset : offset + length]


def test_one_connection_serves_many_requests(local: LocalStore) -> None:
    with file_server(local.folder) as server:
        store = quick(server)
        for offset in range(20):
            store.read(NAME, offset, 10)
        assert (len(server.requests), server.connections) == (20, 1)


def test_failures_that_pass_are_tried_again(server: FileServer) -> None:
    for failures in ([503], [500, 429], [0], [0, 0, 502]):
        server.failures = list(failures)
        assert quick(server).read(NAME, 1, 2_000_000) == CONTENT[1:2_000_001]
        assert not server.failures


def test_failures_that_stay_are_told(server: FileServer) -> None:
    server.failures = [503] * 4
    with pytest.raises(ImagerError, match="HTTP status 503") as raised:
        quick(server).read(NAME)
    assert raised.value.hint is not None
    server.failures = [418]
    with pytest.raises(ImagerError, match="418"):
        quick(server).read(NAME)


def test_no_server_is_an_error() -> None:
    store = HttpStore("http://127.0.0.1:1/images", timeout_seconds=1, pauses_seconds=QUICK)
    with pytest.raises(ImagerError, match=r"127\.0\.0\.1:1/images/.*refused"):
        store.read(NAME)


def test_missing_is_told_apart(server: FileServer) -> None:
    for operation in (quick(server).read, quick(server).size):
        with pytest.raises(ObjectMissing, match="packs/aa/aa"):
            operation("packs/aa/aa.pack")


def test_names_from_the_servers_lists(server: FileServer, local: LocalStore) -> None:
    for name in ("packs/a-b", "packs/a/x", "manifests/a.json"):
        local.create(name, b"")
    for foreign in ("packs/Thumbs.db", "packs/a b", "packs/.hidden"):
        (local.folder / foreign).touch()
    store = quick(server)
    for folder in ("packs", "manifests", "nothing"):
        assert list(store.names(folder)) == list(local.names(folder))


def test_names_from_a_listing(local: LocalStore) -> None:
    (local.folder / "listing.txt").write_text(f"{NAME}\n../secret\nmanifests/a.json\n\nA B\n")
    with file_server(local.folder, lists=False) as server:
        assert list(quick(server).names("packs")) == [NAME]
        assert list(quick(server).names("manifests")) == ["manifests/a.json"]


def test_no_list_is_a_clear_error(local: LocalStore) -> None:
    with (
        file_server(local.folder, lists=False) as server,
        pytest.raises(ImagerError, match="does not list") as raised,
    ):
        list(quick(server).names("packs"))
    assert raised.value.hint is not None and "listing.txt" in raised.value.hint


def test_lists_of_common_servers() -> None:
    """Apache and nginx; absolute links, links elsewhere, links that sort the list."""
    page = b"""<a href="?C=N;O=D">Name</a> <A HREF="/images/">Parent</A> <a href="../">../</a>
    <a href="4f/">4f/</a> <a href='/images/packs/aa/'>aa</a> <a href="x%2d1.pack">x</a>
    <a href="http://elsewhere/images/packs/evil">e</a> <a href="4f/deep">d</a> <a name="n">"""
    found = list(_entries(page, "/images/packs/"))
    assert found[:3] == ["4f/", "aa/", "x-1.pack"]
    assert "4f/deep" not in found


def test_passwords_are_used_and_not_shown(local: LocalStore) -> None:
    with file_server(local.folder, login="Basic bWU6c2VjcmV0") as server:
        place = server.url.removeprefix("http://")
        store = open_store(f"http://me:secret@{place}")
        assert store.read(NAME) == CONTENT
        assert store.url == server.url
        with pytest.raises(ImagerError, match="login") as raised:
            quick(server).read(NAME)
        assert "secret" not in f"{raised.value.message} {raised.value.hint}"


@pytest.mark.parametrize("url", ["http://", "http:///x", "http://h:x/", "http://h/?a=b"])
def test_bad_addresses_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="not the address"):
        open_store(url)


def test_it_can_only_be_read(server: FileServer) -> None:
    store = open_store(server.url)
    for operation in (store.delete, store.writer, lambda name: store.create(name, b"")):
        with pytest.raises(UsageError, match="only be read"):
            operation(NAME)


def test_many_threads(local: LocalStore) -> None:
    with file_server(local.folder) as server:
        store, wrong = quick(server), []

        def read(seed: int) -> None:
            for _ in range(20):
                offset = random.Random(seed).randrange(len(CONTENT))
                if store.read(NAME, offset, 5000) != CONTENT[offset : offset + 5000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


# --- the command line over HTTP -----------------------------------------------------------------


def test_all_commands_that_read(tmp_path: Path) -> None:
    disk, folder, target = tmp_path / "disk", tmp_path / "images", tmp_path / "target"
    disk.write_bytes(random.Random(2).randbytes(3 << 20) + bytes(1 << 20))
    imager("capture", disk, "--repo", folder, "--init", "--name", "web")
    with range_server(folder) as url:
        (image,) = Repository.open(url).image_ids()
        assert image in imager("list", "--repo", url).out
        assert image in imager("show", image, "--repo", url).out
        imager("verify", "--repo", url)
        target.touch()
        imager("plan", image, target, "--repo", url)
        imager("restore", image, target, "--repo", url, "--yes")
        assert target.read_bytes() == disk.read_bytes()
        refused = imager("capture", disk, "--repo", url, "--name", "web", code=2)
        assert "can only be read" in refused.err


# --- volumes ------------------------------------------------------------------------------------


def test_volumes_are_one_store(tmp_path: Path) -> None:
    first, second = LocalStore(tmp_path / "1"), LocalStore(tmp_path / "2")
    for store, name in ((first, "packs/a"), (second, "packs/b")):
        store.create(name, name.encode())
        store.create("repository.json", b"{}")
    union = UnionStore([first, second])
    assert union.read("packs/b", 1, 3) == b"ack"
    assert union.size("packs/a") == 7
    assert list(union.names("packs")) == ["packs/a", "packs/b"]
    with pytest.raises(VolumeMissing, match="packs/c") as raised:
        union.read("packs/c")
    assert raised.value.name == "packs/c"
    with pytest.raises(UsageError, match="only be read"):
        union.create("packs/c", b"")


def test_the_next_volume_is_asked_for(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    asked: list[str] = []

    def insert(name: str) -> bool:
        asked.append(name)
        if len(asked) == 2:  # the wrong one came first
            store.create(name, b"content")
        return len(asked) < 3

    union = UnionStore([store], insert)
    assert union.read("packs/a") == b"content"
    assert asked == ["packs/a", "packs/a"]
    with pytest.raises(VolumeMissing):
        union.size("packs/b")
