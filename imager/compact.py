"""Compacting packs that are mostly dead (`docs/format.md`, "Moved packs").

The records that images use are copied into new packs, and a small object tells where each is now;
maps and manifests stay as they are. It is sound beside captures and other gc's, without locks:

- The packs are condemned, and what was open then has ended: so no capture can come to share a
  record that is left behind. The list that condemns them must stand until the end. One of our own,
  which waits for our own session, makes sure of that.
- Our session keeps every other gc from deleting the new packs, to which nothing refers yet.
- Who expires our session and we ourselves create the same object, ``manifests/SESSION.json``: only
  one of the two does. With ours, which holds all moves, they are decided, and any gc that finds it
  carries them out.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from imager.errors import FormatError, ImagerError, IntegrityError, ObjectExists, ObjectMissing
from imager.format import RECORD_HEADER_LENGTH, PackKind, Place, crc32, seal
from imager.manifest import new_document
from imager.moved import Moved, moved_name
from imager.pack import Pack, Packer, Record, pack_name
from imager.progress import Progress
from imager.references import Usage
from imager.repository import Repository, new_image_id, utc_now

# What is copied before the old packs go: bounds the room that a compaction needs.
_BATCH_BYTES = 256 << 20

# A pack that would free less than this is not worth a new object.
_LEAST_GAIN = 64 << 10


@dataclass(frozen=True)
class Moves:
    """What one compaction has decided; ``session`` is the object's name."""

    session: str
    packs: tuple[Moved, ...]

    @classmethod
    def of(cls, document: dict[str, Any]) -> Iterator[Moves]:
        """Of an object that lies among the manifests; none if it tells of something else."""
        if document.get("kind") == "moves":
            where = f"manifests/{document.get('id')}.json"
            items = document.get("packs")
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                raise FormatError(f"{where}: not a list of moved packs")
            moved = tuple(Moved.from_json(item, where) for item in items)
            yield cls(str(document.get("id")), moved)

    def to_bytes(self) -> bytes:
        packs = [moved.to_json() for moved in self.packs]
        return seal(new_document("moves", id=self.session, packs=packs))


def find_sparse(
    repository: Repository, packs: Iterable[bytes], usage: Usage, below: float, progress: Progress
) -> dict[bytes, int]:
    """Packs of which images use less than ``below`` of the bytes, and what compacting would free.

    A damaged pack is noted and left alone: nothing of it may get lost that could be saved.
    """
    found = {}
    for pack_id in sorted(packs):
        try:
            pack = Pack(repository.store, pack_id)
        except ObjectMissing:
            continue
        except ImagerError as error:
            progress.note(f"not compacted: {error.message}")
            continue
        sizes = [RECORD_HEADER_LENGTH + entry.frame_length for entry in pack.entries]
        live = sum(size for n, size in enumerate(sizes) if usage.uses(Place(pack_id, n)))
        gain = sum(sizes) - live
        if not pack.is_moved and live < below * sum(sizes) and gain >= _LEAST_GAIN:
            found[pack_id] = gain
    return found


def compact(
    repository: Repository,
    packs: list[bytes],
    usage: Usage,
    lists: set[str],
    progress: Progress,
) -> list[bytes]:
    """Move the used records of condemned packs; the packs that are gone then.

    ``lists``: names of the trash lists that condemn them, all of them ready. ``usage`` was found
    after they were. Ends early, without harm, when another gc has taken the lists or our session.
    """
    done: list[bytes] = []
    rest = list(packs)
    while rest:
        with _guarded(repository, rest) as session:
            if not lists <= {trash.name for trash in repository.trash()}:
                progress.note("another gc has finished meanwhile: the rest is left to the next one")
                break
            moved, rest = _copy(repository, rest, usage, progress)
            if not moved:
                continue
            moves = Moves(session, tuple(moved))
            try:
                repository.store.create(f"manifests/{session}.json", moves.to_bytes())
            except ObjectExists:
                progress.note("another gc has ended this compaction: nothing was lost")
                break
            carry_out(repository, moves)
            done += [item.pack for item in moved]
    return done


def carry_out(repository: Repository, moves: Moves) -> None:
    """Tell where the records are, then remove the old packs. May be done again, by anybody."""
    store = repository.store
    for moved in moves.packs:
        with suppress(ObjectExists):
            store.create(moved_name(moved.pack), moved.to_bytes())
    for moved in moves.packs:
        with suppress(ObjectMissing):
            store.delete(pack_name(moved.pack))
    with suppress(ObjectMissing):
        store.delete(f"manifests/{moves.session}.json")


@contextmanager
def _guarded(repository: Repository, packs: list[bytes]) -> Iterator[str]:
    """A session of our own, and a list that condemns the packs for as long as it is open."""
    session = new_image_id()
    document = new_document(
        "session", id=session, host=socket.gethostname(), pid=os.getpid(), started=utc_now()
    )
    name = f"trash/{session}-moving.json"
    listed = sorted(pack.hex() for pack in packs)
    with ExitStack() as stack:
        repository.open_session(session, document)
        stack.callback(repository.close_session, session)
        repository.store.create(name, seal(new_document("trash", packs=listed)))
        stack.callback(_delete, repository, name)
        yield session


def _delete(repository: Repository, name: str) -> None:
    with suppress(ObjectMissing):
        repository.store.delete(name)


def _copy(
    repository: Repository, packs: list[bytes], usage: Usage, progress: Progress
) -> tuple[list[Moved], list[bytes]]:
    """Write the used records of some of the packs anew; what was moved, and the packs left."""
    moved: list[Moved] = []
    with ExitStack() as stack:
        packers = {kind: stack.enter_context(Packer(repository.store, kind)) for kind in PackKind}
        for n, pack_id in enumerate(packs):
            if sum(packer.bytes_begun for packer in packers.values()) >= _BATCH_BYTES:
                return moved, packs[n:]
            try:
                pack = Pack(repository.store, pack_id)
                if not pack.is_moved:
                    moved.append(_copy_pack(pack, packers[pack.kind], usage))
            except ObjectMissing:
                continue  # another gc was quicker
            except IntegrityError as error:
                progress.note(f"not compacted: {error.message}")
    return moved, []


def _copy_pack(pack: Pack, packer: Packer, usage: Usage) -> Moved:
    places = [
        (ordinal, packer.append(Record(pack.entries[ordinal], bytes(frame))))
        for ordinal, frame in _used_frames(pack, usage)
    ]
    return Moved.of(pack.id, len(pack.entries), places)


def _used_frames(pack: Pack, usage: Usage) -> Iterator[tuple[int, memoryview]]:
    """Frames as they are stored, checked by their CRC: what has rotted is not given a new place."""
    for ordinal in range(len(pack.entries)):
        if not usage.uses(Place(pack.id, ordinal)):
            continue
        content = pack.read(ordinal, 1)
        frame = pack.frame(content, ordinal, ordinal)
        if not pack.header_is_right(content, ordinal, ordinal) or (
            crc32(frame) != pack.entries[ordinal].frame_crc
        ):
            raise IntegrityError(f"{pack.name}, record {ordinal} is damaged; see: imager verify")
        yield ordinal, frame
