"""The block map of a disk: a sparse tree of pages (`docs/format.md`, "Block map")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from imager.errors import ImagerError, IntegrityError, ObjectMissing
from imager.extents import Extents
from imager.format import (
    FANOUT,
    NO_DIGEST,
    Page,
    Place,
    State,
    map_height,
    page_entries,
)


class Run(NamedTuple):
    """Neighbouring blocks of one state, from block ``first`` on; one block if it has a place."""

    first: int
    blocks: int
    state: State
    digest: bytes
    place: Place | None


_STATES = tuple(State)  # by their number

OnDamage = Callable[[int, int, ImagerError], object]


class PageSource(Protocol):
    def page(self, place: Place) -> Page:
        """Read and decode a page. Raises IntegrityError or ObjectMissing."""


class BlockMapWriter:
    """Takes a disk's blocks in order and stores the pages as they fill."""

    def __init__(self, blocks: int, store_page: Callable[[Page], Place]) -> None:
        self._blocks = blocks
        self._store_page = store_page
        self.height = map_height(blocks)
        self._levels = [_Filling(level) for level in range(self.height + 1)]
        self._added = 0

    def add(self, state: State, digest: bytes = NO_DIGEST, place: Place | None = None) -> None:
        """The next block."""
        self._added += 1
        self._append(0, state, digest, place)

    def add_run(self, state: State, count: int) -> None:
        """The next ``count`` blocks, all zero or all unused."""
        self._added += count
        if self._added > self._blocks:
            raise ValueError(f"{self._added} blocks were added, of {self._blocks}")
        self._append_run(0, state, count)

    def finish(self) -> tuple[Place, bytes]:
        """Store what is left; the place and the content digest of the top page."""
        if self._added != self._blocks:
            raise ValueError(f"{self._added} blocks were added, of {self._blocks}")
        for level in range(self.height):
            if self._levels[level].states:
                self._close_page(level)
        top = self._levels[self.height].take()
        return self._store_page(top), top.content_digest()

    def _append(self, level: int, state: State, digest: bytes, place: Place | None) -> None:
        filling = self._levels[level]
        filling.append(state, digest, place)
        if len(filling.states) == FANOUT and level < self.height:
            self._close_page(level)

    def _append_run(self, level: int, state: State, count: int) -> None:
        """Whole pages of one state are one entry in the level above."""
        while count:
            filling = self._levels[level]
            if not filling.states and count >= FANOUT and level < self.height:
                self._append_run(level + 1, state, count // FANOUT)
                count %= FANOUT
                continue
            part = min(count, FANOUT - len(filling.states))
            filling.append_run(state, part)
            count -= part
            if len(filling.states) == FANOUT and level < self.height:
                self._close_page(level)

    def _close_page(self, level: int) -> None:
        page = self._levels[level].take()
        for state in (State.ZERO, State.UNUSED):
            if page.states.count(state) == len(page):
                self._append(level + 1, state, NO_DIGEST, None)
                return
        self._append(level + 1, State.DATA, page.content_digest(), self._store_page(page))


class _Filling:
    """The page of one level that is being filled."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._clear()

    def _clear(self) -> None:
        self.states = bytearray()
        self._digests: list[bytes] = []
        self._places: list[Place | None] = []

    def append(self, state: State, digest: bytes, place: Place | None) -> None:
        self.states.append(state)
        self._digests.append(digest)
        self._places.append(place)

    def append_run(self, state: State, count: int) -> None:
        self.states += bytes([state]) * count
        self._digests += [NO_DIGEST] * count
        self._places += [None] * count

    def take(self) -> Page:
        page = Page(self._level, bytes(self.states), tuple(self._digests), tuple(self._places))
        self._clear()
        return page


class BlockMap:
    """A stored block map. Pages are read as they are needed and checked against their parent."""

    def __init__(
        self, source: PageSource, *, blocks: int, height: int, top: Place, top_digest: bytes | None
    ) -> None:
        """``top_digest``: what the top page's content digest must be, or None to accept any."""
        self._source = source
        self._blocks = blocks
        self._height = height
        self._top = top
        self._top_digest = top_digest

    def runs(
        self, first: int = 0, end: int | None = None, *, on_damage: OnDamage | None = None
    ) -> Iterator[Run]:
        """Blocks ``first`` to ``end`` in order; zero and unused ones in runs.

        When a page is missing, damaged or belongs to another place in the tree, ``on_damage`` is
        told the blocks that are lost (first, number, error); without it, the error is raised.
        """
        stop = self._blocks if end is None else min(end, self._blocks)
        if first < stop:
            top = self.page(self._top, self._height, 0, self._top_digest)
            yield from _join(self._walk(top, 0, first, stop, on_damage))

    def extents(self, state: State, block_size: int) -> Extents:
        """Where all blocks are of a state, in bytes, the last one in full."""
        return Extents.from_sorted(
            (run.first * block_size, run.blocks * block_size)
            for run in self.runs()
            if run.state == state
        )

    def page(self, place: Place, level: int, index: int, digest: bytes | None) -> Page:
        """One page; ``index`` counts the pages of its level."""
        page = self._source.page(place)
        if page.level != level or len(page) != page_entries(self._blocks, level, index):
            raise IntegrityError(f"map page {index} of level {level} belongs elsewhere")
        if digest is not None and page.content_digest() != digest:
            raise IntegrityError(f"map page {index} of level {level} is not what its parent says")
        return page

    def _walk(
        self, page: Page, index: int, first: int, stop: int, on_damage: OnDamage | None
    ) -> Iterator[Run]:
        """``index``: the page's number in its level."""
        unit = FANOUT**page.level  # blocks below one entry
        base = index * FANOUT
        for n in range(max(first // unit - base, 0), min(-(-stop // unit) - base, len(page))):
            state, place = _STATES[page.states[n]], page.places[n]
            start = (base + n) * unit
            begin = max(start, first)
            count = min(start + unit, stop) - begin
            if place is None or not page.level:
                yield Run(begin, count, state, page.digests[n], place)
                continue
            try:
                below = self.page(place, page.level - 1, base + n, page.digests[n])
            except (IntegrityError, ObjectMissing) as error:
                if on_damage is None:
                    raise
                on_damage(begin, count, error)
                continue
            yield from self._walk(below, base + n, first, stop, on_damage)


def _join(runs: Iterator[Run]) -> Iterator[Run]:
    """Neighbouring runs without a place, of the same state, made one."""
    last: Run | None = None
    for run in runs:
        if last is not None and last.place is run.place is None and last.state == run.state:
            last = last._replace(blocks=last.blocks + run.blocks)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
