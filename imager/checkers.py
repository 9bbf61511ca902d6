"""The filesystems' own checkers: how to run them without writing, and what their exit codes say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imager.process import find_tool, run

# What a tool reads without need of what stands there: nothing; something ahead, without minding
# an error; the last block of a filesystem, for the sake of its being there; or anything, in large
# pieces that must not fail.
Surplus = Literal["nothing", "something ahead", "last block", "anything"]


@dataclass(frozen=True)
class Checker:
    """One checker. ``command`` is followed by the path of a device or a file."""

    command: tuple[str, ...]
    package: str
    """Debian's package of it."""
    surplus: Surplus = "nothing"

    @property
    def line(self) -> str:
        return " ".join(self.command)

    def is_installed(self) -> bool:
        return find_tool(self.command[0]) is not None


# xfs_repair names places in its own code, which are others each time it runs.
_ADDRESS = re.compile("0x[0-9a-f]{9,16}")


@dataclass(frozen=True)
class Opinion:
    """What a checker said of a filesystem."""

    clean: bool
    output: str


# e2fsck and fsck.f2fs ask the kernel to read ahead, and it reads pages. xfs_repair reads 32 KiB for
# each superblock of a sector. ntfsfix finds the size of a file by reading bytes here and there.
#
# All of them end with 0 when they found no fault, and only then: e2fsck(8), xfs_repair(8),
# btrfs-check(8), ntfsfix(8), fsck.fat(8), fsck.exfat(8), fsck.f2fs(8).
_EXT = Checker(("e2fsck", "-f", "-n"), "e2fsprogs", "something ahead")
CHECKERS = {
    "ext2": _EXT,
    "ext3": _EXT,
    "ext4": _EXT,
    "xfs": Checker(("xfs_repair", "-n", "-f"), "xfsprogs", "anything"),
    "btrfs": Checker(("btrfs", "check", "--readonly", "--check-data-csum"), "btrfs-progs"),
    "ntfs": Checker(("ntfsfix", "-n"), "ntfs-3g", "anything"),
    "vfat": Checker(("fsck.vfat", "-n"), "dosfstools", "last block"),
    "exfat": Checker(("fsck.exfat", "-n"), "exfatprogs"),
    "f2fs": Checker(("fsck.f2fs", "--dry-run"), "f2fs-tools", "something ahead"),
}


def check(checker: Checker, path: Path) -> Opinion:
    """Run a checker on a file. Raises ToolError when it is not installed."""
    result = run([*checker.command, str(path)], accept=range(-64, 256))
    said = (result.stdout + result.stderr).decode(errors="replace")
    said = _ADDRESS.sub("0x…", said.replace(str(path), "the volume"))
    return Opinion(result.returncode == 0, said)
