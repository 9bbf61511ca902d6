"""Signatures of what is only recognised by name.

They matter as doubts too: making one of these need not erase an older superblock, and a stale
ext4 superblock would then say that the new owner's blocks are free.
"""

from __future__ import annotations

from imager.allocation.model import Filesystem, read_if_inside
from imager.blocksource import BlockSource

_BCACHE = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
_BCACHEFS = bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")

# Offset in bytes, magic, name as libblkid has it.
_SIGNATURES = (
    (0, b"hsqs", "squashfs"),
    (3, b"-FVE-FS-", "BitLocker"),
    (32, b"NXSB", "apfs"),
    (32, b"ORCLDISK", "oracleasm"),
    (1024, b"H+", "hfsplus"),
    (1024, b"HX", "hfsplus"),
    (1024, bytes.fromhex("e2e1f5e0"), "erofs"),
    (1030, b"\x34\x34", "nilfs2"),
    (4096 + 24, _BCACHE, "bcache"),
    (4096 + 24, _BCACHEFS, "bcachefs"),
    (8192, b"OCFSV2", "ocfs2"),
    (32768, b"JFS1", "jfs"),
    (32769, b"CD001", "iso9660"),
    (65536, bytes.fromhex("01161970"), "gfs2"),
    (65536 + 52, b"ReIsEr", "reiserfs"),
    (65536, b"ReIsEr4", "reiser4"),
    (1 << 20, bytes.fromhex("0dd001c0"), "VMFS_volume_member"),
)

# Members of a RAID that the firmware set up; the offset is from the device's end.
_SIGNATURES_AT_END = (
    (1024, b"Intel Raid ISM Cfg Sig. ", "isw_raid_member"),
    (512, bytes.fromhex("de11de11"), "ddf_raid_member"),
)

_ZFS_UBERBLOCK = 0x00BAB10C
_SECTOR = 512  # bytes
_ZFS_UBERBLOCKS = range(128 << 10, 256 << 10, 1024)  # bytes; the first label's ring


def probe(source: BlockSource) -> Filesystem | None:
    """A name for what is there, or None. Raises OSError."""
    for offset, magic, name in _SIGNATURES:
        if read_if_inside(source, offset, len(magic)) == magic:
            return Filesystem(name)
    if firmware_raid := _firmware_raid(source):
        return Filesystem(firmware_raid)
    return Filesystem("zfs_member") if _is_zfs(source) else None


def is_transparent(source: BlockSource) -> bool:
    """Whether the device begins with what a RAID of the firmware holds. Raises OSError."""
    return _firmware_raid(source) is not None


def _firmware_raid(source: BlockSource) -> str | None:
    end = source.size // _SECTOR * _SECTOR
    for distance, magic, name in _SIGNATURES_AT_END:
        if read_if_inside(source, end - distance, len(magic)) == magic:
            return name
    return None


def _is_zfs(source: BlockSource) -> bool:
    ring = read_if_inside(source, _ZFS_UBERBLOCKS.start, len(_ZFS_UBERBLOCKS) * 1024)
    magics = (_ZFS_UBERBLOCK.to_bytes(8, "little"), _ZFS_UBERBLOCK.to_bytes(8, "big"))
    return any(ring[at : at + 8] in magics for at in range(0, len(ring), 1024))
