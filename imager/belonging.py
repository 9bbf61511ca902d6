"""Disks that belong together: members of a mirror, a volume group, or a Btrfs over several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imager.allocation import Membership
    from imager.capture import SourceDisk

_NAMES = {"btrfs": "Btrfs filesystem", "lvm": "LVM volume group", "md": "RAID array"}


def missing_members(disks: Iterable[SourceDisk]) -> list[str]:
    """A text for each set of which not every member is among the disks."""
    found: dict[tuple[str, str], list[Membership]] = {}
    for disk in disks:
        for volume in disk.layout.volumes:
            member = volume.filesystem.member_of
            if member is not None:
                found.setdefault((member.set_kind, member.set_id), []).append(member)
    texts = []
    for (kind, set_id), members in found.items():
        expected = max((member.members or 1 for member in members), default=1)
        present = len({member.device_id for member in members})
        if present < expected:
            texts.append(
                f"{_NAMES.get(kind, kind)} {set_id} has {expected} devices, and only {present} "
                f"of them are captured: name the other disks too"
            )
    return texts
