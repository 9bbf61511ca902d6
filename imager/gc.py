"""Remove packs that no image uses, also while captures run (`docs/format.md`, "Removing packs").

In two steps, so that no capture can lose a pack that it shares. Condemn: packs that no manifest
refers to are named in ``trash/``; from then on no capture shares them, and one that did stores them
again before it commits. Delete: when the captures that were open at that time have ended, or were
expired, the manifests are read again, and what they still don't refer to is deleted. A gc that is
killed leaves a trash list, and the next one goes on with it.

Packs that are mostly dead go the same way when that is asked for: condemned first, and when nothing
can share them any more, the records that images use are written into new packs (`compact.py`).
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from imager.compact import Moves, carry_out, compact, find_sparse
from imager.errors import FormatError, ObjectExists, ObjectMissing
from imager.format import seal, unseal
from imager.manifest import Manifest, new_document
from imager.moved import moved_name
from imager.pack import pack_name
from imager.progress import Progress
from imager.proofs import remove_orphans
from imager.references import Usage, find_usage
from imager.repository import Repository, TrashList, utc_now


@dataclass
class GcResult:
    """What a gc did. Sizes in bytes; ``waiting_for`` are captures that have to end first."""

    deleted: list[bytes] = field(default_factory=list)
    deleted_bytes: int = 0
    condemned: list[bytes] = field(default_factory=list)
    condemned_bytes: int = 0
    expired: list[str] = field(default_factory=list)
    waiting_for: list[str] = field(default_factory=list)
    compacted: list[bytes] = field(default_factory=list)
    """Packs whose records were moved, or would be; ``compacted_bytes`` is what that frees."""
    compacted_bytes: int = 0
    kept_packs: int = 0

    def to_json(self) -> dict[str, Any]:
        packs = {
            "deleted": [pack.hex() for pack in self.deleted],
            "condemned": [pack.hex() for pack in self.condemned],
            "compacted": [pack.hex() for pack in self.compacted],
        }
        return vars(self) | packs


def collect(
    repository: Repository,
    progress: Progress,
    *,
    expire: bool = False,
    dry_run: bool = False,
    below: float = 0,
) -> GcResult:
    """Finish what earlier runs condemned, condemn what is unused now, and delete it at once when
    no capture is open.

    ``expire``: end all open captures, which then fail when they come to commit; without it only
    those whose process on this host has died. ``below``: compact packs of which images use a
    smaller part than that, 0 for none. Raises ImagerError, and deletes nothing, when a
    manifest or map cannot be read: what it refers to is not known then.
    """
    return _Collector(repository, progress, expire, dry_run, below).run()


class _Collector:
    def __init__(
        self,
        repository: Repository,
        progress: Progress,
        expire: bool,
        dry_run: bool,
        below: float,
    ) -> None:
        self._repository = repository
        self._store = repository.store
        self._progress = progress
        self._expire = expire
        self._dry_run = dry_run
        self._below = below
        self._result = GcResult()

    def run(self) -> GcResult:
        self._end_dead_sessions()
        stored = set(self._repository.pack_ids())  # before the manifests: a pack comes first
        moved = self._repository.moved_ids()  # and what refers to it ended before it was moved
        usage = self._usage()
        unused = stored - usage.packs
        sparse = self._sparse(stored - unused, usage)
        old = list(self._repository.trash())
        new = (unused | sparse.keys()).difference(*(trash.packs for trash in old))
        self._result.kept_packs = len(stored) - len(unused)
        if self._dry_run:
            self._note_condemned(unused)
            self._result.compacted += sorted(sparse)
            self._result.compacted_bytes += sum(sparse.values())
            return self._result
        if new:
            old.append(self._condemn(new))
        self._finish(old)
        for pack in moved - usage.packs:
            with suppress(ObjectMissing):
                self._store.delete(moved_name(pack))
        remove_orphans(self._repository, set(self._repository.image_ids()))
        self._store.clear_leftovers()
        return self._result

    def _usage(self) -> Usage:
        """What all images use. What an earlier gc had decided to move is moved on the way."""
        return find_usage(self._repository, self._images(), records=self._below > 0)

    def _images(self) -> Iterator[Manifest]:
        moves: list[Moves] = []
        yield from self._repository.manifests(
            on_other=lambda document: moves.extend(Moves.of(document))
        )
        for item in moves if not self._dry_run else ():
            carry_out(self._repository, item)

    def _sparse(self, packs: set[bytes], usage: Usage) -> dict[bytes, int]:
        """Packs worth compacting, and the bytes that this frees."""
        if not self._below:
            return {}
        return find_sparse(self._repository, packs, usage, self._below, self._progress)

    # --- captures that are under way ---

    def _end_dead_sessions(self) -> None:
        for image_id in self._repository.sessions():
            if self._expire or self._is_dead(image_id):
                self._end(image_id)

    def _is_dead(self, image_id: str) -> bool:
        """Whether it was a process of this host that is gone. Others cannot be judged."""
        name = f"sessions/{image_id}.json"
        try:
            document = unseal(self._store.read(name), f"{self._store.url}/{name}")
        except (ObjectMissing, FormatError):
            return False
        pid = document.get("pid")
        if document.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
            return False
        with suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except (ProcessLookupError, OverflowError):
                return True
        return False

    def _end(self, image_id: str) -> None:
        """Take the place of the manifest, so that the capture can't commit; or it has done so.

        The mark stays: a capture that was only stopped may wake up in a year.
        """
        if self._dry_run:
            return
        document = new_document("aborted", id=image_id, aborted=utc_now())
        try:
            self._store.create(f"manifests/{image_id}.json", seal(document))
            self._result.expired.append(image_id)
            self._progress.note(f"the capture {image_id} was expired")
        except ObjectExists:
            pass  # the image exists: the capture died between its commit and its end
        self._repository.close_session(image_id)

    # --- packs ---

    def _condemn(self, packs: set[bytes]) -> TrashList:
        """Name the packs in the trash; then see who is open: whoever comes later knows of it."""
        name = f"trash/{utc_now().lower().replace(':', '')}-{secrets.token_hex(4)}"
        listed = sorted(pack.hex() for pack in packs)
        self._store.create(f"{name}.json", seal(new_document("trash", packs=listed)))
        sessions = self._repository.sessions()
        self._note_condemned(packs)
        if sessions:
            # The list again, now with what it waits for. The first stays until the second is there.
            document = new_document("trash", packs=listed, sessions=sessions)
            self._store.create(f"{name}-open.json", seal(document))
            self._store.delete(f"{name}.json")
            name += "-open"
        return TrashList(f"{name}.json", frozenset(packs), frozenset(sessions))

    def _note_condemned(self, packs: set[bytes]) -> None:
        self._result.condemned += sorted(packs)
        self._result.condemned_bytes += sum(map(self._size, packs))

    def _finish(self, lists: list[TrashList]) -> None:
        """Delete what is condemned and still unused, unless captures could be using it."""
        still_open = frozenset(self._repository.sessions())
        waiting = {
            trash: still_open if trash.sessions is None else still_open & trash.sessions
            for trash in lists
        }
        self._result.waiting_for += sorted(frozenset().union(*waiting.values()))
        ready = [trash for trash in lists if not waiting[trash]]
        if not ready:
            return
        usage = self._usage()  # again, and after the sessions: an ended capture has committed
        condemned = frozenset().union(*(trash.packs for trash in ready))
        self._delete(condemned - usage.packs)
        self._compact(condemned & usage.packs, usage, {trash.name for trash in ready})
        for trash in ready:
            with suppress(ObjectMissing):
                self._store.delete(trash.name)

    def _compact(self, packs: frozenset[bytes], usage: Usage, lists: set[str]) -> None:
        """Move what images use of these condemned packs; ``lists`` are those that say so."""
        sparse = self._sparse(set(packs & set(self._repository.pack_ids())), usage)
        if sparse:
            done = compact(self._repository, sorted(sparse), usage, lists, self._progress)
            self._result.compacted += done
            self._result.compacted_bytes += sum(sparse[pack] for pack in done)

    def _delete(self, packs: frozenset[bytes]) -> None:
        for pack in sorted(packs):
            size = self._size(pack)
            with suppress(ObjectMissing):
                self._store.delete(pack_name(pack))
                self._result.deleted.append(pack)
                self._result.deleted_bytes += size

    def _size(self, pack: bytes) -> int:
        try:
            return self._store.size(pack_name(pack))
        except ObjectMissing:
            return 0
