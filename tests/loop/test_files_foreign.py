"""The readers of NTFS, FAT and exFAT beside what was written with their own tools."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.errors import ImagerError
from imager.files.foreign import ExfatReader, FatReader, ForeignReader, NtfsReader
from imager.files.tree import Found, walk
from imager.process import run
from tests.loop import test_allocation_exfat as exfat
from tests.loop import test_allocation_ntfs as ntfs
from tests.loop.allocation_lab import damaged
from tests.loop.files_lab import reading
from tests.support.disks import MIB, make_sparse, needs_loop

pytestmark = needs_loop

Files = dict[str, bytes | None]
"""Content by path; None for folders."""


def fill(folder: Path) -> Files:
    """Names and sizes of all kinds, some deleted; what is left."""
    chance = random.Random(7)
    written: Files = {}
    for n in range(60):
        path = f"folder {n % 5}/ünter/a longer file name {n}.txt"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        content = chance.randbytes(int(300_000 * chance.random() ** 4))
        (folder / path).write_bytes(content)
        written[path] = content
    for path in list(written)[::4]:
        (folder / path).unlink()
        del written[path]
    (folder / "SHORT.TXT").write_bytes(b"short")
    (folder / "empty").touch()
    written |= {"SHORT.TXT": b"short", "empty": b""}
    (folder / "many").mkdir()
    for n in range(300):
        (folder / "many" / f"{'name' * 12}{n}").touch()
        written[f"many/{'name' * 12}{n}"] = b""
    for path in list(written):
        for parent in Path(path).parents[:-1] if "/" in path else ():
            written[str(parent)] = None
    return written


def by_reader(reader: ForeignReader) -> Files:
    found: Files = {}
    for path, entry in walk(reader, Found("", reader.top())):
        content = None
        if entry.is_file:
            whole = bytearray(entry.size)
            for offset, piece in reader.pieces(entry):
                whole[offset : offset + len(piece)] = piece
            content = bytes(whole)
        found[path.removeprefix("/")] = content
    return found


def test_ntfs(tmp_path: Path) -> None:
    """Resident and not, sparse and compressed files, hard links and times."""
    image = make_sparse(tmp_path / "image", 64 * MIB)
    run(["mkfs.ntfs", "-q", "-Q", "-F", str(image)])
    with ntfs._mounted(image) as folder:
        written = fill(folder)
        with (folder / "sparse").open("wb") as file:
            file.seek(3_000_000)
            file.write(b"end")
        written["sparse"] = bytes(3_000_000) + b"end"
        (folder / "link").hardlink_to(folder / "SHORT.TXT")
        written["link"] = b"short"
        times = (folder / "SHORT.TXT").stat().st_mtime_ns
    with reading(image, NtfsReader) as reader:
        assert isinstance(reader, NtfsReader)
        assert by_reader(reader) == written
        one, other = (reader.find(reader.top(), name) for name in ("link", "SHORT.TXT"))
        assert one is not None and other is not None
        assert one.number == other.number and one.links == 2
        assert one.mtime_ns == times
        sparse = reader.find(reader.top(), "sparse")
        assert sparse is not None
        assert sum(len(piece.content) for piece in reader.pieces(sparse)) < 200_000


def test_exfat(tmp_path: Path) -> None:
    image = make_sparse(tmp_path / "image", 64 * MIB)
    run(["mkfs.exfat", str(image)])
    with exfat._mounted(image) as folder:
        written = fill(folder)
    with reading(image, ExfatReader) as reader:
        assert isinstance(reader, ExfatReader)
        assert by_reader(reader) == written


@pytest.mark.parametrize("bits", [12, 16, 32])
def test_fat(bits: int, tmp_path: Path) -> None:
    size = {12: 8, 16: 32, 32: 64}[bits] * MIB
    image = make_sparse(tmp_path / "image", size)
    run(["mkfs.vfat", "-F", str(bits), *(["-s", "1"] if bits == 32 else []), str(image)])
    (tmp_path / "tree").mkdir()
    written = fill(tmp_path / "tree")
    names = [str(path) for path in sorted((tmp_path / "tree").iterdir())]
    environment = {"LC_ALL": "C.UTF-8"}
    run(["mcopy", "-s", "-Q", "-i", str(image), *names, "::"], environment=environment)
    with reading(image, FatReader) as reader:
        assert isinstance(reader, FatReader)
        assert by_reader(reader) == written


@pytest.mark.parametrize("kind", ["ntfs", "vfat"])
def test_damage_is_an_error_and_never_a_traceback(kind: str, tmp_path: Path) -> None:
    image = make_sparse(tmp_path / "image", 16 * MIB)
    if kind == "ntfs":
        run(["mkfs.ntfs", "-q", "-Q", "-F", str(image)])
        with ntfs._mounted(image) as folder:
            fill(folder)
        reader_of: type[ForeignReader] = NtfsReader
    else:
        run(["mkfs.vfat", str(image)])
        (tmp_path / "tree").mkdir()
        fill(tmp_path / "tree")
        names = [str(path) for path in sorted((tmp_path / "tree").iterdir())]
        run(["mcopy", "-s", "-Q", "-i", str(image), *names, "::"])
        reader_of = FatReader
    chance = random.Random(2)
    for _ in range(40):
        with (
            damaged(image, [(0, 4096), (0, 4 * MIB)], chance),
            contextlib.suppress(ImagerError, OSError),
            _read(image, reader_of) as reader,
        ):
            by_reader(reader)


@contextlib.contextmanager
def _read(image: Path, kind: type[ForeignReader]) -> Iterator[ForeignReader]:
    with reading(image, kind) as reader:
        assert isinstance(reader, kind)
        yield reader
