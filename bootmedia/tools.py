"""The programs of the rescue system, and which package has each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bootmedia.elf import is_elf
from bootmedia.rescueroot import RescueRoot
from imager.errors import ImagerError, ToolError
from imager.process import find_tool, run


@dataclass(frozen=True)
class Tool:
    """``package`` is Debian's name; ``purpose`` says what can't be done without it."""

    name: str
    package: str
    purpose: str
    required: bool = False


BUSYBOX = Tool("busybox", "busybox-static", "the shell and its commands", required=True)

TOOLS = (
    Tool("sfdisk", "fdisk", "partition tables", required=True),
    Tool("partx", "util-linux", "partitions of a disk that is in use", required=True),
    Tool("losetup", "util-linux", "growing the last partition", required=True),
    Tool("blkid", "util-linux", "names of filesystems", required=True),
    Tool("findmnt", "util-linux", "looking into an image", required=True),
    Tool("mount", "mount", "mounting with all options"),
    Tool("umount", "mount", "unmounting with all options"),
    Tool("e2fsck", "e2fsprogs", "growing ext4", required=True),
    Tool("resize2fs", "e2fsprogs", "growing ext4", required=True),
    Tool("mkswap", "util-linux", "growing swap"),
    Tool("swaplabel", "util-linux", "renewing ids of swap"),
    Tool("xfs_growfs", "xfsprogs", "growing XFS"),
    Tool("xfs_repair", "xfsprogs", "repairing XFS"),
    Tool("btrfs", "btrfs-progs", "growing Btrfs"),
    Tool("dmsetup", "dmsetup", "device-mapper"),
    Tool("lvm", "lvm2", "LVM"),
    Tool("mdadm", "mdadm", "software RAID"),
    Tool("cryptsetup", "cryptsetup-bin", "LUKS"),
    Tool("fusermount3", "fuse3", "mounting images"),
)

SSH_TOOLS = (
    Tool("dropbear", "dropbear-bin", "remote rescue"),
    Tool("dropbearkey", "dropbear-bin", "remote rescue"),
)

DATA_TOOLS = {"restic": Tool("restic", "restic", "bringing data back", required=True)}
"""By the engine of a data backup. Borg is a Python program: the restored system's own is run."""

# What /init and the guest's modules call of busybox.
_APPLETS = {
    *("sh", "mount", "umount", "mkdir", "mv", "rm", "cat", "sed", "sort", "tail", "sleep"),
    *("chroot", "getty", "ip", "udhcpc", "poweroff", "reboot"),
}


def add_tools(root: RescueRoot, *, ssh: bool, data: Sequence[str] = ()) -> None:
    """``data``: engines of data backups that the rescue system is to run.

    Raises ImagerError when one that is required is not installed; warns of the others.
    """
    _add_busybox(root)
    engines = [DATA_TOOLS[name] for name in data if name in DATA_TOOLS]
    for tool in (*TOOLS, *(SSH_TOOLS if ssh else ()), *engines):
        _add_tool(root, tool)
    for name in data:
        if name not in DATA_TOOLS:
            root.warnings.append(
                f"{name} is not carried: it is run as the restored system's own program"
            )
    for name in ("vgchange", "lvs", "pvs", "vgs"):
        if "/usr/sbin/lvm" in root.tree:
            root.add_link(f"/usr/sbin/{name}", "lvm")


def _add_busybox(root: RescueRoot) -> None:
    """Its applets are links in /bin, last on the rescue system's PATH: other tools come first."""
    program = find_tool(BUSYBOX.name)
    if program is None:
        raise _not_installed(BUSYBOX)
    applets = run([program, "--list"]).stdout.decode().split()
    missing = sorted(_APPLETS.difference(applets))
    if missing:
        raise ImagerError(
            f"{program} has no {', '.join(missing)}, which the rescue system needs",
            hint=f"install {BUSYBOX.package}",
        )
    root.add_file(Path(program), "/bin/busybox")
    for name in applets:
        if name != BUSYBOX.name:
            root.add_link(f"/bin/{name}", "busybox")
    # The kernel's own calls for a module, of a filesystem for example.
    root.add_link("/sbin/modprobe", "/bin/busybox")


def _add_tool(root: RescueRoot, tool: Tool) -> None:
    program = find_tool(tool.name)
    if program is None:
        if tool.required:
            raise _not_installed(tool)
        root.warnings.append(
            f"{tool.name} is not installed: the rescue system will lack it ({tool.purpose}); "
            f"the package {tool.package} has it"
        )
        return
    try:
        _add_program(root, Path(program), tool.name)
    except ToolError as error:
        if tool.required:
            raise
        root.warnings.append(f"{tool.name} is left out: {error.message}")


def _add_program(root: RescueRoot, program: Path, name: str) -> None:
    if not is_elf(program):
        root.warnings.append(f"{program} is a script; what it calls may be missing")
    folder = "/usr/sbin" if program.parent.name == "sbin" else "/usr/bin"
    root.add_file(program.resolve(), f"{folder}/{name}")


def _not_installed(tool: Tool) -> ImagerError:
    return ImagerError(
        f"the rescue system needs {tool.name} ({tool.purpose}), which is not installed here",
        hint=f"install {tool.package}",
    )
