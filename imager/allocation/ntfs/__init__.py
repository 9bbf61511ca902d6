"""NTFS: who it is and which clusters it uses."""

from imager.allocation.ntfs.allocated import allocation_map
from imager.allocation.ntfs.identity import probe

__all__ = ["allocation_map", "probe"]
