"""F2FS: who it is and which blocks it uses."""

from imager.allocation.f2fs.allocated import allocation_map
from imager.allocation.f2fs.identity import probe

__all__ = ["allocation_map", "probe"]
