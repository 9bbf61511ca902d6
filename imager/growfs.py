"""Growing a filesystem to the size of its partition on a restore target."""

from __future__ import annotations

import struct
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imager.blocksource import FileSource
from imager.errors import NotRecognized, UnsupportedError
from imager.loopdevice import loop_device
from imager.process import run

# btrfs superblock (linux/btrfs_tree.h, struct btrfs_super_block) at 64 KiB
_BTRFS_SUPER_AT = 65536
_BTRFS_NUM_DEVICES_AT = _BTRFS_SUPER_AT + 136
_BTRFS_DEVID_AT = _BTRFS_SUPER_AT + 201

# swap header (linux/swap.h, union swap_header): mark at the end of the first page, then
# version, last page, number of bad pages, UUID, label from byte 1024 on
_SWAP_PAGE_SIZES = (4096, 8192, 16384, 32768, 65536)
_SWAP_MARK = b"SWAPSPACE2"
_SWAP_INFO = struct.Struct("<III16s16s")
_SWAP_INFO_AT = 1024


def tools_to_grow(kind: str) -> tuple[str, ...]:
    """Programs that growing a filesystem of this kind runs."""
    return _TOOLS.get(kind, ())


def can_grow(kind: str) -> bool:
    """Whether ``grow_filesystem`` knows a filesystem, by blkid's name."""
    return kind in _GROWERS


def grow_filesystem(
    target: str, offset: int, size: int, kind: str, *, sector_size: int = 512
) -> None:
    """Grow the ``kind`` of filesystem at ``offset`` to ``size`` bytes; does nothing at full size.

    ``target`` is a disk or raw file that is not in use, ``kind`` is blkid's name ("ext4", "xfs",
    "btrfs", "swap", …), ``sector_size`` the disk's in bytes. Needs root and loop devices. Raises
    UnsupportedError for other kinds, ToolError when a tool fails.
    """
    grow = _GROWERS.get(kind)
    if grow is None:
        raise UnsupportedError(
            f"a filesystem of the kind {kind} cannot be grown here",
            hint=_HINTS.get(kind, "grow it with its own tools after the restore"),
        )
    with loop_device(target, offset, size, sector_size=sector_size) as device:
        grow(device)


def _grow_ext(device: str) -> None:
    """resize2fs wants a check first; e2fsck ends with 1 when it replayed or repaired."""
    run(["e2fsck", "-f", "-p", device], accept=(0, 1))
    run(["resize2fs", device])


def _grow_xfs(device: str) -> None:
    """nouuid: the original with the same UUID may be mounted on this machine."""
    with _mounted(device, "xfs", "nouuid") as folder:
        run(["xfs_growfs", "-d", folder])


def _grow_btrfs(device: str) -> None:
    with FileSource(device) as source:
        (devices,) = struct.unpack("<Q", source.pread(_BTRFS_NUM_DEVICES_AT, 8))
        (devid,) = struct.unpack("<Q", source.pread(_BTRFS_DEVID_AT, 8))
    if devices != 1:
        raise UnsupportedError(
            f"a btrfs of {devices} devices cannot be grown here",
            hint=f"mount it after the restore and run: btrfs filesystem resize {devid}:max",
        )
    with _mounted(device, "btrfs", "defaults") as folder:
        run(["btrfs", "filesystem", "resize", f"{devid}:max", folder])


def _grow_swap(device: str) -> None:
    """A new, longer swap area with the old UUID, label and page size."""
    with FileSource(device) as source:
        head = source.pread(0, min(_SWAP_PAGE_SIZES[-1], source.size))
    page = next((p for p in _SWAP_PAGE_SIZES if head[p - len(_SWAP_MARK) : p] == _SWAP_MARK), None)
    if page is None:
        raise NotRecognized(
            f"no swap area without a hibernation image on {device}",
            hint="resume or discard the hibernated system before it is grown",
        )
    _, _, _, raw_uuid, raw_label = _SWAP_INFO.unpack_from(head, _SWAP_INFO_AT)
    command = ["mkswap", "--pagesize", str(page), "--uuid", str(uuid.UUID(bytes=raw_uuid))]
    label = raw_label.partition(b"\0")[0].decode(errors="replace")
    run([*command, *(["--label", label] if label else []), device])


@contextmanager
def _mounted(device: str, kind: str, options: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="imager-grow-") as folder:
        run(["mount", "-t", kind, "-o", options, device, folder])
        try:
            yield folder
        finally:
            run(["umount", folder])


_EXT_TOOLS = ("e2fsck", "resize2fs")
_TOOLS = {
    "ext2": _EXT_TOOLS,
    "ext3": _EXT_TOOLS,
    "ext4": _EXT_TOOLS,
    "xfs": ("xfs_growfs",),
    "btrfs": ("btrfs",),
    "swap": ("mkswap",),
}

_GROWERS: dict[str, Callable[[str], None]] = {
    "ext2": _grow_ext,
    "ext3": _grow_ext,
    "ext4": _grow_ext,
    "xfs": _grow_xfs,
    "btrfs": _grow_btrfs,
    "swap": _grow_swap,
}

_HINTS = {
    "LVM2_member": "run pvresize on the partition, then lvextend, after the restore",
    "crypto_LUKS": "open it and run cryptsetup resize, then grow what is in it",
    "ntfs": "run ntfsresize, or let Windows extend the volume",
}
