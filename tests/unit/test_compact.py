"""Compaction: what images use of a pack is elsewhere then, and nothing is ever missing."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from imager.capture import CaptureJob, capture
from imager.carry import objects_of
from imager.compact import Moves, carry_out
from imager.errors import FormatError, ImagerError, IntegrityError, ObjectMissing
from imager.format import Place, seal, unseal
from imager.gc import collect
from imager.manifest import Manifest, new_document
from imager.moved import Moved, moved_name, read_moved
from imager.pack import Pack, pack_name
from imager.progress import NullProgress
from imager.repository import Repository, new_image_id, utc_now
from imager.verify import verify
from tests import independent_reader
from tests.support.commandline import imager, run_until
from tests.support.sources import MemorySource, memory_disk

KIB = 1 << 10
DEAD_PID = 2**22 + 7  # above the kernel's largest (linux/threads.h: PID_MAX_LIMIT)
BLOCK = 64 * KIB


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(str(tmp_path / "repo"), block_size=BLOCK)


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def take(repository: Repository, *seeds: int) -> Manifest:
    """An image of a disk with these blocks."""
    content = b"".join(block(seed) for seed in seeds)
    job = CaptureJob(disks=(memory_disk(MemorySource(content)),), name="test", workers=2)
    return capture(job, repository, NullProgress())


def compact(repository: Repository, below: float = 0.6) -> Any:
    return collect(Repository.open(repository.store.url), NullProgress(), below=below)


def check(repository: Repository, *image_ids: str) -> None:
    fresh = Repository.open(repository.store.url)
    result = verify(fresh, list(image_ids), NullProgress())
    assert result.is_sound, result


def bytes_of(repository: Repository, image: Manifest, tmp_path: Path) -> bytes:
    """What a restore brings back."""
    target = tmp_path / f"{new_image_id()}.img"
    imager("restore", image.id, target, "--yes", "--repo", repository.store.url)
    content = target.read_bytes()
    target.unlink()
    return content


def sparse(repository: Repository) -> tuple[Manifest, list[int]]:
    """An image that uses a third of another's pack, the other one removed; and its blocks."""
    first = take(repository, *range(12))
    seeds = [1, 2, 7, 100]
    second = take(repository, *seeds)
    repository.remove(first.id)
    return second, seeds


def test_what_is_used_is_moved(repository: Repository, tmp_path: Path) -> None:
    image, seeds = sparse(repository)
    before = set(repository.pack_ids())
    dry = collect(repository, NullProgress(), below=0.6, dry_run=True)
    assert set(repository.pack_ids()) == before
    result = compact(repository)
    assert result.compacted == dry.compacted and len(result.compacted) == 1
    assert result.compacted_bytes == dry.compacted_bytes > 8 * BLOCK
    (old,) = result.compacted
    assert old not in repository.pack_ids()
    moved = read_moved(repository.store, old)
    assert [run[:2] for run in moved.runs] == [(1, 2), (7, 1)]
    for folder in ("trash", "sessions"):
        assert not list(repository.store.names(folder))
    assert Repository.open(repository.store.url).image_ids() == [image.id]
    check(repository)
    assert bytes_of(repository, image, tmp_path) == b"".join(map(block, seeds))
    again = compact(repository)
    assert not again.compacted and not again.deleted


def test_moved_packs_are_moved_again_and_go_in_the_end(
    repository: Repository, tmp_path: Path
) -> None:
    first, _ = sparse(repository)
    compact(repository)
    second = take(repository, 1, 200, 201)  # shares one block, which was moved
    assert second.statistics["known_blocks"] == 1
    repository.remove(first.id)
    third = take(repository, 7, 2)  # of what is left nobody uses these but through stored packs
    repository.remove(third.id)
    for _ in range(3):
        compact(repository, 0.99)
        check(repository)
    assert bytes_of(repository, second, tmp_path) == b"".join(map(block, (1, 200, 201)))
    repository.remove(second.id)
    collect(repository, NullProgress())
    assert not list(repository.store.names("moved")) and not repository.pack_ids()


def test_chains_of_moves(repository: Repository, tmp_path: Path) -> None:
    """The first image's map names the pack that was moved first, whatever came after."""
    a = take(repository, *range(16))
    b = take(repository, *range(8))
    c = take(repository, *range(2))
    repository.remove(a.id)
    (old,) = compact(repository).compacted
    repository.remove(b.id)
    assert compact(repository).compacted
    assert read_moved(repository.store, old).records == 16
    assert len(list(repository.store.names("moved"))) == 2
    check(repository)
    assert bytes_of(repository, c, tmp_path) == block(0) + block(1)
    assert len(Pack(repository.store, old).objects) == 3


def test_captures_share_what_was_moved(repository: Repository) -> None:
    _, seeds = sparse(repository)
    compact(repository)
    again = take(repository, *seeds)
    assert again.statistics["known_blocks"] == len(seeds)
    check(repository)


def test_readers_that_are_under_way(repository: Repository) -> None:
    """A pack that was opened before it was moved reads on, and so does one that is looked for."""
    image, seeds = sparse(repository)
    early = Repository.open(repository.store.url)
    runs = [run for run in early.block_map(image.disks[0]).runs() if run.place]
    opened = {run.place.pack: early.pack(run.place.pack) for run in runs if run.place}
    (old,) = compact(repository).compacted
    assert old in opened
    for run, seed in zip(runs, seeds, strict=True):
        assert run.place
        for reader in (early, Repository.open(repository.store.url)):
            assert reader.read_block(run.place, run.digest, BLOCK) == block(seed)
    with pytest.raises(IntegrityError):
        early.read_block(Place(old, 3), runs[0].digest, BLOCK)
    with pytest.raises(IntegrityError):
        Repository.open(repository.store.url).read_block(Place(old, 3), runs[0].digest, BLOCK)


def test_the_independent_reader_follows(repository: Repository, tmp_path: Path) -> None:
    image, seeds = sparse(repository)
    compact(repository)
    out = tmp_path / "out.img"
    folder = Path(repository.store.url)
    assert independent_reader.main([str(folder), image.id, str(out)]) in (0, None)
    assert out.read_bytes() == b"".join(map(block, seeds))


def test_what_a_moved_image_needs_is_carried(repository: Repository, tmp_path: Path) -> None:
    image, seeds = sparse(repository)
    compact(repository)
    fresh = Repository.open(repository.store.url)
    copy = tmp_path / "copy"
    for item in objects_of(fresh, [fresh.manifest(image.id)]):
        (copy / item.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(repository.store.url) / item.name, copy / item.name)
    check(Repository.open(str(copy)))
    assert bytes_of(Repository.open(str(copy)), image, tmp_path) == b"".join(map(block, seeds))


def test_open_captures_are_waited_for(repository: Repository) -> None:
    sparse(repository)
    session = new_image_id()
    document = new_document(
        "session", id=session, host=os.uname().nodename, pid=os.getpid(), started=utc_now()
    )
    repository.open_session(session, document)
    result = compact(repository)
    assert result.waiting_for == [session] and not result.compacted
    repository.close_session(session)
    assert compact(repository).compacted
    check(repository)


def test_a_plain_gc_compacts_nothing(repository: Repository) -> None:
    sparse(repository)
    packs = set(repository.pack_ids())
    result = collect(repository, NullProgress())
    assert not result.compacted and set(repository.pack_ids()) < packs
    imager("gc", "--compact", "--below", "2", "--repo", repository.store.url, code=2)
    said = imager("gc", "--compact", "--repo", repository.store.url, "--json").json
    assert len(said["compacted"]) == 1 and said["compacted_bytes"] > 8 * BLOCK
    check(repository)


def test_damaged_packs_are_left_alone(repository: Repository) -> None:
    sparse(repository)
    dry = collect(repository, NullProgress(), below=0.6, dry_run=True)
    (pack,) = dry.compacted
    file = Path(repository.store.url) / pack_name(pack)
    content = bytearray(file.read_bytes())
    at = Pack(repository.store, pack).offsets[2] + 100
    content[at] ^= 1
    file.chmod(0o600)
    file.write_bytes(content)
    result = compact(repository)
    assert not result.compacted and file.read_bytes() == content


# --- the protocol -------------------------------------------------------------------------------


class Dead(BaseException):
    """What this process is from a certain system call on: it changes nothing any more."""


def dies_at(call: int, patch: pytest.MonkeyPatch) -> list[int]:
    """From the ``call``-th system call that changes a disk on, each raises; their numbers."""
    calls: list[int] = []
    lock = threading.Lock()

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            with lock:
                calls.append(len(calls) + 1)
                if calls[-1] >= call:
                    raise Dead
            return function(*arguments, **options)

        return wrapper

    for name in ("write", "fsync", "ftruncate", "link", "unlink", "mkdir"):
        patch.setattr(os, name, mortal(getattr(os, name)))
    return calls


def test_dead_at_every_step(tmp_path: Path) -> None:
    """After each system call that changes the repository the gc is gone, once."""
    origin = tmp_path / "origin"
    repository = Repository.create(str(origin), block_size=BLOCK)
    image, _ = sparse(repository)
    step, is_done = 0, False
    while not is_done:
        step += 1
        work = tmp_path / f"step{step}"
        shutil.copytree(origin, work)
        now = Repository.open(str(work))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: DEAD_PID)
            calls = dies_at(step, patch)
            with suppress(Dead):
                collect(now, NullProgress(), below=0.6)
            is_done = len(calls) < step
        now = Repository.open(str(work))
        check(now)
        collect(now, NullProgress(), below=0.6 if step % 2 else 0)
        check(now)
        assert [item.id for item in now.manifests()] == [image.id]
        assert not now.condemned() and not now.sessions()
        assert not collect(now, NullProgress(), dry_run=True).condemned
        shutil.rmtree(work)
    print(f"dead at each of {step - 1} steps")
    assert step > 25


@pytest.mark.parametrize("step", [12, 30])
def test_killed(repository: Repository, step: int) -> None:
    """The same with a real process, at two of the steps."""
    image, _ = sparse(repository)
    words = ("gc", "--compact", "--below", "0.6", "--progress", "none")
    outcome, _ = run_until(step, *words, "--repo", repository.store.url)
    assert outcome.code < 0
    check(repository)
    imager(*words, "--repo", repository.store.url)
    check(repository)
    assert [item.id for item in repository.manifests()] == [image.id]
    assert not repository.condemned() and not repository.sessions()


Interrupt = Callable[[str, Callable[[], object]], None]


@pytest.fixture
def interrupted(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Do something just before the object with this prefix is created, once."""

    def arrange(prefix: str, act: Callable[[], object]) -> None:
        from imager.store.local import LocalStore

        create = LocalStore.create
        todo = [act]

        def patched(store: LocalStore, name: str, content: bytes) -> None:
            if name.startswith(prefix) and b'"kind": "mov' in content and todo:
                todo.pop()()
            create(store, name, content)

        monkeypatch.setattr(LocalStore, "create", patched)

    return arrange


def test_expired_while_it_copies(repository: Repository, interrupted: Interrupt) -> None:
    """Another gc ends the compaction just before it decides: it gives up, and nothing is lost."""
    image, _ = sparse(repository)
    other = Repository.open(repository.store.url)
    interrupted("manifests/", lambda: collect(other, NullProgress(), expire=True))
    assert not compact(repository).compacted
    assert not list(repository.store.names("moved"))
    check(repository)
    assert compact(repository).compacted
    check(repository)
    assert [item.id for item in repository.manifests()] == [image.id]


@pytest.mark.parametrize("prefix", ["manifests/", "moved/"])
def test_two_at_once(repository: Repository, interrupted: Interrupt, prefix: str) -> None:
    """Another gc, compacting or not, just before the moves are decided, and just after."""
    sparse(repository)
    for below in (0.6, 0):
        other = Repository.open(repository.store.url)
        interrupted(prefix, lambda b=below, o=other: collect(o, NullProgress(), below=b))
        compact(repository)
        check(repository)
    collect(repository, NullProgress())
    check(repository)
    assert not collect(repository, NullProgress(), dry_run=True).condemned


def test_a_capture_in_between_is_not_robbed(repository: Repository, interrupted: Interrupt) -> None:
    """A plain gc takes the lists away, and a capture wants a record that is about to go."""
    sparse(repository)
    url = repository.store.url
    taken: list[Manifest] = []

    def meanwhile() -> None:
        collect(Repository.open(url), NullProgress())
        taken.append(take(Repository.open(url), *range(12)))

    interrupted("manifests/", meanwhile)
    compact(repository)
    check(repository)
    assert taken and taken[0].id in repository.image_ids()
    compact(repository)
    check(repository)


def test_decided_moves_are_carried_out_by_anybody(repository: Repository) -> None:
    image, _ = sparse(repository)
    work = Repository.open(repository.store.url)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imager.compact.carry_out", dies)
        with pytest.raises(KeyboardInterrupt):
            collect(work, NullProgress(), below=0.6)
    documents: list[dict[str, Any]] = []
    assert [item.id for item in repository.manifests(on_other=documents.append)] == [image.id]
    (moves,) = Moves.of(documents[0])
    with pytest.raises(ObjectMissing):
        repository.manifest(moves.session)
    assert imager("list", "--repo", repository.store.url).out.count("test") == 1
    check(repository)
    collect(repository, NullProgress())
    (moved,) = moves.packs
    assert moved.pack not in repository.pack_ids()
    check(repository)
    carry_out(repository, moves)  # one that slept meanwhile
    check(repository)


def test_beside_captures(repository: Repository) -> None:
    """Captures that share blocks, removals and compactions at once: nothing is ever missing."""
    errors: list[BaseException] = []
    done = threading.Event()
    compacted: list[bytes] = []

    def capture_all(first: int) -> None:
        own = Repository.open(repository.store.url)
        pick = random.Random(first)
        try:
            for turn in range(14):
                image = take_again_and_again(own, *pick.sample(range(20), 6))
                check(own, image.id)
                if turn % 3:
                    own.remove(image.id)
        except BaseException as error:
            errors.append(error)

    def collect_all() -> None:
        while not done.is_set():
            try:
                compacted.extend(compact(repository, 0.9).compacted)
            except BaseException as error:
                errors.append(error)
            done.wait(0.02)

    def take_again_and_again(own: Repository, *seeds: int) -> Manifest:
        """A capture gives up when gc's take what it shares three times in a row."""
        while True:
            try:
                return take(own, *seeds)
            except ImagerError as error:
                if "keeps removing" not in error.message:
                    raise

    writers = [threading.Thread(target=capture_all, args=(n,)) for n in range(2)]
    collectors = [threading.Thread(target=collect_all) for _ in range(2)]
    for thread in [*writers, *collectors]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in collectors:
        thread.join()
    assert not errors, errors
    check(repository)
    compacted += compact(repository, 0.9).compacted
    check(repository)
    print(f"{len(compacted)} packs were compacted")


# --- documents that are wrong -------------------------------------------------------------------

PACK = bytes(range(16))


def moved_document(**values: object) -> dict[str, Any]:
    good = new_document("moved", pack=PACK.hex(), records=4, runs=[[1, 2, "ab" * 16, 0]])
    return {**good, **values}


def test_a_moved_document_comes_back() -> None:
    there = bytes.fromhex("ab" * 16)
    moved = Moved.of(PACK, 4, [(1, Place(there, 0)), (2, Place(there, 1)), (3, Place(PACK, 5))])
    document = unseal(moved.to_bytes(), "x")
    assert Moved.from_json(document, "x") == moved and len(moved.runs) == 2
    assert dict(moved.places()) == {1: Place(there, 0), 2: Place(there, 1), 3: Place(PACK, 5)}


@pytest.mark.parametrize(
    "values",
    [
        {"records": 0},
        {"records": 1 << 20},
        {"records": "4"},
        {"runs": {}},
        {"runs": [[1, 2, "ab" * 16]]},
        {"runs": [[1, 0, "ab" * 16, 0]]},
        {"runs": [[1, True, "ab" * 16, 0]]},
        {"runs": [[1, 4, "ab" * 16, 0]]},
        {"runs": [[-1, 1, "ab" * 16, 0]]},
        {"runs": [[1, 1, "xy", 0]]},
        {"runs": [[2, 1, "ab" * 16, 0], [1, 1, "ab" * 16, 4]]},
        {"runs": [[1, 2, "ab" * 16, 0], [2, 1, "ab" * 16, 4]]},
    ],
)
def test_wrong_documents(values: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        Moved.from_json(moved_document(**values), "x")


def test_circles_and_lies(repository: Repository) -> None:
    store = repository.store
    image = take(repository, 1, 2)
    top = image.disks[0].top.pack
    circle = moved_document(runs=[[0, 1, PACK.hex(), 0]])
    store.create(moved_name(PACK), seal(circle))
    with pytest.raises(FormatError, match="circle"):
        Pack(store, PACK)
    for n, runs in enumerate(([], [[0, 1, top.hex(), 77]], [[0, 1, "77" * 16, 0]])):
        liar = bytes([n]) * 16
        store.create(moved_name(liar), seal(moved_document(pack=liar.hex(), runs=runs)))
        with pytest.raises(ImagerError):
            Pack(store, liar)
    other = bytes([9]) * 16
    store.create(moved_name(other), seal(moved_document()))
    with pytest.raises(FormatError, match="something else"):
        Pack(store, other)
