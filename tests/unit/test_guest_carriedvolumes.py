"""A repository on several volumes, of which the only drive holds one at a time."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from bootmedia.carried import CarriedImages
from bootmedia.guest import unattended
from bootmedia.guest.medium import Medium
from bootmedia.guest.restoring import carry_out, prepare
from bootmedia.guest.session import Session
from bootmedia.guest.targets import Candidate
from bootmedia.job import Job, PinnedDisk, PinnedImage, TargetRule, Unattended
from bootmedia.medium import RECORD_PATH
from bootmedia.medium import Medium as Record
from imager.carry import objects_of, source_file
from imager.diskidentity import DiskIdentity
from imager.errors import ObjectMissing, RefusedError
from imager.manifest import Manifest
from imager.plan import RestoreOptions
from imager.progress import NullProgress
from imager.repository import Repository
from tests.support.commandline import imager
from tests.support.disks import make_file
from tests.support.watcher import Watcher

MIB = 1 << 20
SIZE = 8 * MIB


@dataclass
class Drive:
    """``folder`` has a folder for each volume; those that are not in have another name."""

    folder: Path
    put_in: list[int] = field(default_factory=list)

    def ask(self, number: int) -> Path:
        self.put_in.append(number)
        for path in self.folder.glob("volume-*"):
            path.rename(path.with_name(f"out-{path.name}"))
        return (self.folder / f"out-volume-{number}").rename(self.folder / f"volume-{number}")


@dataclass
class Bench:
    session: Session
    drive: Drive
    manifest: Manifest
    disk: Path
    count: int


def capture_in_parts(disk: Path, repo: Path) -> Manifest:
    """An image whose blocks lie in turns in three packs."""
    chance = random.Random(6)
    content = bytearray(SIZE)
    for part in range(3):
        for start in range(part * MIB // 2, SIZE, 3 * MIB // 2):
            content[start : start + MIB // 2] = chance.randbytes(MIB // 2)
        disk.write_bytes(content[:SIZE])
        imager("capture", disk, "--repo", repo, "--init")
    repository = Repository.open(str(repo))
    return repository.manifest(repository.image_ids()[-1])


def write_volumes(folder: Path, repo: Path, manifest: Manifest) -> int:
    repository = Repository.open(str(repo))
    objects = objects_of(repository, [manifest])
    carried = CarriedImages(
        (), tuple(objects), lambda item: source_file(repository.store, item, folder)
    )
    volumes = carried.volumes(max(item.size for item in objects) + 50_000)
    for number, files in enumerate(volumes, 1):
        record = Record("0123456789abcdef", 0, "1", "6.1", "all", 0, False, number, len(volumes))
        at = folder / f"out-volume-{number}"
        (at / RECORD_PATH).parent.mkdir(parents=True)
        (at / RECORD_PATH).write_bytes(record.to_bytes())
        for file in files:
            assert isinstance(file.source, Path)
            (at / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.source, at / file.path)
    return len(volumes)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """The first volume is in."""
    manifest = capture_in_parts(tmp_path / "disk", tmp_path / "repo")
    media = tmp_path / "media"
    media.mkdir()
    count = write_volumes(media, tmp_path / "repo", manifest)
    assert count == 3
    drive = Drive(media)
    first = Medium(drive.ask(1), "/dev/null")
    pinned = PinnedImage(manifest.id, "", tuple(PinnedDisk(d.name, d.root) for d in manifest.disks))
    job = Job("0123456789abcdef", 0, "1.0", "6.1", 0, (), volumes=count, images=(pinned,))
    with Session(job, first) as session:
        session.ask_for_volume = drive.ask
        drive.put_in.clear()
        yield Bench(session, drive, manifest, tmp_path / "disk", count)


def test_each_volume_is_asked_for_once_before_and_in_turns_after(
    bench: Bench, tmp_path: Path
) -> None:
    """Blocks that lie in turns on the volumes are the worst that there is."""
    target = make_file(tmp_path / "target", SIZE)
    found = bench.session.find(bench.manifest.id)
    prepared = prepare(
        bench.session, found, found.manifest.disks[0], str(target), RestoreOptions(read_back=True)
    )
    assert not prepared.refusals
    planned = list(bench.drive.put_in)
    assert len(set(planned)) == len(planned)
    prepare(bench.session, found, found.manifest.disks[0], str(target), RestoreOptions())
    assert bench.drive.put_in == planned
    carry_out(bench.session, prepared, NullProgress(), despite_hardware=True)
    assert target.read_bytes() == bench.disk.read_bytes()
    print(f"volumes put in: {bench.drive.put_in}")


def test_a_volume_that_nobody_has(bench: Bench, tmp_path: Path) -> None:
    def refuse(number: int) -> Path:
        raise ObjectMissing(f"volume {number} is lost")

    bench.session.ask_for_volume = refuse
    found = bench.session.find(bench.manifest.id)
    with pytest.raises(ObjectMissing, match="volume 2 is lost"):
        prepare(bench.session, found, found.manifest.disks[0], "target", RestoreOptions())


def test_a_pack_that_is_on_no_volume(bench: Bench, tmp_path: Path) -> None:
    for path in (bench.drive.folder / "out-volume-3").rglob("*.pack"):
        path.unlink()
    target = make_file(tmp_path / "target", SIZE)
    found = bench.session.find(bench.manifest.id)
    disk = found.manifest.disks[0]
    prepared = prepare(bench.session, found, disk, str(target), RestoreOptions())
    assert any("none of the volumes" in reason for reason in prepared.refusals)
    assert len(bench.drive.put_in) <= 2 * bench.count
    with pytest.raises(RefusedError):
        carry_out(bench.session, prepared, NullProgress())


def test_the_medium_is_no_target(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.session, "reserved", lambda path: "this rescue medium")
    found = bench.session.find(bench.manifest.id)
    with pytest.raises(RefusedError, match="this rescue medium"):
        prepare(bench.session, found, found.manifest.disks[0], "/dev/null", RestoreOptions())


def test_unattended(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody changes the volumes when the screen says so."""
    target = make_file(tmp_path / "target", SIZE)

    def find_medium(medium_id: str, seconds: float, *, volume: int) -> Medium:
        assert medium_id == "0123456789abcdef"
        if not seconds:
            raise ObjectMissing("not in the drive")
        return Medium(bench.drive.ask(volume), "/dev/null")

    identity = DiskIdentity(str(target), size=SIZE)
    monkeypatch.setattr(unattended, "find_medium", find_medium)
    monkeypatch.setattr(unattended, "candidates", lambda _: [Candidate(str(target), identity)])
    monkeypatch.setattr(unattended.system, "announce", lambda _: None)
    rules = (TargetRule(bench.manifest.disks[0].name, "only"),)
    bench.session.job = replace(
        bench.session.job, unattended=Unattended(bench.manifest.id, rules, countdown=0)
    )
    watcher = Watcher()
    assert unattended.run(bench.session, [watcher]) == 0, watcher.written
    assert target.read_bytes() == bench.disk.read_bytes()
    assert "Put in volume 2 of the medium." in watcher.written


def test_it_stays_one_repository_whichever_volume_is_in(bench: Bench) -> None:
    before = bench.session.find(bench.manifest.id)
    bench.session.survey_volumes(before)
    bench.session.medium = Medium(bench.drive.folder / "volume-3", "/dev/null")
    after = bench.session.find(bench.manifest.id)
    assert after.repository is before.repository
    assert after.origin == before.origin
    bench.session.forget(after.origin)
    assert bench.session.find(bench.manifest.id).repository is not before.repository
