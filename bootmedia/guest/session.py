"""What every terminal of the rescue system shares: the job, the medium, and the repositories.

A repository is opened when it is first looked into, and stays open. Work that needs one, or that
writes to a disk, is done by one terminal at a time: see ``Session.work``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from bootmedia.guest.attached import mounted_repositories
from bootmedia.guest.carriedvolumes import CarriedVolumes
from bootmedia.guest.log import Log
from bootmedia.guest.medium import Medium
from bootmedia.job import Job
from bootmedia.medium import IMAGES_FOLDER
from imager.deviceuse import device_numbers, disk_numbers_below
from imager.errors import ImagerError, IntegrityError, ObjectMissing, RefusedError
from imager.manifest import Manifest
from imager.repository import Repository


@dataclass(frozen=True)
class Origin:
    """Where images come from. ``folder`` is where it is mounted, None for what is fetched."""

    title: str
    url: str
    folder: Path | None = None


class Found(NamedTuple):
    """An image, and the repository that has it."""

    origin: Origin
    repository: Repository
    manifest: Manifest


AskForVolume = Callable[[int], Path]
"""Given the number of a volume: have it put in, and return where it is mounted.

Raises ImagerError (or KeyboardInterrupt) when it is not to be had.
"""


class Session:
    """A context manager: leaving it unmounts what it mounted."""

    def __init__(self, job: Job, medium: Medium | None = None, *, log: Log | None = None) -> None:
        self.job = job
        self.medium = medium
        self.log = log or Log()
        self.ask_for_volume: AskForVolume = _refuse_volume
        self._repositories: dict[str, Repository] = {}
        self._volumes: tuple[Origin, CarriedVolumes] | None = None
        self._attached: list[Origin] = []
        self._mounts = ExitStack()
        self._busy = threading.RLock()
        self._task = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._mounts.close()

    # --- one at a time ---

    @contextmanager
    def work(self, task: str) -> Iterator[None]:
        """Keep other terminals from working at the same time. Raises RefusedError when one is."""
        if not self._busy.acquire(blocking=False):
            raise RefusedError([f"another terminal is at work: {self._task}"])
        before, self._task = self._task, task
        self.log.add(f"{task}: begun")
        try:
            yield
        finally:
            self._task = before
            self.log.add(f"{task}: ended")
            self._busy.release()

    # --- repositories ---

    def origins(self) -> list[Origin]:
        """What the medium carries, what the job names, what was found on attached disks."""
        return [*self._carried(), *self._named(), *self._attached]

    def repository(self, origin: Origin) -> Repository:
        """Raises ImagerError when it cannot be opened; the next call tries again."""
        opened = self._repositories.get(origin.url)
        if opened is None:
            opened = self._open(origin)
            self._repositories[origin.url] = opened
            self.log.add(f"opened the repository {origin.url}, {origin.title}")
        return opened

    def search_disks(self) -> list[Origin]:
        """Look for repositories on all attached disks; those that are found stay mounted
        read-only. Returns the new ones."""
        known = {origin.url for origin in self.origins()}
        new = []
        for device, folder in mounted_repositories(self._mounts, self.log.add):
            if str(folder) not in known:
                new.append(Origin(f"on {device}", str(folder), folder))
        self._attached += new
        return new

    def release_disks(self) -> None:
        """Unmount attached disks, so that they can be written to. Their repositories have to be
        searched for again."""
        for origin in self._attached:
            self.forget(origin)
        self._attached = []
        self._mounts.close()

    def forget(self, origin: Origin) -> None:
        """Have a repository opened anew when it is next used."""
        self._repositories.pop(origin.url, None)
        if self._volumes is not None and origin == self._volumes[0]:
            self._volumes = None

    def _carried(self) -> Iterator[Origin]:
        if self._volumes is not None:  # whichever volume is in
            yield self._volumes[0]
        elif self.medium is not None and self.job.images:
            folder = self.medium.folder / IMAGES_FOLDER
            if (folder / "repository.json").exists():
                yield Origin("on this medium", str(folder), folder)

    def _named(self) -> Iterator[Origin]:
        for url in self.job.repositories:
            yield Origin("named by this medium", url, None if "://" in url else Path(url))

    def _open(self, origin: Origin) -> Repository:
        medium = self.medium
        if medium is None or self.job.volumes < 2 or origin not in self._carried():
            return Repository.open(origin.url)
        volumes = CarriedVolumes(
            medium.folder, self.job.volumes, lambda number: self.ask_for_volume(number)
        )
        repository = Repository.open_store(volumes.store)
        self._volumes = origin, volumes
        return repository

    # --- volumes ---

    def survey_volumes(self, found: Found) -> None:
        """Before an image is restored from several volumes: have each of them put in once, so
        that planning, which looks at all packs, does not ask for them time and again."""
        if self._volumes is not None and found.origin == self._volumes[0]:
            self._volumes[1].survey(found.repository)

    @contextmanager
    def without_asking(self) -> Iterator[None]:
        """For the time of the block, what is on a volume that is not at hand is missing."""
        before, self.ask_for_volume = self.ask_for_volume, _refuse_volume
        try:
            yield
        finally:
            self.ask_for_volume = before

    # --- images ---

    def find(self, text: str) -> Found:
        """An image by id, prefix or ``NAME@latest``, from the first origin that has it.

        Raises ImagerError telling what each origin said, IntegrityError as ``check_pinned``.
        """
        said = []
        for origin in self.origins():
            try:
                repository = self.repository(origin)
                manifest = repository.find(text)
            except IntegrityError:
                raise
            except ImagerError as error:
                said.append(f"{origin.url} ({origin.title}): {error.message}")
                continue
            self.check_pinned(manifest)
            return Found(origin, repository, manifest)
        lines = "".join(f"\n  - {line}" for line in said) or " no repository is at hand"
        raise ObjectMissing(
            f"the image {text} was not found:{lines}",
            hint="attach the disk that has it, or set up the network, then try again",
        )

    def check_pinned(self, manifest: Manifest) -> None:
        """Raises IntegrityError when an image is not what it was when the medium was made."""
        for pinned in self.job.images:
            if pinned.id != manifest.id:
                continue
            then = {disk.name: disk.root for disk in pinned.disks}
            now = {disk.name: disk.root for disk in manifest.disks}
            if now != then:
                changed = sorted(name for name in then | now if then.get(name) != now.get(name))
                raise IntegrityError(
                    f"the image {manifest.id} has changed since the medium was made "
                    f"({', '.join(changed)}): its root digest is another one",
                    hint="find out who changed the repository; a new medium pins what it has now",
                )

    # --- what must not be written to ---

    def reserved(self, path: str) -> str | None:
        """Why a disk is not offered as a target: it is the medium, or has a repository on it."""
        try:
            numbers = device_numbers(path)
        except OSError:
            return None  # pulled out: nothing can be written there
        medium = self.medium
        if medium and (
            (medium.device and numbers & device_numbers(medium.device))
            or numbers & disk_numbers_below(medium.folder)
        ):
            return "this rescue medium"
        for origin in self.origins():
            if origin.folder and numbers & disk_numbers_below(origin.folder):
                return "holds a repository"
        return None


def _refuse_volume(number: int) -> Path:
    raise ObjectMissing(f"volume {number} of the medium is needed, and nobody is there to be asked")
