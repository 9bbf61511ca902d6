"""Remove packs that no image uses, also while captures run (`docs/format.md`, "Removing packs").

In two steps, so that no capture can lose a pack that it shares. Condemn: packs that no manifest
refers to are named in ``trash/``; from then on no capture shares them, and one that did stores them
again before it commits. Delete: when the captures that were open at that time have ended, or were
expired, the manifests are read again, and what they still don't refer to is deleted. A gc that is
killed leaves a trash list, and the next one goes on with it.
"""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from imager.errors import FormatError, ObjectExists, ObjectMissing
from imager.format import seal, unseal
from imager.manifest import new_document
from imager.pack import pack_name
from imager.progress import Progress
from imager.proofs import remove_orphans
from imager.references import used_packs
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
    kept_packs: int = 0

    def to_json(self) -> dict[str, Any]:
        packs = {
            "deleted": [pack.hex() for pack in self.deleted],
            "condemned": [pack.hex() for pack in self.condemned],
        }
        return vars(self) | packs


def collect(
    repository: Repository, progress: Progress, *, expire: bool = False, dry_run: bool = False
) -> GcResult:
    """Finish what earlier runs condemned, condemn what is unused now, and delete it at once when
    no capture is open.

    ``expire``: end all open captures, which then fail when they come to commit; without it only
    those whose process on this host has died. Raises ImagerError, and deletes nothing, when a
    manifest or map cannot be read: what it refers to is not known then.
    """
    return _Collector(repository, progress, expire, dry_run).run()


class _Collector:
    def __init__(
        self, repository: Repository, progress: Progress, expire: bool, dry_run: bool
    ) -> None:
        self._repository = repository
        self._store = repository.store
        self._progress = progress
        self._expire = expire
        self._dry_run = dry_run
        self._result = GcResult()

    def run(self) -> GcResult:
        self._end_dead_sessions()
        stored = set(self._repository.pack_ids())  # before the manifests: a pack comes first
        unused = stored - self._used()
        old = list(self._repository.trash())
        new = unused.difference(*(trash.packs for trash in old))
        self._result.kept_packs = len(stored) - len(unused)
        if self._dry_run:
            self._note_condemned(unused)
            return self._result
        if new:
            old.append(self._condemn(new))
        self._finish(old)
        remove_orphans(self._repository, set(self._repository.image_ids()))
        self._store.clear_leftovers()
        return self._result

    def _used(self) -> set[bytes]:
        return used_packs(self._repository, self._repository.manifests())

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
        used = self._used()  # again, and after the sessions: an ended capture has committed
        for trash in ready:
            self._delete(trash.packs - used)
            with suppress(ObjectMissing):
                self._store.delete(trash.name)

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
