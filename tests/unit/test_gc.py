"""Removing packs: what no image uses goes, whatever else is going on; what one uses never does."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from imager.capture import CaptureJob, capture
from imager.errors import ImagerError, IntegrityError
from imager.format import seal
from imager.gc import collect
from imager.manifest import Manifest, new_document
from imager.progress import NullProgress
from imager.repository import Repository, new_image_id, utc_now
from imager.verify import verify
from tests.support.commandline import imager, run_until
from tests.support.sources import MemorySource, memory_disk

KIB = 1 << 10
DEAD_PID = 2**22 + 7  # above the kernel's largest (linux/threads.h: PID_MAX_LIMIT)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(str(tmp_path / "repo"), block_size=64 * KIB)


def take(repository: Repository, seed: int, size: int = 600 * KIB) -> Manifest:
    content = random.Random(seed).randbytes(size)
    job = CaptureJob(disks=(memory_disk(MemorySource(content)),), name="test", workers=2)
    return capture(job, repository, NullProgress())


def gc(repository: Repository, **options: bool) -> Any:
    return collect(repository, NullProgress(), **options)


def check(repository: Repository, *image_ids: str) -> None:
    """Every image is whole, or these are."""
    fresh = Repository.open(repository.store.url)
    result = verify(fresh, list(image_ids), NullProgress())
    assert result.is_sound, result


def open_session(repository: Repository, *, pid: int, host: str | None = None) -> str:
    image_id = new_image_id()
    document = new_document(
        "session",
        id=image_id,
        host=host or os.uname().nodename,
        pid=pid,
        started=utc_now(),
    )
    repository.open_session(image_id, document)
    return image_id


def test_only_unused_packs_go(repository: Repository) -> None:
    kept, dropped = take(repository, 1), take(repository, 2)
    before = set(repository.pack_ids())
    repository.remove(dropped.id)
    dry = gc(repository, dry_run=True)
    assert set(repository.pack_ids()) == before and not list(repository.store.names("trash"))
    result = gc(repository)
    assert set(result.deleted) == set(dry.condemned) == before - set(repository.pack_ids())
    assert result.deleted_bytes == dry.condemned_bytes > 500 * KIB
    assert [m.id for m in repository.manifests()] == [kept.id]
    check(repository)
    assert not gc(repository).deleted


def test_shared_blocks_stay(repository: Repository) -> None:
    first, second = take(repository, 1), take(repository, 1)
    repository.remove(first.id)
    gc(repository)
    check(repository)
    assert second.id in repository.image_ids()


def test_nothing_goes_while_a_capture_is_open(repository: Repository) -> None:
    dropped = take(repository, 1)
    packs = set(repository.pack_ids())
    repository.remove(dropped.id)
    session = open_session(repository, pid=os.getpid())
    result = gc(repository)
    assert result.waiting_for == [session] and not result.deleted
    assert set(repository.pack_ids()) == packs == repository.condemned()
    again = take(repository, 1)  # shares nothing of what is condemned
    assert not packs & {m.top.pack for m in again.disks}
    repository.close_session(session)
    assert set(gc(repository).deleted) == packs
    assert not list(repository.store.names("trash"))
    check(repository)


def test_a_capture_begun_later_is_not_waited_for(repository: Repository) -> None:
    repository.remove(take(repository, 1).id)
    early = open_session(repository, pid=os.getpid())
    gc(repository)
    open_session(repository, pid=os.getpid())
    repository.close_session(early)
    assert gc(repository).deleted


def test_a_list_without_sessions_waits_for_all(repository: Repository) -> None:
    """A gc died after the first list was written, with a capture open."""
    dropped = take(repository, 1)
    repository.remove(dropped.id)
    listed = [pack.hex() for pack in repository.pack_ids()]
    repository.store.create("trash/dead.json", seal(new_document("trash", packs=listed)))
    session = open_session(repository, pid=os.getpid())
    assert gc(repository).waiting_for == [session]
    repository.close_session(session)
    assert len(gc(repository).deleted) == len(listed)


def test_condemned_but_used_again_stays(repository: Repository) -> None:
    """A capture committed between the list and the end of the gc that wrote it."""
    image = take(repository, 1)
    listed = [pack.hex() for pack in repository.pack_ids()]
    repository.store.create("trash/dead.json", seal(new_document("trash", packs=listed)))
    assert not gc(repository).deleted
    assert not repository.condemned()
    check(repository)
    assert image.id in repository.image_ids()


def test_dead_captures_of_this_host_are_expired(repository: Repository) -> None:
    dead = open_session(repository, pid=DEAD_PID)
    other = open_session(repository, pid=DEAD_PID, host="elsewhere.example")
    repository.remove(take(repository, 1).id)
    result = gc(repository)
    assert result.expired == [dead] and result.waiting_for == [other]
    document = new_document("image", id=dead)
    with pytest.raises(ImagerError, match="expired"):
        repository.commit(document)
    assert gc(repository, expire=True).expired == [other]
    assert not list(repository.manifests())


def test_a_commit_wins_over_a_late_expiry(repository: Repository) -> None:
    image = take(repository, 1)
    document = new_document("session", id=image.id, host=os.uname().nodename, pid=DEAD_PID)
    repository.open_session(image.id, document)
    assert not gc(repository, expire=True).expired
    check(repository)
    assert image.id in repository.image_ids()


def test_unknown_means_nothing_goes(repository: Repository) -> None:
    """A page that cannot be read may refer to anything."""
    damaged, dropped = take(repository, 1), take(repository, 2)
    repository.remove(dropped.id)
    packs = set(repository.pack_ids())
    top = damaged.disks[0].top.pack.hex()
    file = Path(repository.store.url) / "packs" / top[:2] / f"{top}.pack"
    file.chmod(0o600)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(IntegrityError):
        gc(Repository.open(repository.store.url))
    assert set(repository.pack_ids()) == packs


def test_leftovers_of_a_day_ago_go(repository: Repository) -> None:
    folder = Path(repository.store.url) / "tmp"
    folder.mkdir(exist_ok=True)
    old, new = folder / "1-old", folder / "1-new"
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    gc(repository)
    assert not old.exists() and new.exists()


def test_killed_at_every_step(tmp_path: Path) -> None:
    """Each system call that changes the repository is once the last one."""
    origin = tmp_path / "origin"
    repository = Repository.create(str(origin), block_size=64 * KIB)
    for seed in range(4):
        take(repository, seed)
    for image_id in repository.image_ids()[::2]:
        repository.remove(image_id)
    left, steps = repository.image_ids(), 0
    while True:
        steps += 1
        work = tmp_path / f"step{steps}"
        shutil.copytree(origin, work)
        outcome, _ = run_until(steps, "gc", "--repo", work, "--progress", "none")
        now = Repository.open(str(work))
        assert now.image_ids() == left
        check(now)
        imager("gc", "--repo", work)
        assert not now.condemned() and not list(now.store.names("trash"))
        check(now)
        assert not gc(now, dry_run=True).condemned
        shutil.rmtree(work)
        if outcome.code == 0:
            break
    print(f"killed at each of {steps - 1} steps")
    assert steps > 10


def test_beside_captures(repository: Repository) -> None:
    """Captures that share blocks, removals and gc's at once: no image ever misses a pack."""
    errors: list[BaseException] = []
    done = threading.Event()

    def capture_all(first: int) -> None:
        own = Repository.open(repository.store.url)
        try:
            for turn in range(12):
                image = take(own, (first + turn) % 5, size=300 * KIB)
                check(own, image.id)
                if turn % 2:
                    own.remove(image.id)
        except BaseException as error:
            errors.append(error)

    def collect_all() -> None:
        while not done.is_set():
            try:
                gc(Repository.open(repository.store.url))
            except BaseException as error:
                errors.append(error)

    writers = [threading.Thread(target=capture_all, args=(n,)) for n in range(2)]
    collector = threading.Thread(target=collect_all)
    for thread in [*writers, collector]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    collector.join()
    assert not errors, errors
    check(repository)
    gc(repository)
    check(repository)
    assert not gc(repository, dry_run=True).condemned
