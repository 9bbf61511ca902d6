"""Btrfs: who it is and which bytes of each of its devices it uses."""

from imager.allocation.btrfs.allocated import allocation_map
from imager.allocation.btrfs.identity import probe

__all__ = ["allocation_map", "probe"]
