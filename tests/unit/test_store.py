"""One contract for every store that is written to, and what only a local folder has to keep."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imager.errors import ImagerError, ObjectExists, ObjectMissing, UsageError
from imager.store import WriteStore, open_store
from imager.store.base import is_name
from imager.store.local import LocalStore

NAME = "packs/4f/4f1c.pack"


def make_local(folder: Path) -> WriteStore:
    return open_store(str(folder))


# Another kind of store is one line more here.
KINDS: dict[str, Callable[[Path], WriteStore]] = {"local": make_local}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> WriteStore:
    return KINDS[request.param](tmp_path / "repository")


# --- the contract -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 3_000_001])
def test_objects_come_back(store: WriteStore, length: int) -> None:
    content = random.Random(length).randbytes(length)
    store.create(NAME, content)
    assert store.read(NAME) == content
    assert store.size(NAME) == length


def test_ranges(store: WriteStore) -> None:
    content = bytes(range(256)) * 20
    store.create(NAME, content)
    for offset in (0, 1, 5000, 5119, 5120, 5121, 1 << 40):
        assert store.read(NAME, offset) == content[offset:]
        for length in (0, 1, 119, 120, 121, 10_000):
            assert store.read(NAME, offset, length) == content[offset : offset + length]


def test_large_objects_are_written_in_pieces(store: WriteStore) -> None:
    numbers = random.Random(1)
    pieces = [numbers.randbytes(numbers.randrange(200_000)) for _ in range(50)]
    with store.writer(NAME) as writer:
        for number, piece in enumerate(pieces):
            kinds: tuple[type, ...] = (bytes, bytearray, memoryview)
            writer.write(kinds[number % 3](piece))
        writer.commit()
    assert store.read(NAME) == b"".join(pieces)


def test_nothing_is_there_before_the_commit(store: WriteStore) -> None:
    with store.writer(NAME) as writer:
        writer.write(b"content")
        with pytest.raises(ObjectMissing):
            store.size(NAME)
        assert list(store.names("packs")) == []
        writer.commit()
        assert store.read(NAME) == b"content"


def test_without_a_commit_nothing_is_left(store: WriteStore) -> None:
    with store.writer(NAME) as writer:
        writer.write(b"content")
    with pytest.raises(ZeroDivisionError), store.writer(NAME) as writer:
        writer.write(b"content")
        raise ZeroDivisionError
    assert list(store.names("packs")) == []
    store.create(NAME, b"the name is free")


def test_discard_after_a_commit_is_harmless(store: WriteStore) -> None:
    with store.writer(NAME) as writer:
        writer.write(b"content")
        writer.commit()
        writer.discard()
    assert store.read(NAME) == b"content"


def test_create_only_if_absent(store: WriteStore) -> None:
    store.create(NAME, b"first")
    with pytest.raises(ObjectExists, match=NAME):
        store.create(NAME, b"second")
    with store.writer(NAME) as writer, pytest.raises(ObjectExists, match=NAME):
        writer.commit()
    assert store.read(NAME) == b"first"


def test_of_many_who_create_one_name_one_wins(store: WriteStore) -> None:
    winners: list[int] = []
    losers: list[int] = []
    start = threading.Barrier(8)

    def create(number: int) -> None:
        start.wait()
        try:
            store.create(NAME, b"%d" % number)
            winners.append(number)
        except ObjectExists:
            losers.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(losers)) == (1, 7)
    assert store.read(NAME) == b"%d" % winners[0]


def test_missing_is_told_apart(store: WriteStore) -> None:
    operations: list[Callable[[str], object]] = [store.read, store.size, store.delete]
    for operation in operations:
        with pytest.raises(ObjectMissing, match=NAME):
            operation(NAME)
    store.create("packs/4f", b"an object where others have a folder")
    for operation in operations:
        with pytest.raises(ObjectMissing, match=NAME):
            operation(NAME)


def test_deleted_objects_are_gone_and_their_names_free(store: WriteStore) -> None:
    store.create(NAME, b"first")
    store.delete(NAME)
    with pytest.raises(ObjectMissing):
        store.read(NAME)
    assert list(store.names("packs")) == []
    store.create(NAME, b"second")
    assert store.read(NAME) == b"second"


def test_names_are_those_below_the_folder_in_ascending_order(store: WriteStore) -> None:
    names = ["packs/00/b", "packs/00/a", "packs/ff/c", "packs/zz", "manifests/a", "packs-of/a"]
    for name in names:
        store.create(name, b"")
    assert list(store.names("packs")) == ["packs/00/a", "packs/00/b", "packs/ff/c", "packs/zz"]
    assert list(store.names("manifests")) == ["manifests/a"]
    assert list(store.names("nothing")) == []


def test_order_of_names_is_that_of_the_whole_name(store: WriteStore) -> None:
    """Object stores sort whole names, where "-" and "." come before "/"."""
    names = ["packs/a-b", "packs/a.b", "packs/a/x", "packs/a0"]
    for name in reversed(names):
        store.create(name, b"")
    assert list(store.names("packs")) == names


BAD_NAMES = ["", "/", "/etc/passwd", "../x", "a/../b", "a/..", "a//b", "a/", ".", ".git", "a/.b"]
BAD_NAMES += ["A", "a b", "ä", "a\n", "a\0b", "a\\b", "x" * 251]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_everywhere(store: WriteStore, name: str) -> None:
    assert not is_name(name)
    operations: list[Callable[[str], object]] = [
        store.read,
        store.size,
        store.delete,
        lambda name: list(store.names(name)),
        lambda name: store.create(name, b""),
        store.writer,
    ]
    for operation in operations:
        with pytest.raises(ImagerError, match="not a name"):
            operation(name)


# --- which store ------------------------------------------------------------------------------


def test_paths_and_file_urls_are_local(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}"):
        assert open_store(url).url == str(tmp_path)


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(UsageError, match="gopher"):
        open_store("gopher://host/images")


# --- local folders ----------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "repository")


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_foreign_files_are_not_listed(local: LocalStore) -> None:
    local.create("packs/a", b"")
    for name in ("Thumbs.db", ".DS_Store", "a b", "ä"):
        (local.folder / "packs" / name).touch()
    (local.folder / "packs" / "Sub").mkdir()
    (local.folder / "packs" / "Sub" / "b").touch()
    assert list(local.names("packs")) == ["packs/a"]


def test_a_crash_leaves_only_temporary_files(local: LocalStore) -> None:
    """A real process, killed between its last write and the commit."""
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from imager.store.local import LocalStore\n"
        f"with LocalStore(Path(sys.argv[1])).writer({NAME!r}) as writer:\n"
        "    writer.write(bytes(3 << 20))\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(local.folder)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    (left,) = files_of(local.folder)
    assert left.startswith("tmp/")
    assert list(local.names("packs")) == []
    local.create(NAME, b"again")
    assert local.read(NAME) == b"again"


def test_after_every_write_no_temporary_file_is_left(local: LocalStore) -> None:
    local.create(NAME, b"first")
    with pytest.raises(ObjectExists):
        local.create(NAME, b"second")
    with local.writer("packs/other") as writer:
        writer.write(b"third")
    assert files_of(local.folder) == [NAME]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_folders_without_hard_links(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """FAT and some network folders: the file is renamed, and still never replaces another."""

    def no_links(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_links)
    local.create(NAME, b"first")
    with pytest.raises(ObjectExists):
        local.create(NAME, b"second")
    assert local.read(NAME) == b"first"
    assert files_of(local.folder) == [NAME]


def test_objects_are_private(local: LocalStore) -> None:
    """They hold the disk's files, those of root too."""
    local.create(NAME, b"")
    assert (local.folder / NAME).stat().st_mode & 0o777 == 0o600


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def mount_tmpfs(tmp_path: Path, folder: Path) -> None:
    mount("-t", "tmpfs", "-o", "size=4m", "imager-test", folder)


def mount_ext4(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "ext4.img"
    with file.open("wb") as image:
        image.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(file)], check=True)
    mount("-o", "loop", file, folder)


@pytest.fixture(params=[mount_tmpfs, mount_ext4], ids=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted filesystem of 4 MiB."""
    if os.geteuid():
        pytest.skip("mounting a small filesystem needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    request.param(tmp_path, folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.loop
def test_a_full_filesystem_is_a_clear_error_and_leaves_nothing(small: Path) -> None:
    store = LocalStore(small / "repository")
    store.create("manifests/kept", b"kept")
    with pytest.raises(ImagerError, match="No space left") as raised, store.writer(NAME) as writer:
        for _ in range(8):
            writer.write(os.urandom(1 << 20))
        writer.commit()
    assert NAME in raised.value.message
    assert raised.value.hint is not None and "make room" in raised.value.hint
    assert files_of(store.folder) == ["manifests/kept"]
    store.create(NAME, bytes(1 << 20))  # the room is free again


@pytest.mark.loop
def test_a_read_only_filesystem_is_a_clear_error(small: Path) -> None:
    store = LocalStore(small / "repository")
    store.create(NAME, b"content")
    mount("-o", "remount,ro", small)
    operations: list[Callable[[], object]] = [
        lambda: store.create("packs/new", b""),
        lambda: store.delete(NAME),
    ]
    for operation in operations:
        with pytest.raises(ImagerError, match="Read-only") as raised:
            operation()
        assert raised.value.hint is not None
    assert store.read(NAME) == b"content"
