"""Which filesystem a partition holds, and which of its bytes that filesystem uses.

One file (or package) a kind. Each has ``probe(source)``; the kinds with a map of their own also
have ``allocation_map(source, filesystem)``; those that lie on several devices take
``companions``, the other members that are at hand, as a third argument. They never import each
other; what they share is in ``model``, ``bitmap`` and ``checksum``. Adding a kind is a line in
the table of ``registry``.

Any doubt means all of it: a missed block would be lost data.
"""

from __future__ import annotations

from imager.allocation.model import AllocationMap, Companion, Filesystem, Membership
from imager.allocation.registry import allocation_map, identify, transparent_raid

__all__ = [
    "AllocationMap",
    "Companion",
    "Filesystem",
    "Membership",
    "allocation_map",
    "identify",
    "transparent_raid",
]
