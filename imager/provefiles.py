"""Prove an image without booting it: its filesystems' own checkers, and every file read.

With ``coverage``, reading a byte that the image calls unused is an error: so a block that was left
out by mistake is found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from imager import __version__
from imager.allocation import allocation_map
from imager.checkers import CHECKERS, Checker, Opinion, Surplus, check
from imager.coverage.files import Reading, mounted, read_all, surplus
from imager.coverage.view import TOKEN_SIZE, View, ViewUnavailable, open_view
from imager.errors import ImagerError
from imager.extents import Extents
from imager.format import State
from imager.imagevolumes import ImageVolume, image_volumes, open_disks
from imager.manifest import Manifest
from imager.progress import Progress
from imager.proofs import Evidence, Proof, new_proof_id, store_proof
from imager.repository import Repository, utc_now
from imager.units import count_of

_BY_SURPLUS: tuple[Surplus, ...] = ("nothing", "something ahead", "last block", "anything")
# Nothing that a system needs to be whole.
_NO_FILES = frozenset({"swap", "unknown", "empty"})


@dataclass(frozen=True)
class VolumeResult:
    """Of one filesystem. ``verdict`` as of a ``Proof``."""

    name: str
    verdict: str
    text: str
    files: int = 0

    @property
    def line(self) -> str:
        return f"{self.name}: {self.verdict}: {self.text}"


def prove_filesystems(
    repository: Repository, manifest: Manifest, progress: Progress, *, coverage: bool = False
) -> Proof:
    """Check and read all filesystems, and store and return what came of it.

    The worst decides: a fault of one fails all; "not tried" (and not stored) is an image with a
    filesystem that cannot be looked into here, when no other has a fault.
    """
    started = time.monotonic()
    results = list(_results(repository, manifest, progress, coverage))
    verdict = _verdict(results)
    bad = [result.line for result in results if result.verdict == verdict != "proved"]
    files = sum(result.files for result in results)
    good = f"{count_of(len(results), 'filesystem')} checked, {count_of(files, 'file')} read"
    proof = Proof(
        manifest.id,
        verdict,
        level="coverage" if coverage else "filesystems",
        time=utc_now(),
        cause="filesystem" if verdict == "failed" else "",
        reason="; ".join(bad) if bad else good if results else "it has no filesystem",
        milliseconds=round((time.monotonic() - started) * 1000),
        tool=f"imager {__version__}",
    )
    if verdict == "not tried":
        return proof
    console = "".join(f"{result.line}\n" for result in results)
    return store_proof(repository, replace(proof, id=new_proof_id()), Evidence(console))


def _verdict(results: Sequence[VolumeResult]) -> str:
    found = {result.verdict for result in results}
    return next((v for v in ("failed", "not tried", "proved") if v in found), "not tried")


def _results(
    repository: Repository, manifest: Manifest, progress: Progress, coverage: bool
) -> Iterator[VolumeResult]:
    with open_disks(lambda: Repository.open(repository.store.url), manifest.disks) as disks:
        unused = {
            disk.name: _unused_blocks(repository, manifest, disk.name) if coverage else Extents()
            for disk in manifest.disks
        }
        for volume in image_volumes(disks):
            if volume.filesystem.kind in _NO_FILES:
                continue
            progress.note(f"{volume.name}: checking and reading the {volume.filesystem.kind}")
            used = Extents.whole(volume.source.size)
            if coverage:
                used = _used(manifest, volume, unused)
            result = _prove_volume(volume, used)
            yield result


def _unused_blocks(repository: Repository, manifest: Manifest, name: str) -> Extents:
    """What the image does not hold, in bytes of the disk."""
    disk = next(disk for disk in manifest.disks if disk.name == name)
    return repository.block_map(disk).extents(State.UNUSED, disk.block_size)


def _used(manifest: Manifest, volume: ImageVolume, unused: dict[str, Extents]) -> Extents:
    """What the filesystem calls used and, of a partition, the image holds."""
    size = volume.source.size
    mapped = allocation_map(volume.source).used.complement(size)
    if volume.disk is None:
        return mapped.complement(size)
    disk = next(disk for disk in manifest.disks if disk.name == volume.disk)
    part = disk.table.partition(volume.number) if volume.number is not None else None
    offset = part.offset if part else 0
    missing = unused[volume.disk].clip(offset, size).shift(-offset)
    return Extents([*mapped, *missing]).complement(size)


def _prove_volume(volume: ImageVolume, used: Extents) -> VolumeResult:
    kind = volume.filesystem.kind
    checker = CHECKERS.get(kind)
    if volume.reason is not None or checker is None:
        return VolumeResult(
            volume.name, "not tried", volume.reason or f"there is no checker for {kind}"
        )
    if not checker.is_installed():
        words = f"{checker.command[0]} is missing: install {checker.package}"
        return VolumeResult(volume.name, "not tried", words)
    try:
        return _examine(volume, used, checker)
    except ViewUnavailable as error:
        return VolumeResult(volume.name, "not tried", error.message)


def _examine(volume: ImageVolume, used: Extents, checker: Checker) -> VolumeResult:
    """Files first: mounting replays a journal, about which a checker would complain."""
    kind = volume.filesystem.kind
    wanted = max((checker.surplus, surplus(kind)), key=_BY_SURPLUS.index)
    filler = _filler(volume, used, wanted)
    with open_view(volume.source, used, filler) as view:
        try:
            reading = _read_files(volume, view)
        except ViewUnavailable:
            raise
        except ImagerError as error:
            opinion = check(checker, view.path)
            if opinion.clean and _is_driver_missing(error):
                words = f"{checker.line} finds no fault, but it cannot be mounted here"
                return VolumeResult(volume.name, "not tried", words)
            return VolumeResult(volume.name, "failed", _mount_words(error, opinion))
        opinion = check(checker, view.path)
    if reading.complaints:
        words = f"{count_of(len(reading.complaints), 'file')} unreadable: {min(reading.complaints)}"
        return VolumeResult(volume.name, "failed", words)
    if not opinion.clean:
        return VolumeResult(volume.name, "failed", f"{checker.line}: {_first_line(opinion)}")
    words = f"{checker.line}, and {count_of(reading.files, 'file')} read"
    return VolumeResult(volume.name, "proved", words, reading.files)


def _read_files(volume: ImageVolume, view: View) -> Reading:
    with mounted(view.path, volume.filesystem.kind, volume.source.logical_sector) as folder:
        return read_all(folder, view.token)


def _filler(volume: ImageVolume, used: Extents, wanted: Surplus) -> Extents:
    """Unused bytes that must read as something, for tools that look there without need."""
    size = volume.source.size
    unused = used.complement(size)
    if wanted == "anything":
        return unused
    if wanted != "last block":
        return Extents()
    end = min(volume.filesystem.size or size, size)
    start = max(end - (volume.filesystem.block_size or TOKEN_SIZE), 0)
    return unused.clip(start, end - start)


def _is_driver_missing(error: ImagerError) -> bool:
    return "unknown filesystem type" in error.message or "is not installed" in error.message


def _mount_words(error: ImagerError, opinion: Opinion) -> str:
    said = (error.message.splitlines() or [""])[-1].strip()
    return f"it cannot be mounted: {said}; the checker: {_first_line(opinion)}"


def _first_line(opinion: Opinion) -> str:
    """What a checker says first beside its own name."""
    lines = [line.strip() for line in opinion.output.splitlines() if line.strip()]
    if opinion.clean:
        return "no fault"
    return next((line for line in lines if not line.startswith("e2fsck ")), "a fault")
