"""Name, id and place in its array of a member of a Linux software RAID."""

from __future__ import annotations

from imager.allocation.md.superblock import find_superblocks
from imager.allocation.model import Filesystem, Membership
from imager.blocksource import BlockSource


def probe(source: BlockSource) -> Filesystem | None:
    """The member, labelled with its array's name, or None. Raises OSError."""
    found = next(find_superblocks(source), None)
    if found is None:
        return None
    return Filesystem(
        kind="md",
        label=found.name,
        uuid=found.set_id or None,
        size=found.data.length or None,
        member_of=Membership("md", found.set_id, found.device_id, found.disks),
        # Negative levels: linear -1, multipath -4, faulty -5, container -100000.
        notes=(f"superblock {found.version}", f"RAID level {found.level}", *found.doubts),
    )


def is_transparent(source: BlockSource) -> bool:
    """Whether the device begins with what the array holds, so that its signatures show."""
    return any(found.data.offset == 0 for found in find_superblocks(source))
