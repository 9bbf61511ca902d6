"""The NBD server, spoken to byte by byte by a client written from the protocol document."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from imager.blocksource import PartSource
from imager.errors import ImagerError, IntegrityError, UsageError
from imager.format import RECORD_HEADER_LENGTH
from imager.imagesource import ImageSource
from imager.repository import Repository
from imager.serve import ImageServer
from imager.serve.address import TcpAddress, parse_listen, uri
from tests.support.nbdclient import NbdClient, Refused
from tests.support.sources import MemorySource
from tests.unit.test_imagesource import BAD_SECTOR, CONTENT, SIZE, UNIT, make_image


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Exports ``disk``, and ``part``, a window of it."""
    folder = tmp_path_factory.mktemp("serve")
    Repository.create(str(folder / "repo"), block_size=UNIT)
    repository, disk = make_image(folder / "repo", bad={BAD_SECTOR})
    with ImageSource(repository, disk) as source:
        exports = {"disk": source, "part": PartSource(source, 4096, 10 * UNIT)}
        with ImageServer(exports, folder / "nbd"):
            yield folder / "nbd"


@pytest.mark.parametrize("structured", [False, True])
def test_reads_across_blocks(address: Path, structured: bool) -> None:
    with NbdClient(address, structured=structured) as client:
        info = client.go("disk")
        assert (info.size, info.block_sizes) == (SIZE, (1, 4096, 32 << 20))
        for offset, length in ((0, 1), (UNIT - 1, 2), (3, 9 * UNIT), (29 * UNIT, UNIT)):
            assert client.read(offset, length) == CONTENT[offset : offset + length]


def test_a_window(address: Path) -> None:
    with NbdClient(address) as client:
        assert client.go("part").size == 10 * UNIT
        assert client.read(UNIT, 2 * UNIT) == CONTENT[4096 + UNIT :][: 2 * UNIT]


# --- the handshake -------------------------------------------------------------------------------


def test_the_list_has_all_and_the_empty_name_is_the_first(address: Path) -> None:
    with NbdClient(address) as client:
        assert client.names() == ["disk", "part"]
        info = client.go("", option=6)
        assert (info.size, info.texts) == (SIZE, {1: "disk"})
        assert info.flags & 1 and info.flags & 2 and info.flags & 256  # flags, read-only, multi


def test_a_refused_option_is_not_the_end(address: Path) -> None:
    with NbdClient(address, structured=False) as client:
        for number, option, content in (
            (6, 7, struct.pack(">I", 4) + b"none" + bytes(2)),
            (3, 7, struct.pack(">I", 99) + b"part"),
            (3, 7, struct.pack(">I", 4) + b"disk" + bytes(3)),
            (3, 7, struct.pack(">I", 4) + b"\xff\xfe\xfd\xfc" + bytes(2)),
            (3, 3, b"too much"),
            (3, 10, struct.pack(">I", 4) + b"disk" + bytes(4)),  # before structured replies
            (2, 5, b""),  # no certificate
            (1, 4711, b"what"),
            (9, 4711, bytes(100_000)),
        ):
            with pytest.raises(Refused) as refused:
                client.option(option, content)
            assert refused.value.number == number
        assert client.go("disk").size == SIZE
        assert client.read(0, 512) == CONTENT[:512]


@pytest.mark.parametrize("no_zeroes", [False, True])
def test_the_old_way(address: Path, no_zeroes: bool) -> None:
    with NbdClient(address, structured=False, no_zeroes=no_zeroes) as client:
        client.send_option(1, b"disk")
        size, _ = struct.unpack(">QH", client.take(10))
        assert size == SIZE
        if not no_zeroes:
            assert client.take(124) == bytes(124)
        assert client.read(UNIT, 100) == CONTENT[UNIT : UNIT + 100]
    with NbdClient(address, structured=False) as client:
        client.send_option(1, b"none")
        with pytest.raises(EOFError):
            client.take(1)


def test_abort_is_answered(address: Path) -> None:
    with NbdClient(address) as client:
        assert client.option(2) == []
        with pytest.raises(EOFError):
            client.take(1)


# --- requests ------------------------------------------------------------------------------------


def test_block_status_is_what_is_stored(address: Path) -> None:
    with NbdClient(address) as client:
        assert client.meta_context("disk", option=9) == ["base:allocation"]
        assert client.meta_context("disk", "base:", option=9) == ["base:allocation"]
        assert client.meta_context("disk", "qemu:dirty-bitmap:x") == []
        assert client.meta_context("disk", "base:allocation") == ["base:allocation"]
        client.go("disk")
        extents = client.block_status(0, SIZE)
        at = 0
        for length, status in extents:
            assert status in (0, 3)
            if status:
                assert not any(CONTENT[at : at + length])
            at += length
        assert at == SIZE and {status for _, status in extents} == {0, 3}
        assert client.block_status(0, SIZE, flags=8) == extents[:1]


def test_block_status_must_be_agreed_on_for_that_export(address: Path) -> None:
    with NbdClient(address) as client:
        client.meta_context("part", "base:allocation")
        client.go("disk")
        with pytest.raises(Refused, match="22"):
            client.block_status(0, UNIT)


@pytest.mark.parametrize("structured", [False, True])
def test_wrong_requests_are_answered(address: Path, structured: bool) -> None:
    with NbdClient(address, structured=structured) as client:
        client.go("disk")
        for number, command, offset, length, flags, content in (
            (1, 1, 0, 512, 0, b"x" * 512),  # write
            (1, 4, 0, 512, 0, b""),  # trim
            (1, 6, 0, 512, 0, b""),  # write zeroes
            (22, 0, SIZE - 1, 2, 0, b""),
            (22, 0, 1 << 63, 2, 0, b""),
            (22, 0, (1 << 64) - 1, 2, 0, b""),
            (22, 0, 0, 0, 0, b""),
            (22, 0, 0, 512, 1 << 12, b""),
            (22, 99, 0, 512, 0, b""),
        ):
            with pytest.raises(Refused) as refused:
                client.call(command, offset, length, flags=flags, content=content)
            assert refused.value.number == number
        client.call(3)  # flush
        client.call(5, 0, UNIT)  # cache
        assert client.read(0, UNIT) == CONTENT[:UNIT]


@pytest.mark.parametrize("flags", [0, 4])
def test_what_was_unreadable_names_its_byte(address: Path, flags: int) -> None:
    bad = BAD_SECTOR * 512
    with NbdClient(address) as client:
        client.go("disk")
        with pytest.raises(Refused) as refused:
            client.read(bad - 2 * UNIT, 3 * UNIT, flags=flags)
        assert (refused.value.number, refused.value.offset) == (5, bad)
        assert client.read(bad - UNIT, UNIT, flags=flags) == CONTENT[bad - UNIT : bad]


# --- clients that misbehave ----------------------------------------------------------------------


def test_noise_ends_only_its_own_connection(address: Path) -> None:
    chance = random.Random(11)
    for n in range(60):
        with NbdClient(address, structured=n % 2 == 0) as client:
            if n % 3:
                client.go("disk")
                client.send_request(0, 0, UNIT)
            client.socket.sendall(chance.randbytes(chance.choice((1, 27, 28, 500))))
            if n % 5:  # else it just goes
                with pytest.raises((EOFError, ConnectionError)):  # reset, with our bytes unread
                    client.hang_up()
                    client.take(100 * UNIT)
    with NbdClient(address) as client:
        client.go("disk")
        assert client.read(0, UNIT) == CONTENT[:UNIT]


def test_who_never_reads_or_never_speaks_holds_up_nobody(address: Path) -> None:
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(NbdClient(address))
            silent = stack.enter_context(NbdClient(address))
            silent.go("disk")
            for _ in range(16):  # more might not fit into the socket: nobody takes them
                silent.send_request(0, 0, 20 * UNIT)
        with NbdClient(address) as client:
            client.go("disk")
            assert client.read(0, 20 * UNIT) == CONTENT[: 20 * UNIT]


def test_sixteen_clients_at_once(address: Path) -> None:
    def read_all(seed: int) -> None:
        chance = random.Random(seed)
        with NbdClient(address, structured=seed % 2 == 0) as client:
            client.go("disk")
            for _ in range(40):
                offset = chance.randrange(29 * UNIT)
                length = chance.randrange(1, UNIT)
                assert client.read(offset, length) == CONTENT[offset : offset + length]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read_all, range(16)))


def test_it_ends_with_clients_connected(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # some of another server may just be ending
    with ImageServer({"x": MemorySource(CONTENT)}, tmp_path / "nbd") as server:
        clients = [NbdClient(tmp_path / "nbd") for _ in range(3)]
        clients[0].go("x")
        assert clients[0].read(5, UNIT) == CONTENT[5 : 5 + UNIT]
        assert server.clients == 3
    assert set(threading.enumerate()) <= before
    assert not (tmp_path / "nbd").exists()
    for client in clients:
        client.socket.close()


# --- what is damaged -----------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_a_flipped_bit_is_an_error_there_and_only_there(tmp_path: Path, structured: bool) -> None:
    Repository.create(str(tmp_path / "repo"), block_size=UNIT)
    repository, disk = make_image(tmp_path / "repo")
    block = next(run for run in repository.block_map(disk).runs(5) if run.place is not None)
    assert block.place is not None
    pack = repository.pack(block.place.pack)
    path = tmp_path / "repo" / pack.name
    content = bytearray(path.read_bytes())
    place = pack.offsets[block.place.ordinal] + RECORD_HEADER_LENGTH
    content[place + pack.entries[block.place.ordinal].frame_length // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)

    bad = range(block.first * UNIT, (block.first + 1) * UNIT)
    others = {run.first for run in repository.block_map(disk).runs() if run.digest == block.digest}
    told = []
    with (
        ImageSource(Repository.open(str(tmp_path / "repo")), disk) as source,
        ImageServer(
            {"d": source}, tmp_path / "nbd", on_error=lambda name, error: told.append(error)
        ),
        NbdClient(tmp_path / "nbd", structured=structured) as client,
    ):
        client.go("d")
        for number in range(SIZE // UNIT):
            if number in others:
                with pytest.raises(Refused) as refused:
                    client.read(number * UNIT, UNIT)
                assert refused.value.number == 5
            else:
                wanted = CONTENT[number * UNIT : (number + 1) * UNIT]
                assert client.read(number * UNIT, UNIT) == wanted
        with pytest.raises(Refused) as refused:
            client.read(bad.start - UNIT, 3 * UNIT)
        assert refused.value.offset == (bad.start if structured else None)
        with pytest.raises(Refused):
            client.read(bad.stop - 1, 1)
        assert client.read(bad.stop, 1) == CONTENT[bad.stop : bad.stop + 1]
    assert all(isinstance(error, IntegrityError) for error in told) and told


# --- addresses -----------------------------------------------------------------------------------


def test_addresses(tmp_path: Path) -> None:
    assert parse_listen("") == TcpAddress("127.0.0.1", 10809)
    assert parse_listen("[::1]:99") == TcpAddress("::1", 99)
    assert parse_listen("::1") == TcpAddress("::", 1) or parse_listen("[::1]").port == 10809
    assert str(parse_listen("[::1]:99")) == "[::1]:99"
    assert [parse_listen(f"{host}:1").is_local for host in ("127.0.0.9", "10.0.0.1", "a.b")] == [
        *(True, False, False)
    ]
    with pytest.raises(UsageError):
        parse_listen("host:99999")
    assert uri(TcpAddress("::1", 7), "a b/c", tls=True) == "nbds://[::1]:7/a%20b/c"
    assert uri(tmp_path / "x", "d") == f"nbd+unix:///d?socket={tmp_path}/x"


def test_others_may_not_listen_in() -> None:
    with pytest.raises(UsageError, match="TLS"):
        ImageServer({"x": MemorySource(CONTENT)}, TcpAddress("0.0.0.0", 0))


def test_a_socket_that_is_left_over_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "nbd"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    exports = {"x": MemorySource(CONTENT)}
    with ImageServer(exports, path):
        with pytest.raises(ImagerError, match="another server"):
            ImageServer(exports, path)
        with NbdClient(path) as client:
            assert client.names() == ["x"]
    path.write_text("mine")
    with pytest.raises(UsageError, match="no socket"):
        ImageServer(exports, path)
    assert path.read_text() == "mine"
