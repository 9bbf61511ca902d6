"""The previous image of a lineage, as a second way to find stored blocks.

The block index is bounded. In a repository that outgrew it, a block that did not change since the
previous image is still found, by its position on the disk, at a memory cost of a few pages.
"""

from __future__ import annotations

import threading

from imager.errors import ImagerError
from imager.format import FANOUT, Page, Place, State
from imager.manifest import Manifest
from imager.repository import Repository, StoredBlocks


class Lineage:
    """May be asked by any thread. Knows nothing while the index is complete."""

    def __init__(
        self, repository: Repository, previous: Manifest | None, disk: str, stored: StoredBlocks
    ) -> None:
        disks = previous.disks if previous and stored.index.is_full else ()
        self._disk = next((item for item in disks if item.name == disk), None)
        if self._disk is not None and self._disk.block_size != repository.block_size:
            self._disk = None
        self._repository = repository
        self._stored = stored
        self._lock = threading.Lock()

    def get(self, block: int, digest: bytes) -> Place | None:
        """Where the previous image has this block, if it is the same and may be shared."""
        if self._disk is None:
            return None
        with self._lock:
            page = self._page(block)
        if page is None:
            return None
        at = block % FANOUT
        place = page.places[at] if at < len(page) and page.digests[at] == digest else None
        return place if place is not None and place.pack in self._stored.packs else None

    def _page(self, block: int) -> Page | None:
        """The page of level 0 that a block is in; None where all of it is zero or unused, and
        after damage, which only costs sharing."""
        assert self._disk is not None
        try:
            page = self._repository.page(self._disk.top)
            for level in range(self._disk.height, 0, -1):
                at = block // FANOUT**level % FANOUT
                place = page.places[at] if at < len(page) else None
                if place is None or page.states[at] != State.DATA:
                    return None
                page = self._repository.page(place)
        except ImagerError:
            self._disk = None
            return None
        return page
