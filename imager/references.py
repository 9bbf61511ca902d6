"""What images refer to: the places of all records, found in the pages of their block maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from imager.errors import FormatError, ImagerError, IntegrityError, ObjectMissing
from imager.format import PageColumns, Place
from imager.manifest import Disk, Manifest
from imager.moved import Moved, read_moved
from imager.repository import Repository

OnDamage = Callable[[ImagerError], object]


class Usage:
    """The packs that images use and, if asked for, which of their records."""

    def __init__(self, *, records: bool = False) -> None:
        self.packs: set[bytes] = set()
        self._bits: dict[bytes, bytearray] | None = {} if records else None

    def add(self, place: Place) -> None:
        self.packs.add(place.pack)
        if self._bits is not None:
            self._mark(self._bits.setdefault(place.pack, bytearray()), place.ordinal)

    def add_page(self, columns: PageColumns) -> None:
        """All that a page refers to."""
        self.packs.update(columns.packs)
        if self._bits is None:
            return
        columns_bits = [self._bits.setdefault(pack, bytearray()) for pack in columns.packs]
        for number, ordinal in zip(columns.numbers, columns.ordinals, strict=True):
            if number < len(columns_bits):
                self._mark(columns_bits[number], ordinal)

    def uses(self, place: Place) -> bool:
        """Whether a record is used; needs ``records``."""
        assert self._bits is not None
        bits = self._bits.get(place.pack, b"")
        return place.ordinal < 8 * len(bits) and bool(
            bits[place.ordinal >> 3] >> (place.ordinal & 7) & 1
        )

    def follow(self, read: Callable[[bytes], Moved | None]) -> None:
        """Add the places where records of moved packs are now. ``read`` tells of a pack's."""
        todo = list(self.packs)
        while todo:
            moved = read(todo.pop())
            for ordinal, place in moved.places() if moved else ():
                if self._bits is None:
                    is_news = place.pack not in self.packs
                else:
                    assert moved is not None
                    used = self.uses(Place(moved.pack, ordinal))
                    is_news = used and not self.uses(place)
                if is_news:
                    self.add(place)
                    if not todo or todo[-1] != place.pack:
                        todo.append(place.pack)

    @staticmethod
    def _mark(bits: bytearray, ordinal: int) -> None:
        at = ordinal >> 3
        if at >= len(bits):
            bits.extend(bytes(at + 1 - len(bits)))
        bits[at] |= 1 << (ordinal & 7)


def find_usage(
    repository: Repository,
    manifests: Iterable[Manifest],
    on_damage: OnDamage | None = None,
    *,
    records: bool = False,
) -> Usage:
    """All that these images refer to, where moved records are now included; pages that they share
    are read once.

    A page that cannot be read is given to ``on_damage``, and without it the error is raised: what
    lies below is not known then.
    """
    usage = Usage(records=records)
    seen: set[Place] = set()
    for manifest in manifests:
        for disk in manifest.disks:
            usage.add(disk.top)
            for columns in _pages(repository, disk, seen, on_damage):
                usage.add_page(columns)
    moved = repository.moved_ids()  # after the maps: what they led to is known by now
    usage.follow(lambda pack: _read_moved(repository, pack, on_damage) if pack in moved else None)
    return usage


def used_packs(
    repository: Repository, manifests: Iterable[Manifest], on_damage: OnDamage | None = None
) -> set[bytes]:
    """Ids of every pack that these images refer to, as ``find_usage``."""
    return find_usage(repository, manifests, on_damage).packs


def _read_moved(repository: Repository, pack: bytes, on_damage: OnDamage | None) -> Moved | None:
    try:
        return read_moved(repository.store, pack)
    except ObjectMissing:
        return None  # removed meanwhile
    except ImagerError as error:
        if on_damage is None:
            raise
        on_damage(error)
        return None


def _pages(
    repository: Repository, disk: Disk, seen: set[Place], on_damage: OnDamage | None
) -> Iterator[PageColumns]:
    todo = [(disk.top, disk.height)]
    while todo:
        place, level = todo.pop()
        if place in seen:
            continue
        seen.add(place)
        try:
            columns = _columns(repository, place)
            if columns.level != level:
                raise IntegrityError(f"disk {disk.name}: a map page of another level")
            if level:
                todo += [(below, level - 1) for below in columns.places()]
        except ImagerError as error:
            if on_damage is None:
                raise
            on_damage(error)
            continue
        yield columns


def _columns(repository: Repository, place: Place) -> PageColumns:
    try:
        return PageColumns.of(repository.page_content(place))
    except FormatError as error:
        raise FormatError(f"{repository.store.url}, page {place}: {error.message}") from None
