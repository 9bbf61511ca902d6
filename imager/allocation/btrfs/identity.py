"""Name, UUID and size of a Btrfs, from a device's first superblock alone.

Source: Linux fs/btrfs/ctree.h (struct btrfs_super_block); integers little-endian.
"""

from __future__ import annotations

import struct

from imager.allocation.btrfs.superblock import MAGIC, SUPERBLOCK_SIZE, SUPERBLOCKS
from imager.allocation.model import Filesystem, Membership, read_if_inside, text, uuid_text
from imager.blocksource import BlockSource

_DEVICE_ITEM = 0xC9


def probe(source: BlockSource) -> Filesystem | None:
    """The filesystem, or None. Raises OSError."""
    raw = read_if_inside(source, SUPERBLOCKS[0], SUPERBLOCK_SIZE)
    if raw[0x40:0x48] != MAGIC:
        return None
    used, _, devices, sector_size = struct.unpack_from("<QQQI", raw, 0x78)
    device_id, device_size = struct.unpack_from("<QQ", raw, _DEVICE_ITEM)
    (log_root,) = struct.unpack_from("<Q", raw, 0x60)
    uuid = uuid_text(raw[0x20:0x30])
    return Filesystem(
        kind="btrfs",
        label=text(raw[0x12B : 0x12B + 256]),
        uuid=uuid,
        size=device_size,
        used_bytes=used if devices == 1 else None,  # counts all devices
        block_size=sector_size,
        member_of=Membership("btrfs", uuid or "", str(device_id), devices),
        notes=("its log tree waits to be replayed",) if log_root else (),
    )
