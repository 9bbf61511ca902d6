"""ext2, ext3 and ext4: who they are and which blocks they use."""

from imager.allocation.ext.allocated import allocation_map
from imager.allocation.ext.identity import probe

__all__ = ["allocation_map", "probe"]
