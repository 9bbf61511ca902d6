"""What images refer to: the places of all records, found in the pages of their block maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from imager.errors import ImagerError, IntegrityError
from imager.format import Place
from imager.manifest import Disk, Manifest
from imager.repository import Repository

OnDamage = Callable[[ImagerError], object]


def used_packs(
    repository: Repository, manifests: Iterable[Manifest], on_damage: OnDamage | None = None
) -> set[bytes]:
    """Ids of every pack that these images refer to; pages that they share are read once.

    A page that cannot be read is given to ``on_damage``, and without it the error is raised: what
    lies below is not known then.
    """
    packs: set[bytes] = set()
    seen: set[Place] = set()
    for manifest in manifests:
        for disk in manifest.disks:
            packs.add(disk.top.pack)
            packs.update(place.pack for place in _places(repository, disk, seen, on_damage))
    return packs


def _places(
    repository: Repository, disk: Disk, seen: set[Place], on_damage: OnDamage | None
) -> Iterator[Place]:
    todo = [(disk.top, disk.height)]
    while todo:
        place, level = todo.pop()
        if place in seen:
            continue
        seen.add(place)
        try:
            page = repository.page(place)
            if page.level != level:
                raise IntegrityError(f"disk {disk.name}: a map page of another level")
        except ImagerError as error:
            if on_damage is None:
                raise
            on_damage(error)
            continue
        for below in page.places:
            if below is not None:
                yield below
                if level:
                    todo.append((below, level - 1))
