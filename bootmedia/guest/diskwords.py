"""A disk in one line."""

from __future__ import annotations

from imager.diskidentity import DiskIdentity
from imager.units import show_bytes


def disk_words(identity: DiskIdentity) -> str:
    """Node, size, how it is attached, model, serial number or WWN."""
    size = "of unknown size" if identity.size is None else show_bytes(identity.size)
    sectors = "" if identity.logical_sector in (None, 512) else f"{identity.logical_sector}n"
    number = f"serial {identity.serial}" if identity.serial else identity.wwn
    words = [identity.path, size, sectors, identity.transport, identity.model, number]
    return " ".join(word for word in words if word)
