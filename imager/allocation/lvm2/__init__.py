"""LVM2 physical volumes: who they are, and which bytes the volume group uses of them."""

from imager.allocation.lvm2.identity import probe
from imager.allocation.lvm2.usage import allocation_map

__all__ = ["allocation_map", "probe"]
