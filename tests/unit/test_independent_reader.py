"""The test vectors, read by `imager` and by the reader that was written from the document alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imager.plan import RestoreOptions, plan_restore
from imager.progress import NullProgress
from imager.repository import Repository
from imager.restore import restore
from imager.verify import verify
from tests import independent_reader
from tests.data.make_vectors import VECTORS

DATA = Path(__file__).parents[1] / "data"
SCRIPT = Path(independent_reader.__file__)


@dataclass(frozen=True)
class Expected:
    """A disk of a vector, as its JSON file describes it."""

    vector: str
    image: str
    disk: str
    described: dict[str, Any]

    @property
    def folder(self) -> Path:
        return DATA / self.vector

    @property
    def states(self) -> list[int]:
        return [state for state, count in self.described["states"] for _ in range(count)]


def expected_disks() -> list[Expected]:
    return [
        Expected(vector, image, disk, described)
        for vector in VECTORS
        for image, disks in json.loads((DATA / f"{vector}.json").read_text()).items()
        for disk, described in disks.items()
    ]


every_disk = pytest.mark.parametrize(
    "disk", expected_disks(), ids=lambda disk: f"{disk.vector}-{disk.image[-8:]}-{disk.disk}"
)
every_vector = pytest.mark.parametrize("vector", VECTORS)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flattened(runs: Iterable[tuple[int, int, int]]) -> list[int]:
    """The state of each block from (first block, number of blocks, state)."""
    states: list[int] = []
    for first, count, state in runs:
        assert first == len(states)
        states += [state] * count
    return states


# --- the vectors ------------------------------------------------------------------------------


@every_disk
def test_imager_reads_vectors(disk: Expected, tmp_path: Path) -> None:
    repository = Repository.open(str(disk.folder))
    manifest = repository.manifest(disk.image)
    (found,) = (item for item in manifest.disks if item.name == disk.disk)
    assert found.root == disk.described["root"]
    assert found.size == disk.described["size"]
    runs = repository.block_map(found).runs()
    assert flattened((run.first, run.blocks, run.state) for run in runs) == disk.states

    target = tmp_path / "disk.img"
    plan = plan_restore(repository, manifest, found, str(target), RestoreOptions(read_back=True))
    restore(repository, manifest, found, plan, NullProgress())
    assert sha256_of(target) == disk.described["sha256"]


@every_disk
def test_independent_reader_reads_vectors(disk: Expected, tmp_path: Path) -> None:
    with independent_reader.Repository(disk.folder) as repository:
        found = repository.disk(disk.image, disk.disk)
        assert found.root == disk.described["root"]
        assert found.size == disk.described["size"]
        assert flattened((r.first, r.count, r.state) for r in found.runs()) == disk.states
        found.restore(tmp_path / "disk.img")
    assert sha256_of(tmp_path / "disk.img") == disk.described["sha256"]


@every_disk
def test_unreadable_ranges_are_where_the_map_says(disk: Expected) -> None:
    with independent_reader.Repository(disk.folder) as repository:
        found = repository.disk(disk.image, disk.disk)
        block_size = repository.block_size
    hurt = {
        block
        for offset, length in found.unreadable
        for block in range(offset // block_size, (offset + length - 1) // block_size + 1)
    }
    assert hurt == {
        n for n, state in enumerate(disk.states) if state == independent_reader.UNREADABLE
    }


@every_vector
def test_images_of_vectors(vector: str) -> None:
    images = sorted(json.loads((DATA / f"{vector}.json").read_text()))
    repository = Repository.open(str(DATA / vector))
    assert [manifest.id for manifest in repository.manifests()] == images
    with independent_reader.Repository(DATA / vector) as independent:
        assert independent.images() == images


@every_vector
def test_vectors_are_sound_and_not_changed_by_reading(vector: str) -> None:
    before = tree(DATA / vector)
    result = verify(Repository.open(str(DATA / vector)), [], NullProgress())
    assert result.is_sound, (result.faults, result.pack_faults)
    assert result.blocks > 0
    assert tree(DATA / vector) == before


@every_vector
def test_zstd_alone_gives_the_content_of_a_pack(vector: str) -> None:
    """The promise of the document: `zstd -dc FILE` prints the records one after the other."""
    for path in (DATA / vector).glob("packs/*/*.pack"):
        pack = independent_reader.Pack(path, path.stem, digests=True)
        records = [
            pack.record(ordinal, entry.kind, entry.content_length)[1]
            for ordinal, entry in enumerate(pack.entries)
        ]
        pack.close()
        with path.open("rb") as file:
            decoder = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            assert decoder.read() == b"".join(records)


def test_vectors_show_every_feature() -> None:
    """Lest a vector be replaced by one that shows less."""
    disks = expected_disks()
    assert {state for disk in disks for state in disk.states} == {0, 1, 2, 3}
    assert any(len(disk.states) > 1024 for disk in disks)
    assert any(disk.described["size"] % 65536 for disk in disks)
    shared = [disk for disk in disks if disk.vector == "v1-shared"]
    tops = [
        repository.manifest(disk.image).disks[1].top
        for disk in shared[::2]
        for repository in [Repository.open(str(disk.folder))]
    ]
    assert len(tops) == 2 and tops[0] == tops[1]


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the command ------------------------------------------------------------------------------


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_restores(tmp_path: Path) -> None:
    disk = next(disk for disk in expected_disks() if disk.disk == "sdb")
    for number, options in enumerate([[], ["--no-digests"]]):
        out = tmp_path / f"{number}.img"
        finished = run_script(*options, disk.folder, disk.image, disk.disk, out)
        assert finished.returncode == 0, finished.stderr
        assert sha256_of(out) == disk.described["sha256"]
    refused = run_script(disk.folder, disk.image, tmp_path / "other.img")
    assert refused.returncode == 1
    assert "2 disks fit" in refused.stderr


def test_reader_imports_nothing_of_imager() -> None:
    """In a fresh interpreter, without the folder of the project."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]);"
        "print([name for name in sys.modules if name.split('.')[0] in ('imager', 'blake3')])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT)],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert finished.stdout.strip() == "[]"


# --- salvage ----------------------------------------------------------------------------------


def copy_of(vector: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / vector, tmp_path / "repository"))


@every_vector
def test_salvage_rebuilds_a_pack_to_the_byte(vector: str, tmp_path: Path) -> None:
    for path in (DATA / vector).glob("packs/*/*.pack"):
        whole = path.read_bytes()
        pack = independent_reader.Pack(path, path.stem, digests=True)
        pack.close()
        for lost in (1, 79, 80, 81, len(whole) - pack.table_offset):
            damaged, rebuilt = (
                tmp_path / f"{path.stem}-{lost}",
                tmp_path / f"{path.stem}-{lost}.new",
            )
            damaged.write_bytes(whole[:-lost])
            assert independent_reader.salvage(damaged, rebuilt) == len(pack.entries)
            assert rebuilt.read_bytes() == whole


def test_salvaged_pack_serves_imager_with_what_is_left(tmp_path: Path) -> None:
    folder = copy_of("v1-states", tmp_path)
    path = max(folder.glob("packs/*/*.pack"), key=lambda path: path.stat().st_size)
    pack = independent_reader.Pack(path, path.stem, digests=True)
    pack.close()
    path.write_bytes(path.read_bytes()[: pack.offsets[4] - 10])  # within the fourth record
    assert not verify(Repository.open(str(folder)), [], NullProgress()).is_sound

    finished = run_script("salvage", path, tmp_path / "rebuilt.pack")
    assert finished.stdout == "3 records\n"
    (tmp_path / "rebuilt.pack").replace(path)
    result = verify(Repository.open(str(folder)), [], NullProgress())
    assert not result.pack_faults
    assert result.faults and all("does not exist" in fault.reason for fault in result.faults)


# --- that the independent reader checks anything at all ----------------------------------------


@pytest.mark.parametrize("path", sorted((DATA / "v1-tiny").rglob("*.*")), ids=lambda p: p.suffix)
def test_independent_reader_finds_flipped_bytes(path: Path, tmp_path: Path) -> None:
    if path.is_dir():
        pytest.fail("a folder of the vector has a dot in its name")
    folder = copy_of("v1-tiny", tmp_path)
    copy = folder / path.relative_to(DATA / "v1-tiny")
    whole = path.read_bytes()
    image = next(disk.image for disk in expected_disks() if disk.vector == "v1-tiny")
    for at in range(0, len(whole), 7):
        copy.write_bytes(flipped(whole, at, 1 << at % 8))
        with pytest.raises(independent_reader.BadFormat):
            read_all(folder, image)


def read_all(folder: Path, image: str) -> None:
    """Every record of every pack, and every disk of the image."""
    with independent_reader.Repository(folder) as repository:
        for disk in repository.disks(image):
            for run in disk.runs():
                if run.place is not None:
                    disk.block(run)


def flipped(content: bytes, at: int, mask: int) -> bytes:
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20000), st.integers(0, 255))
@example(0, 0)
@example(1024, 1)
@example(1025, 2)
@example(65536, 3)
@example(3 * 1024 + 64, 4)
def test_blake3_in_python(length: int, seed: int) -> None:
    content = bytes((seed + n * n // 7) & 0xFF for n in range(length))
    assert independent_reader.blake3(content) == blake3.blake3(content).digest()
