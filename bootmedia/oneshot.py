"""A rollback at the next start: the rescue system on ``/boot``, started once by GRUB.

Everything that can be known to go wrong then is found out now, before ``/boot`` is touched. The
rescue system is built elsewhere first. Then its files, then GRUB's entry, and last the word that
the next start takes it: a crash in between leaves the usual start, and files that ``cancel``
removes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from bootmedia.build import BuildOptions, build
from bootmedia.grubonce import Entry, Grub
from bootmedia.job import NetworkSetup, PinnedImage, TargetRule, Unattended
from bootmedia.kernel import Kernel, find_kernel
from bootmedia.moduleindex import ModuleIndex
from bootmedia.modules import Selection
from bootmedia.netboot import CONSOLES, KERNEL
from imager.blocksource import FileSource
from imager.deviceuse import SYS_ROOT, device_numbers, disk_numbers_below
from imager.diskidentity import DiskIdentity, disk_identity
from imager.errors import ImagerError, RefusedError
from imager.fingerprint import Fingerprint
from imager.jsonrecord import JsonRecord
from imager.mounttable import Mount, mount_of
from imager.partitions import read_partition_table
from imager.progress import Progress
from imager.units import show_bytes

ENTRY_ID = "imager-rollback"
FOLDER = "imager-rollback"
"""Below /boot."""
RECORD = "rollback.json"

# A kernel that panics must not keep the machine from its own system; in seconds.
_PANIC_SECONDS = 30
_COUNTDOWN_SECONDS = 5
# What a package that is installed in between, or the filesystem itself, may take.
_ROOM = 8 << 20

# Filesystems that the rescue system looks for repositories on, and the module of each.
_KINDS = {
    "ext2": "ext4",
    "ext3": "ext4",
    "ext4": "ext4",
    "xfs": "xfs",
    "btrfs": "btrfs",
    "vfat": "vfat",
    "exfat": "exfat",
    "ntfs3": "ntfs3",
    "udf": "udf",
}
# Nor does it look deeper into them (``guest/attached.py``).
_DEPTH = 3
_STACKED = ("dm-", "md", "bcache", "zd", "loop", "nbd", "rbd")


@dataclass(frozen=True)
class Rollback:
    """What is to be done at the next start. ``disks``: the name of each disk in the image, and the
    device that it goes back to. ``created`` in seconds since 1970."""

    image: PinnedImage
    disks: tuple[tuple[str, str], ...]
    repository: str
    created: int
    boot: Path = Path("/boot")
    network: NetworkSetup = field(default_factory=NetworkSetup)
    kernel: str | None = None
    modules_dir: Path | None = None
    modules: Selection = "host"
    kernel_args: str = ""
    work: Path | None = None


@dataclass(frozen=True)
class Arranged(JsonRecord):
    """What lies on /boot: the image, where each of its disks goes, and where it comes from."""

    image: str
    repository: str
    created: int
    targets: tuple[TargetRule, ...] = ()
    kernel: str = ""


@dataclass(frozen=True)
class Status:
    """``waiting``: the next start takes it. Otherwise it was started and did not get to the end."""

    arranged: Arranged
    waiting: bool


def arrange(plan: Rollback, machine: Fingerprint, progress: Progress) -> Arranged:
    """Have the next start roll back.

    Raises RefusedError with every reason against it, before anything of /boot is changed.
    """
    with tempfile.TemporaryDirectory(prefix="imager-rollback-", dir=plan.work) as scratch:
        work = Path(scratch)
        grub = Grub(plan.boot)
        rules = _target_rules(plan, machine)
        reasons = [*grub.refusals(), *(text for text in rules if isinstance(text, str))]
        kernel = None
        try:
            kernel = find_kernel(plan.kernel, plan.modules_dir, scratch=work)
            reasons += _secure_boot_reasons(machine, kernel)
        except ImagerError as error:
            reasons.append(error.message)
        reasons += _repository_reasons(plan, kernel)
        if reasons or kernel is None:
            raise RefusedError(reasons)
        targets = tuple(rule for rule in rules if isinstance(rule, TargetRule))
        arranged = Arranged(plan.image.id, plan.repository, plan.created, targets, kernel.version)
        files, arguments = _build(plan, targets, machine, work, progress)
        if reasons := list(_room_reasons(plan, files)):
            raise RefusedError(reasons)
        cancel(plan.boot)
        _install(plan, arranged, files)
        folder = plan.boot / FOLDER
        layers = [folder / file.name for file in files if file.name != KERNEL]
        title = f"imager: roll back to {plan.image.id}"
        grub.arrange(Entry(ENTRY_ID, title, folder / KERNEL, layers, arguments))
    return arranged


def cancel(boot: Path = Path("/boot")) -> bool:
    """Take back what was arranged; whether there was anything."""
    found = Grub(boot).cancel(ENTRY_ID)
    folder = boot / FOLDER
    if folder.is_dir():
        shutil.rmtree(folder)
        found = True
    return found


def status(boot: Path = Path("/boot")) -> Status | None:
    """What is arranged; None when nothing is."""
    record = boot / FOLDER / RECORD
    if not record.is_file():
        return None
    arranged = Arranged.from_bytes(record.read_bytes(), str(record))
    return Status(arranged, Grub(boot).next_entry() == ENTRY_ID)


# --- the targets --------------------------------------------------------------------------------


def _target_rules(plan: Rollback, machine: Fingerprint) -> list[TargetRule | str]:
    """A rule for each disk that fits no other one, or why there is none."""
    return [_target_rule(name, path, machine.disks) for name, path in plan.disks]


def _target_rule(name: str, path: str, everyone: Sequence[DiskIdentity]) -> TargetRule | str:
    identity = disk_identity(path)
    for key in ("serial", "wwn"):
        value = getattr(identity, key)
        others = [disk for disk in everyone if disk.path != identity.path]
        if value and all(getattr(disk, key) != value for disk in others):
            return TargetRule(name, f"{key}={value}")
    try:
        with FileSource(path) as source:
            table = read_partition_table(source).disk_id
    except ImagerError as error:
        return error.message
    if table is not None:
        return TargetRule(name, f"table={table}")
    return f"{path} has neither serial number, WWN nor partition table to be known by"


# --- the repository -----------------------------------------------------------------------------


def _repository_reasons(plan: Rollback, kernel: Kernel | None) -> Iterator[str]:
    """Why the rescue system would not find the image."""
    url = plan.repository
    if "://" in url and not url.startswith("file://"):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            yield f"the rescue system does not read {parts.scheme}:// repositories"
        elif (parts.hostname or "").split(".")[0] in ("localhost", "127", "::1"):
            yield f"{url} is served by this machine itself"
        elif plan.network.mode == "none":
            yield f"{url} needs a network in the rescue system"
        return
    folder = Path(url.removeprefix("file://")).resolve()
    below = disk_numbers_below(folder)
    for _, path in plan.disks:
        if device_numbers(path) & below:
            yield f"the repository {url} lies on {path}, which is rolled back"
            return
    mount = mount_of(folder)
    if mount is None:
        yield f"{folder}: it is not known what is mounted there"
        return
    stacked = sorted(name for name in map(_device_name, below) if name.startswith(_STACKED))
    if stacked:
        yield f"the repository {url} lies on {stacked[0]}: the rescue system takes plain partitions"
    yield from _filesystem_reasons(mount, folder, kernel)


def _filesystem_reasons(mount: Mount, folder: Path, kernel: Kernel | None) -> Iterator[str]:
    module = _KINDS.get(mount.kind)
    if module is None:
        yield f"the repository lies on {mount.kind}, where the rescue system does not look for one"
    elif kernel and not _has_module(kernel, module):
        yield f"the repository lies on {mount.kind}: kernel {kernel.version} has no driver for it"
    inside = Path(mount.root) / folder.relative_to(mount.point)
    if len(inside.parts) - 1 > _DEPTH:
        yield (
            f"{inside} lies {len(inside.parts) - 1} folders deep in its filesystem: the rescue "
            f"system looks into {_DEPTH}"
        )


def _has_module(kernel: Kernel, module: str) -> bool:
    index = ModuleIndex.read(kernel.modules)
    return module in index or index.is_builtin(module)


def _device_name(number: str) -> str:
    return (SYS_ROOT / "dev/block" / number).resolve().name


# --- the machine --------------------------------------------------------------------------------


def _secure_boot_reasons(machine: Fingerprint, kernel: Kernel) -> Iterator[str]:
    if machine.secure_boot and not kernel.signed:
        yield f"Secure Boot is on, and kernel {kernel.version} is not signed"


def _room_reasons(plan: Rollback, files: Sequence[Path]) -> Iterator[str]:
    needed = sum(file.stat().st_size for file in files) + _ROOM
    there = sum(file.stat().st_size for file in (plan.boot / FOLDER).glob("*"))
    free = shutil.disk_usage(plan.boot).free + there
    if free < needed:
        yield f"{plan.boot} has {show_bytes(free)} free, and {show_bytes(needed)} are needed"


def _build(
    plan: Rollback,
    targets: tuple[TargetRule, ...],
    machine: Fingerprint,
    work: Path,
    progress: Progress,
) -> tuple[list[Path], str]:
    """Kernel and layers in the order in which they are unpacked, and the kernel's arguments.

    Raises RefusedError when the machine has too little memory for them.
    """
    is_fetched = "://" in plan.repository and not plan.repository.startswith("file://")
    options = BuildOptions(
        out=work / "system",
        created=plan.created,
        format="pxe",
        kernel=plan.kernel,
        modules_dir=plan.modules_dir,
        modules=plan.modules,
        repositories=(plan.repository,) if is_fetched else (),
        unattended=Unattended(
            image=plan.image.id,
            targets=targets,
            countdown=_COUNTDOWN_SECONDS,
            delta=True,
            back=True,
        ),
        pinned=(plan.image,),
        network=plan.network if is_fetched else replace(plan.network, mode="none"),
        fill_fallback=False,
        boot_entry=False,
        work=work,
    )
    built = build(options, machine, None, progress)
    if machine.memory is not None and machine.memory < built.least_memory:
        needed, there = show_bytes(built.least_memory), show_bytes(machine.memory)
        raise RefusedError(
            [f"the rescue system needs {needed} of memory, this machine has {there}"]
        )
    names = [KERNEL, *(f"{name}.img" for name in ("python", "modules", "job"))]
    arguments = (
        f"{CONSOLES} quiet imager.memory={built.least_memory >> 20} panic={_PANIC_SECONDS} "
        f"{plan.kernel_args}"
    )
    return [options.out / name for name in names], arguments.rstrip()


def _install(plan: Rollback, arranged: Arranged, files: Sequence[Path]) -> None:
    """Everything but GRUB's part, durably; the record first, so that ``status`` knows of it."""
    folder = plan.boot / FOLDER
    folder.mkdir(mode=0o700)
    (folder / RECORD).write_bytes(arranged.to_bytes())
    for file in files:
        shutil.copyfile(file, folder / file.name)
    for path in (*folder.iterdir(), folder, plan.boot):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
