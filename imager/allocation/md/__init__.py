"""Members of Linux software RAID: who they are, and what a mirror uses of them."""

from imager.allocation.md.identity import is_transparent, probe
from imager.allocation.md.usage import allocation_map

__all__ = ["allocation_map", "is_transparent", "probe"]
