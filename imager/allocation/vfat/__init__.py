"""FAT12, FAT16 and FAT32: who they are and which clusters they use."""

from imager.allocation.vfat.allocated import allocation_map
from imager.allocation.vfat.identity import probe

__all__ = ["allocation_map", "probe"]
