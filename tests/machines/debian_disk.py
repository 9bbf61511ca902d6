"""A real Debian 12 server's disk, as a raw sparse image file.

GPT with bios_boot, ESP (FAT32), swap and an ext4 root. The system has a stock kernel and
initramfs, systemd, an SSH server, a login prompt on the serial line, mounts by UUID, and GRUB for
BIOS and for UEFI firmware. Built once by mmdebstrap and kept in a cache folder.

    python -m tests.machines.debian_disk OUT.img [--size 4G] [--profile small|server]

Needs root (mounts, chroot) and a Debian mirror: ``IMAGER_MIRROR``, or deb.debian.org. The cache is
``IMAGER_CACHE``, or ~/.cache/imager-disks.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30
SECTOR = 512

RECIPE_VERSION = 2
"""Raise it when a change of the code below changes the disk: older cached disks are then unused."""

BOOT_MARKER = "imager-test: system up"
"""Printed on the console when systemd has reached multi-user.target."""
HOSTNAME = "imager-test"
ROOT_PASSWORD = "imager"
# openssl passwd -6 -salt imager imager
_PASSWORD_HASH = (
    "$6$imager$kU1VIIkKykxxkaOXvyD.Rh520n12MCnjoan1FL0aSPxRtr0XF2"
    "aoTU.Kl5fjLbNUVLSZEcyVoRU/pZzv9vysu0"
)

_GRUB = Path("/usr/lib/grub")
_SHIM = Path("/usr/lib/shim/shimx64.efi.signed")
_SIGNED_GRUB = Path("/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed")
_GRUB_MODULES = (
    "part_gpt",
    "ext2",
    "fat",
    "search",
    "search_fs_uuid",
    "normal",
    "configfile",
    "linux",
    "serial",
    "terminal",
    "minicmd",
    "echo",
    "test",
    "ls",
    "cat",
    "reboot",
    "halt",
    "gzio",
)

_BASE_PACKAGES = (
    "linux-image-amd64",
    "zstd",
    "systemd-sysv",
    "udev",
    "dbus",
    "kmod",
    "openssh-server",
    "iproute2",
    "iputils-ping",
    "ca-certificates",
    "less",
    "procps",
    "e2fsprogs",
    "cron",
    "rsyslog",
    "logrotate",
)
# Services of a common server, and development packages for their bulk of real, mixed files.
_SERVER_PACKAGES = (
    "python3",
    "nginx",
    "postfix",
    "postgresql",
    "mariadb-server",
    "redis-server",
    "git",
    "build-essential",
    "man-db",
    "manpages-dev",
    "llvm-14-dev",
    "libboost1.74-dev",
    "openjdk-17-jdk-headless",
    "linux-doc-6.1",
    "python3-scipy",
    "vim",
)


@dataclass(frozen=True)
class Profile:
    """What is on the disk. ``random_bytes`` of incompressible files are kept; ``stale_bytes`` are
    written and deleted again, so that they lie in the free space."""

    name: str
    size_bytes: int
    packages: tuple[str, ...]
    dpkg_options: tuple[str, ...] = ()
    random_bytes: int = 0
    stale_bytes: int = 0


PROFILES = {
    "small": Profile(
        name="small",
        size_bytes=4 * GIB,
        packages=_BASE_PACKAGES,
        dpkg_options=(
            "path-exclude=/usr/share/doc/*",
            "path-exclude=/usr/share/locale/*",
            "path-exclude=/usr/share/man/*",
        ),
        stale_bytes=64 * MIB,
    ),
    "server": Profile(
        name="server",
        size_bytes=16 * GIB,
        packages=(*_BASE_PACKAGES, *_SERVER_PACKAGES),
        random_bytes=1 * GIB,
        stale_bytes=1 * GIB,
    ),
}


@dataclass(frozen=True)
class Partition:
    """One partition of the layout, in bytes from the start of the disk."""

    name: str
    type_guid: str
    offset: int
    size: int


@dataclass(frozen=True)
class Layout:
    """The four partitions. The root is the last one, so that it can grow on a larger disk."""

    bios_boot: Partition
    esp: Partition
    swap: Partition
    root: Partition

    @classmethod
    def for_size(cls, size_bytes: int) -> Layout:
        """Place the partitions on a disk of ``size_bytes``; the last MiB holds the backup GPT."""
        root_offset = 2 * MIB + 100 * MIB + 256 * MIB
        root_size = (size_bytes - root_offset) // MIB * MIB - MIB
        # Type GUIDs: UEFI specification 2.10 table 5.7 and the Discoverable Partitions
        # Specification; bios_boot is GRUB's own.
        return cls(
            Partition("bios_boot", "21686148-6449-6E6F-744E-656564454649", MIB, MIB),
            Partition("esp", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", 2 * MIB, 100 * MIB),
            Partition("swap", "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F", 102 * MIB, 256 * MIB),
            Partition("root", "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", root_offset, root_size),
        )

    def all(self) -> tuple[Partition, ...]:
        return (self.bios_boot, self.esp, self.swap, self.root)


@dataclass(frozen=True)
class Identity:
    """The UUIDs of one disk, derived from its recipe so that a rebuild has the same."""

    disk: str
    root: str
    swap: str
    machine: str
    esp_volume: str

    @classmethod
    def from_key(cls, key: str) -> Identity:
        made = {
            part: uuid.uuid5(uuid.NAMESPACE_OID, f"{key}/{part}")
            for part in ("disk", "root", "swap", "machine", "esp")
        }
        return cls(
            str(made["disk"]),
            str(made["root"]),
            str(made["swap"]),
            made["machine"].hex,
            made["esp"].hex[:8].upper(),
        )

    @property
    def esp_uuid(self) -> str:
        """The FAT volume id as ``UUID=`` in fstab wants it."""
        return f"{self.esp_volume[:4]}-{self.esp_volume[4:]}"


class BuildError(Exception):
    """A step of the build failed; the message has the command and the end of its output."""


def debian_disk(*, size_bytes: int | None = None, profile: str = "small") -> Path:
    """Path of the cached disk, built when it is not there yet. Treat it as read-only: boot it with
    ``snapshot=on``, or work on a copy (see ``copy_sparse``). Raises BuildError."""
    chosen = PROFILES[profile]
    size = chosen.size_bytes if size_bytes is None else size_bytes
    key = hashlib.sha256(repr((RECIPE_VERSION, chosen, size)).encode()).hexdigest()[:12]
    folder = cache_folder()
    path = folder / f"debian12-{profile}-{size // MIB}M-{key}.img"
    with _locked(folder / "build.lock"):
        if not path.exists():
            _build(path, chosen, size, Identity.from_key(key))
    return path


def cache_folder() -> Path:
    """The cache folder, made when missing."""
    named = os.environ.get("IMAGER_CACHE")
    folder = Path(named) if named else Path.home() / ".cache" / "imager-disks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def copy_sparse(source: Path, target: Path) -> None:
    """Copy an image file; its holes stay holes."""
    _run("cp", "--sparse=always", "--reflink=auto", "--", source, target)


def _build(path: Path, profile: Profile, size_bytes: int, identity: Identity) -> None:
    if os.geteuid() != 0:
        raise BuildError(f"{path.name} is not in the cache, and building it needs root")
    layout = Layout.for_size(size_bytes)
    unfinished = path.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        with unfinished.open("wb") as file:
            file.truncate(size_bytes)
        _say("partition table, swap and root filesystem")
        _write_partition_table(unfinished, layout, identity)
        _make_swap(unfinished, layout.swap, identity)
        _make_root_filesystem(unfinished, layout.root, identity)
        with _mounted(unfinished, layout.root) as root:
            _say(f"Debian packages of profile {profile.name} (some minutes)")
            _install_debian(root, profile)
            _configure(root, identity)
            _say("payload and stale data")
            _write_payload(root, profile)
        _say("GRUB for BIOS and UEFI")
        _install_grub_bios(unfinished, layout.bios_boot, identity)
        _install_grub_uefi(unfinished, layout.esp, identity)
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _say(f"{path} ({path.stat().st_blocks * 512 // MIB} MiB on disk)")


def _write_partition_table(image: Path, layout: Layout, identity: Identity) -> None:
    lines = ["label: gpt", f"label-id: {identity.disk}", "unit: sectors"]
    for part in layout.all():
        start, size = part.offset // SECTOR, part.size // SECTOR
        lines.append(f"start={start}, size={size}, type={part.type_guid}, name={part.name}")
    _run("sfdisk", "--quiet", image, given="\n".join(lines))


def _make_swap(image: Path, part: Partition, identity: Identity) -> None:
    with _loop_device(image, part) as device:
        _run("mkswap", "-U", identity.swap, "-L", "swap", device)


def _make_root_filesystem(image: Path, part: Partition, identity: Identity) -> None:
    with _loop_device(image, part) as device:
        _run("mkfs.ext4", "-q", "-U", identity.root, "-L", "root", device)


def _install_debian(root: Path, profile: Profile) -> None:
    """Run mmdebstrap; the packages it downloads are kept in the cache folder."""
    archives = cache_folder() / f"debs-{profile.name}"
    archives.mkdir(exist_ok=True)
    _run(
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        f"--include={','.join(profile.packages)}",
        '--aptopt=Acquire::Check-Valid-Until "false"',
        '--aptopt=Acquire::Retries "3"',
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt={option}" for option in profile.dpkg_options),
        "--skip=essential/unlink",
        '--setup-hook=mkdir -p "$1/var/cache/apt/archives"',
        f"--setup-hook=sync-in {archives} /var/cache/apt/archives",
        f"--customize-hook=sync-out /var/cache/apt/archives {archives}",
        "bookworm",
        root,
        *_mirrors(),
    )


def _mirrors() -> list[str]:
    base = os.environ.get("IMAGER_MIRROR", "http://deb.debian.org/debian").rstrip("/")
    return [f"deb {base} bookworm main", f"deb {base}-security bookworm-security main"]


def _configure(root: Path, identity: Identity) -> None:
    for name, text in _config_files(root, identity).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "boot/efi").mkdir(exist_ok=True)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    for unit in ("/etc/systemd/system/boot-marker.service", _NETWORKD):
        with suppress(FileExistsError):
            (wants / Path(unit).name).symlink_to(unit)
    _run("chroot", root, "usermod", "-p", _PASSWORD_HASH, "root")


_NETWORKD = "/lib/systemd/system/systemd-networkd.service"


def _config_files(root: Path, identity: Identity) -> dict[str, str]:
    kernel = sorted((root / "boot").glob("vmlinuz-*"))[-1].name
    initrd = kernel.replace("vmlinuz-", "initrd.img-")
    return {
        "etc/hostname": f"{HOSTNAME}\n",
        "etc/hosts": f"127.0.0.1 localhost\n127.0.1.1 {HOSTNAME}\n",
        # A set id: without it every boot would be systemd's "first boot".
        "etc/machine-id": f"{identity.machine}\n",
        "etc/fstab": (
            f"UUID={identity.root} / ext4 errors=remount-ro 0 1\n"
            f"UUID={identity.esp_uuid} /boot/efi vfat umask=0077 0 1\n"
            f"UUID={identity.swap} none swap sw 0 0\n"
        ),
        "etc/systemd/network/80-dhcp.network": "[Match]\nName=en*\n[Network]\nDHCP=yes\n",
        "etc/systemd/system/boot-marker.service": (
            "[Unit]\nDescription=Tell the console that the system is up\n"
            "After=multi-user.target\n"
            "[Service]\nType=oneshot\nStandardOutput=tty\nTTYPath=/dev/console\n"
            f"ExecStart=/bin/echo '{BOOT_MARKER}'\n"
        ),
        "boot/grub/grub.cfg": (
            "serial --unit=0 --speed=115200\n"
            "terminal_input console serial\nterminal_output console serial\n"
            "set timeout=1\n"
            "menuentry 'Debian GNU/Linux' {\n"
            f"  search --no-floppy --fs-uuid --set=root {identity.root}\n"
            f"  linux /boot/{kernel} root=UUID={identity.root} ro"
            " console=tty0 console=ttyS0,115200\n"
            f"  initrd /boot/{initrd}\n"
            "}\n"
        ),
    }


def _write_payload(root: Path, profile: Profile) -> None:
    """Incompressible files that stay, then files that are deleted once they are on the disk."""
    source = random.Random(profile.name)
    _write_random_files(root / "srv/data", profile.random_bytes, source)
    stale = root / "srv/stale"
    _write_random_files(stale, profile.stale_bytes, source)
    os.sync()
    shutil.rmtree(stale)


def _write_random_files(folder: Path, total_bytes: int, source: random.Random) -> None:
    folder.mkdir(parents=True)
    for number in range(total_bytes // (16 * MIB)):
        with (folder / f"{number:04}.bin").open("wb") as file:
            for _ in range(16):
                file.write(source.randbytes(MIB))


def _install_grub_bios(image: Path, part: Partition, identity: Identity) -> None:
    """Put boot.img into the MBR and core.img into bios_boot, as grub-bios-setup does.

    Offsets from GRUB's include/grub/i386/pc/boot.h: the core image's first LBA at 0x5c, the jump
    that is overwritten with NOPs on hard disks at 0x66, the partition table from 0x1b8; core.img's
    own block list is in the last 12 bytes of its first sector and starts with the next LBA.
    """
    core = bytearray(_grub_image("i386-pc", [*_GRUB_MODULES, "biosdisk"], identity))
    if len(core) > part.size:
        raise BuildError(f"GRUB's core.img has {len(core)} bytes, bios_boot only {part.size}")
    first_lba = part.offset // SECTOR
    struct.pack_into("<Q", core, SECTOR - 12, first_lba + 1)
    boot = bytearray((_GRUB / "i386-pc/boot.img").read_bytes())
    struct.pack_into("<Q", boot, 0x5C, first_lba)
    boot[0x66:0x68] = b"\x90\x90"
    with image.open("r+b") as file:
        file.write(boot[:0x1B8])
        file.seek(part.offset)
        file.write(core)


def _install_grub_uefi(image: Path, part: Partition, identity: Identity) -> None:
    """Make the ESP with mtools: the kernel of the building machine may lack vfat.

    Debian's signed loaders, as its installer puts them, so that it boots under Secure Boot. The
    signed GRUB reads its grub.cfg from its own folder on the ESP.
    """
    esp = f"{image}@@{part.offset}"
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "grub.cfg"
        config.write_text(_early_config(identity))
        _run(
            # One sector a cluster: with more, so small a filesystem is too small for FAT32.
            *("mkfs.fat", "-F", "32", "-s", "1", "-n", "ESP", "-i", identity.esp_volume),
            *("--offset", str(part.offset // SECTOR), image, str(part.size // 1024)),
        )
        _run("mmd", "-i", esp, "::/EFI", "::/EFI/BOOT", "::/EFI/debian")
        for source, copy in (
            (_SHIM, "BOOT/BOOTX64.EFI"),
            (_SIGNED_GRUB, "BOOT/grubx64.efi"),
            (_SHIM, "debian/shimx64.efi"),
            (_SIGNED_GRUB, "debian/grubx64.efi"),
            (config, "debian/grub.cfg"),
        ):
            _run("mcopy", "-i", esp, source, f"::/EFI/{copy}")


def _early_config(identity: Identity) -> str:
    return (
        f"search --no-floppy --fs-uuid --set=root {identity.root}\n"
        "set prefix=($root)/boot/grub\n"
        "configfile $prefix/grub.cfg\n"
    )


def _grub_image(target: str, modules: Sequence[str], identity: Identity) -> bytes:
    """A GRUB program that finds the root filesystem by UUID and reads its grub.cfg."""
    with tempfile.TemporaryDirectory() as scratch:
        early, made = Path(scratch) / "early.cfg", Path(scratch) / "grub.img"
        early.write_text(_early_config(identity))
        _run(
            "grub-mkimage",
            f"--directory={_GRUB / target}",
            f"--format={target}",
            f"--output={made}",
            f"--config={early}",
            "--prefix=/boot/grub",
            *modules,
        )
        return made.read_bytes()


@contextmanager
def _loop_device(image: Path, part: Partition) -> Iterator[str]:
    """One partition as a loop device; by offset, as not every kernel scans loop partitions."""
    place = ("--offset", str(part.offset), "--sizelimit", str(part.size))
    device = _run("losetup", "--find", "--show", *place, image).strip()
    try:
        yield device
    finally:
        _run("losetup", "--detach", device)


@contextmanager
def _mounted(image: Path, part: Partition) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="imager-disk-") as scratch:
        # apt's unprivileged user must be able to reach the root filesystem.
        Path(scratch).chmod(0o755)
        mountpoint = Path(scratch) / "root"
        mountpoint.mkdir()
        with _loop_device(image, part) as device:
            _run("mount", "-t", "ext4", device, mountpoint)
            try:
                yield mountpoint
            finally:
                _run("umount", mountpoint)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(*command: str | Path, given: str | None = None) -> str:
    """Run a tool and return its standard output. Raises BuildError."""
    # Debian keeps mkfs and sfdisk in folders that a user's PATH often lacks.
    variables = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    variables["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"
    line = " ".join(str(word) for word in command)
    try:
        done = subprocess.run(
            [str(word) for word in command],
            input=given or "",
            capture_output=True,
            text=True,
            env=variables,
            check=True,
        )
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed: scripts/setup.sh demo") from None
    except subprocess.CalledProcessError as error:
        said = "\n".join((error.stdout + error.stderr).splitlines()[-30:])
        raise BuildError(f"exit code {error.returncode} from: {line}\n{said}") from None
    return done.stdout


def _say(text: str) -> None:
    print(f"debian_disk: {text}", file=sys.stderr, flush=True)


def _parse_size(text: str) -> int:
    """Bytes from 4G, 512M or a plain number of bytes."""
    unit = {"M": MIB, "G": GIB}.get(text[-1:].upper())
    return int(text) if unit is None else int(text[:-1]) * unit


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a Debian 12 server's disk image.")
    parser.add_argument("output", type=Path, help="the raw image file to write")
    parser.add_argument("--size", type=_parse_size, help="for example 4G; default by profile")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="small")
    options = parser.parse_args()
    try:
        copy_sparse(debian_disk(size_bytes=options.size, profile=options.profile), options.output)
    except BuildError as error:
        sys.exit(f"debian_disk: {error}")


if __name__ == "__main__":
    main()
