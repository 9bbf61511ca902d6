"""The boot sector of NTFS. Source: Linux fs/ntfs3/ntfs.h; integers little-endian."""

from __future__ import annotations

import struct
from typing import NamedTuple, Self

from imager.allocation.model import require

BOOT_SECTOR_SIZE = 512  # bytes; what counts of it, however large the sectors are
_LARGEST_CLUSTER = 2 << 20  # bytes
_LARGEST_RECORD = 64 << 10  # bytes


class BootSector(NamedTuple):
    """Sizes in bytes, places in clusters."""

    sector_size: int
    cluster_size: int
    sectors: int
    """Without the last one, which holds the copy of the boot sector."""
    mft_cluster: int
    mirror_cluster: int
    record_size: int
    serial: int
    raw: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Self | None:
        """None without signature or with sizes that can't be."""
        if len(raw) < BOOT_SECTOR_SIZE or raw[3:11] != b"NTFS    ":
            return None
        sector_size, cluster_code = struct.unpack_from("<HB", raw, 11)
        sectors, mft, mirror = struct.unpack_from("<QQQ", raw, 40)
        # Above 128 the byte is a negative power of two.
        cluster_sectors = cluster_code if cluster_code <= 128 else 1 << (256 - cluster_code)
        cluster_size = cluster_sectors * sector_size
        if not (
            256 <= sector_size <= 4096
            and sector_size.bit_count() == 1
            and sector_size <= cluster_size <= _LARGEST_CLUSTER
            and cluster_size.bit_count() == 1
        ):
            return None
        serial = int.from_bytes(raw[72:80], "little")
        record_size = _record_size(raw[64], cluster_size)
        return cls(sector_size, cluster_size, sectors, mft, mirror, record_size, serial, raw)

    @property
    def size(self) -> int:
        return self.sectors * self.sector_size

    @property
    def clusters(self) -> int:
        return self.size // self.cluster_size

    def check(self, source_size: int) -> None:
        """Raises NotRecognized for any inconsistency."""
        require(self.raw[510:512] == b"\x55\xaa", "the boot sector has no signature")
        require(
            not any(self.raw[14:21]) and not any(self.raw[22:24]) and not any(self.raw[32:36]),
            "fields of the boot sector that must be zero are not",
        )
        require(
            512 <= self.record_size <= _LARGEST_RECORD and self.record_size.bit_count() == 1,
            "impossible size of MFT records",
        )
        require(
            0 < self.mft_cluster < self.clusters and 0 < self.mirror_cluster < self.clusters,
            "the MFT lies outside of the filesystem",
        )
        require(
            self.size <= source_size,
            f"the filesystem has {self.size} bytes, the source only {source_size}",
        )


def _record_size(code: int, cluster_size: int) -> int:
    """Bytes of an MFT record: clusters, or a negative power of two."""
    return 1 << (256 - code) if code > 127 else code * cluster_size
