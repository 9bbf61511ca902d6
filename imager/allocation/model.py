"""What the allocation readers share: their results and a few ways to read foreign bytes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

from imager.blocksource import BlockSource
from imager.errors import NotRecognized
from imager.extents import Extents

Certainty = Literal["exact", "union", "all"]


@dataclass(frozen=True)
class Membership:
    """Says that this device is one of a set that belongs together."""

    set_kind: str
    """``btrfs``, ``lvm`` or ``md``."""
    set_id: str
    device_id: str
    members: int | None
    """How many devices the set has, when its metadata says so."""


@dataclass(frozen=True)
class Filesystem:
    """What a superblock says of itself. Sizes in bytes; None where it says nothing."""

    kind: str
    label: str | None = None
    uuid: str | None = None
    size: int | None = None
    used_bytes: int | None = None
    block_size: int | None = None
    member_of: Membership | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of ``to_json``; unknown keys are ignored."""
        member = data.get("member_of")
        return cls(
            kind=data["kind"],
            label=data.get("label"),
            uuid=data.get("uuid"),
            size=data.get("size"),
            used_bytes=data.get("used_bytes"),
            block_size=data.get("block_size"),
            member_of=_membership(member) if member else None,
            notes=tuple(data.get("notes", ())),
        )


class Companion(NamedTuple):
    """Another partition or disk that is captured together with the one in question."""

    filesystem: Filesystem
    """What ``identify`` says it holds."""
    source: BlockSource


@dataclass(frozen=True)
class AllocationMap:
    """Which bytes of a source are in use; everything else need not be read."""

    used: Extents
    certainty: Certainty
    """``exact``; ``union`` of the states before and after a journal replay; or ``all`` of it, or of
    what a volume manager has given out."""
    reason: str | None = None
    """Why the map is not exact; of a container, what its parts are and how each was mapped."""


LookInside = Callable[[BlockSource], tuple[Filesystem, AllocationMap]]
"""Identifies and maps what a container holds: a logical volume, or the data of a mirror."""


def all_used(source: BlockSource, reason: str) -> AllocationMap:
    """The answer to any doubt."""
    return AllocationMap(Extents.whole(source.size), "all", reason)


def read_if_inside(source: BlockSource, offset: int, length: int) -> bytes:
    """``length`` bytes at ``offset``, or nothing when the source doesn't reach that far.

    Raises OSError for unreadable sectors.
    """
    if offset < 0 or length < 0 or offset + length > source.size:
        return b""
    return source.pread(offset, length)


def require(condition: bool, doubt: str) -> None:
    """Raises NotRecognized with ``doubt`` unless the condition holds."""
    if not condition:
        raise NotRecognized(doubt)


def text(raw: bytes, encoding: str = "utf-8") -> str | None:
    """A zero-terminated string field; None when empty."""
    return raw.decode(encoding, errors="replace").split("\0", 1)[0].rstrip() or None


def uuid_text(raw: bytes) -> str | None:
    """16 bytes in big-endian field order as a UUID; None for the nil UUID."""
    return str(uuid.UUID(bytes=raw)) if any(raw) else None


def _membership(data: Mapping[str, Any]) -> Membership:
    return Membership(
        set_kind=data["set_kind"],
        set_id=data["set_id"],
        device_id=data["device_id"],
        members=data.get("members"),
    )
