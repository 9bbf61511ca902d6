"""XFS: who it is and which blocks it uses."""

from imager.allocation.xfs.allocated import allocation_map
from imager.allocation.xfs.identity import probe

__all__ = ["allocation_map", "probe"]
