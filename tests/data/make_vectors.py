#!/usr/bin/env python3
"""Makes the test vectors of the repository format: `python -m tests.data.make_vectors [NAME…]`.

The checked-in vectors are the authority: they hold random ids and the time of their making, so
running this again gives other files, to be checked in only with a new version of the format (old
vectors stay). What a disk must read as is computed here from its plan, not by reading it back.

Each vector is a repository `v1-NAME/` with `v1-NAME.json` beside it, which lists, for every disk of
every image, its size, root digest, the SHA-256 of its bytes, and its blocks' states as
`[state, number of blocks]`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

from imager.allocation import AllocationMap, Filesystem
from imager.capture import CaptureJob, SourceDisk, capture
from imager.diskidentity import DiskIdentity
from imager.extents import Extents
from imager.format import State, seal
from imager.layout import Volume, read_layout
from imager.manifest import Manifest, new_document
from imager.progress import NullProgress
from imager.repository import Repository

HERE = Path(__file__).parent
BLOCK = 65536
PIECE = 4096
SECTOR = 512

# Signs of a plan, one a block; capital letters are blocks of data, equal ones are equal blocks.
ZERO = "z"
UNUSED = "-"  # stale bytes that no filesystem uses
MIXED = "%"  # data, but every other piece of 4096 bytes is unused and stale
HURT = "!"  # data with two bad sectors
DEAD = "#"  # no sector can be read


class PlannedDisk:
    """A disk in memory, of which it is known what an image must hold. A ``BlockSource``."""

    logical_sector = physical_sector = SECTOR
    is_device = False

    def __init__(self, name: str, plan: str, last_block: int = BLOCK) -> None:
        """``last_block``: bytes of the last block."""
        self.path = name
        self.plan = plan
        self.size = (len(plan) - 1) * BLOCK + last_block
        self._content = b"".join(_stored(sign) for sign in plan)[: self.size]
        numbers = range(len(plan))
        self._bad = _extents(_bad(plan[n], n * BLOCK) for n in numbers).clip(0, self.size)
        self._used = _extents(_used(plan[n], n * BLOCK) for n in numbers).clip(0, self.size)
        self._data = _extents(
            [] if plan[n] == ZERO else [(n * BLOCK, BLOCK)] for n in numbers
        ).clip(0, self.size)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.pread(offset, len(buffer))

    def pread(self, offset: int, length: int) -> bytes:
        if any(self._bad.within(offset, length)):
            raise OSError(errno.EIO, "bad sector")
        return self._content[offset : offset + length]

    def data_extents(self) -> Extents:
        return self._data

    def expected(self) -> bytes:
        """What the image holds: zeros for all that is unused or can't be read."""
        content = bytearray(self.size)
        for extent in self._used.subtract(self._bad):
            content[extent.offset : extent.end] = self._content[extent.offset : extent.end]
        return bytes(content)

    def states(self) -> list[tuple[int, int]]:
        found = (_STATES.get(sign, State.DATA) for sign in self.plan)
        return [(int(state), len(list(group))) for state, group in groupby(found)]

    def as_source(self) -> SourceDisk:
        volume = Volume(
            None, 0, self.size, Filesystem("planned"), AllocationMap(self._used, "exact")
        )
        layout = replace(read_layout(PlannedDisk("", ZERO)), volumes=(volume,), size=self.size)
        return SourceDisk(self.path, self, layout, DiskIdentity(model="planned disk"))


_STATES = {
    ZERO: State.ZERO,
    UNUSED: State.UNUSED,
    HURT: State.UNREADABLE,
    DEAD: State.UNREADABLE,
}


def _stored(sign: str) -> bytes:
    """A block as it lies on the disk: compressible, every piece different."""
    if sign == ZERO:
        return bytes(BLOCK)
    pieces = (f"block {sign}, piece {n}. ".encode() * 256 for n in range(BLOCK // PIECE))
    return b"".join(piece[:PIECE] for piece in pieces)


def _bad(sign: str, at: int) -> list[tuple[int, int]]:
    if sign == DEAD:
        return [(at, BLOCK)]
    return [(at + 3 * SECTOR, SECTOR), (at + 9 * SECTOR, SECTOR)] if sign == HURT else []


def _used(sign: str, at: int) -> list[tuple[int, int]]:
    if sign == UNUSED:
        return []
    step = 2 * PIECE if sign == MIXED else PIECE
    return [(at + start, PIECE) for start in range(0, BLOCK, step)]


def _extents(parts: Iterable[list[tuple[int, int]]]) -> Extents:
    return Extents(pair for part in parts for pair in part)


def capture_disks(repository: Repository, *disks: PlannedDisk, name: str = "vector") -> Manifest:
    job = CaptureJob(
        disks=tuple(disk.as_source() for disk in disks),
        name=name,
        note="Größe: ein Block",
        workers=2,
    )
    with patch("socket.gethostname", return_value="vector"):
        return capture(job, repository, NullProgress())


# --- the vectors ------------------------------------------------------------------------------

Images = dict[str, tuple[PlannedDisk, ...]]


def make_tiny(repository: Repository) -> Images:
    """As few bytes as there can be: the tests flip every one of them."""
    disk = PlannedDisk("sda", "Az-!B", SECTOR)
    return {capture_disks(repository, disk).id: (disk,)}


def make_states(repository: Repository) -> Images:
    """Every state, a short last block, pieces that are unused, keys of a later version."""
    disk = PlannedDisk("sda", "Azz--%!#AB-C", 3 * SECTOR)
    manifest = capture_disks(repository, disk)
    later = {**manifest.document, "id": _sibling(manifest), "later": {"list": [], "object": {}}}
    repository.commit(later)
    return {manifest.id: (disk,), later["id"]: (disk,)}


def make_shared(repository: Repository) -> Images:
    """Two disks in one image, a second image that shares blocks and a page, an aborted capture."""
    first = PlannedDisk("sda", "ABCz-"), PlannedDisk("sdb", "BBDz", PIECE)
    second = PlannedDisk("sda", "ABEz-"), PlannedDisk("sdb", "BBDz", PIECE)
    manifests = [capture_disks(repository, *disks) for disks in (first, second)]
    aborted = _sibling(manifests[0])
    repository.store.create(f"manifests/{aborted}.json", seal(new_document("aborted", id=aborted)))
    return {manifest.id: disks for manifest, disks in zip(manifests, (first, second), strict=True)}


def make_tall(repository: Repository) -> Images:
    """A map of two levels: a page of data, one of unused and one of zero blocks only, a rest."""
    plan = "A" + ZERO * 1020 + "B--" + UNUSED * 1024 + ZERO * 1024 + "z-A"
    disk = PlannedDisk("sda", plan, PIECE + SECTOR)
    return {capture_disks(repository, disk).id: (disk,)}


VECTORS: dict[str, Callable[[Repository], Images]] = {
    "v1-tiny": make_tiny,
    "v1-states": make_states,
    "v1-shared": make_shared,
    "v1-tall": make_tall,
}


def _sibling(manifest: Manifest) -> str:
    """Another image id of the same second."""
    return manifest.id[:-8] + f"{int(manifest.id[-8:], 16) ^ 0xFFFFFFFF:08x}"


def make_vector(name: str) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    repository = Repository.create(str(folder), block_size=BLOCK)
    images = VECTORS[name](repository)
    for empty in ("tmp", "sessions"):  # git keeps no empty folders
        (folder / empty).rmdir()
    described = {
        image: {
            disk.path: _describe(disk, found.root)
            for disk, found in zip(disks, repository.manifest(image).disks, strict=True)
        }
        for image, disks in images.items()
    }
    text = json.dumps(described, indent=1, sort_keys=True) + "\n"
    folder.with_suffix(".json").write_text(text)


def _describe(disk: PlannedDisk, root: str) -> dict[str, object]:
    return {
        "size": disk.size,
        "root": root,
        "sha256": hashlib.sha256(disk.expected()).hexdigest(),
        "states": disk.states(),
    }


if __name__ == "__main__":
    for wanted in sys.argv[1:] or VECTORS:
        make_vector(wanted)
