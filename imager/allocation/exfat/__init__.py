"""exFAT: who it is and which clusters it uses."""

from imager.allocation.exfat.allocated import allocation_map
from imager.allocation.exfat.identity import probe

__all__ = ["allocation_map", "probe"]
