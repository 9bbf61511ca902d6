"""Run this project's tests under Debian's kernel, which has what the host's may lack.

A small virtual machine boots Debian's kernel package. Its root is the host's own, read-only over
9p, with a layer of memory on top: the same checkout, the same virtual environment, the host's
tools; nothing that a test writes reaches the host. Modules are loaded as the kernel asks for them.

    python -m tests.machines.guest tests/guest -k lvm

Kernel and busybox come as Debian packages into the cache folder (see ``debian_disk``), once.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.machines.debian_disk import cache_folder

CHECKOUT = Path(__file__).parents[2]
MEMORY_MIB = 2048
IN_GUEST = "IMAGER_IN_GUEST"
"""The environment variable that the tests inside can know it by."""

_KERNEL = "linux-image-amd64"
_BUSYBOX = "busybox-static"
# What it takes to reach the host's root; everything else is loaded from there.
_FIRST_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
# What a test leaves behind lies in memory.
_PYTEST = ("--color=no", "-o", "tmp_path_retention_policy=failed")
_EXIT_MARKER = re.compile(r"imager-guest: exit code (\d+)")

# Its /sbin/modprobe stays the kernel's: a chroot, unlike switch_root, leaves that world alone.
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in {first_modules}; do insmod /first/$module; done
mkdir -p /host /memory /root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=1048576,cache=loose host /host
mount -t tmpfs -o size=75% memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /root
for folder in proc sys dev; do mount --rbind /$folder /root/$folder; done
mkdir /checkout
mount --bind /root{checkout} /checkout
for folder in tmp run dev/shm; do
    mkdir -p /root/$folder
    mount -t tmpfs -o mode=1777,size=75% tmpfs /root/$folder
done
# It may lie in one of these.
mkdir -p /root{checkout}
mount --bind /checkout /root{checkout}
mkdir -p /lib/modules /root/lib/modules
mount --bind {modules} /lib/modules
mount --bind {modules} /root/lib/modules
for module in loop fuse; do modprobe $module; done
# The host's own, if it has one, wants an index that the unpacked package has not.
rm -f /root/sbin/modprobe
cp /bin/busybox /root/sbin/modprobe
ip link set lo up
chroot /root /bin/sh -c {command}
echo "imager-guest: exit code $?"
poweroff -f
"""


class GuestResult(NamedTuple):
    exit_code: int | None
    """Of the command; None when it came to no end in time, or the machine died."""
    log: str
    """Everything on the machine's console."""
    seconds: float

    @property
    def passed(self) -> bool:
        return self.exit_code == 0


def run_in_guest(arguments: list[str], timeout: float) -> GuestResult:
    """Run ``python -m pytest`` with these arguments, in the checkout, within ``timeout`` seconds.

    Raises CalledProcessError when a package can't be had.
    """
    pytest = [sys.executable, "-m", "pytest", *_PYTEST, *arguments]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="imager-guest-") as scratch:
        kernel = debian_kernel()
        initrd = Path(scratch) / "initrd"
        initrd.write_bytes(_initramfs(kernel, _in_checkout(pytest)))
        log = _console(_qemu(next(kernel.glob("boot/vmlinuz-*")), initrd), timeout)
    ended = _EXIT_MARKER.search(log)
    return GuestResult(int(ended[1]) if ended else None, log, time.monotonic() - started)


def _in_checkout(command: list[str]) -> str:
    """A shell line; device-mapper must not wait for a udev that isn't there."""
    variables = {
        IN_GUEST: "1",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "DM_DISABLE_UDEV": "1",
    }
    settings = [f"{name}={value}" for name, value in variables.items()]
    line = shlex.join(["env", *settings, *command])
    return f"cd {shlex.quote(str(CHECKOUT))} && exec {line}"


def _qemu(kernel: Path, initrd: Path) -> list[str]:
    share = "local,path=/,mount_tag=host,security_model=none,readonly=on"
    return [
        # The host's kernel ends QEMU when this process dies, however it dies.
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", "2", "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none"),
        *("-serial", "stdio", "-no-reboot", "-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", "console=ttyS0 loglevel=2 panic=-1 rdinit=/init"),
        # Mounts below the root have inode numbers of their own: without remapping they collide.
        *("-virtfs", f"{share},multidevs=remap"),
    ]


def _console(command: list[str], timeout: float) -> str:
    """What the machine says until its end; it is killed when the time is over."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
        raw = done.stdout
    except subprocess.TimeoutExpired as late:
        raw = (late.stdout or b"") + f"\nno end after {timeout:.0f} s".encode()
    return raw.decode(errors="replace").replace("\r", "")


# --- packages -----------------------------------------------------------------------------------


def debian_kernel() -> Path:
    """The folder with ``boot/`` and ``lib/modules/`` of Debian's kernel package, unpacked.

    Raises CalledProcessError when the package can't be had.
    """
    return _unpacked(_KERNEL)


def _unpacked(package: str) -> Path:
    """The folder with a Debian package's files, from the cache or else downloaded."""
    folder = cache_folder() / "guest" / package
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        files = Path(scratch) / "files"
        download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download"]
        subprocess.run([*download, _real_name(package)], cwd=scratch, check=True)
        (archive,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg", "-x", str(archive), str(files)], check=True)
        if package == _KERNEL:
            _index_modules(files)
        try:
            files.rename(folder)
        except OSError:  # another process was faster
            assert folder.exists()
    return folder


def _real_name(package: str) -> str:
    """The kernel's package is a name for the newest one."""
    if package != _KERNEL:
        return package
    said = subprocess.run(
        ["apt-cache", "depends", package], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    found = re.search(r"Depends: (linux-image-\S+)", said)
    assert found is not None, said
    return found[1]


def _index_modules(files: Path) -> None:
    """What the package's own installation would do."""
    version = _modules(files).name
    busybox = str(_unpacked(_BUSYBOX) / "bin/busybox")
    subprocess.run([busybox, "depmod", "-b", str(files), version], check=True)


def _modules(kernel: Path) -> Path:
    (folder,) = (kernel / "lib/modules").iterdir()
    return folder


# --- the first root -----------------------------------------------------------------------------


def _initramfs(kernel: Path, command: str) -> bytes:
    modules = _modules(kernel)
    first = _with_dependencies(modules, _FIRST_MODULES)
    init = _INIT.format(
        first_modules=" ".join(path.name for path in first),
        modules=shlex.quote(f"/host{modules.parent}"),
        command=shlex.quote(command),
        checkout=shlex.quote(str(CHECKOUT)),
    )
    archive = b"".join(
        _cpio_entry(name, 0o040755)
        for name in ("bin", "sbin", "dev", "proc", "sys", "first", "lib")
    )
    archive += _cpio_entry("init", 0o100755, init.encode())
    busybox = _unpacked(_BUSYBOX) / "bin/busybox"
    archive += _cpio_entry("bin/busybox", 0o100755, busybox.read_bytes())
    archive += _cpio_entry("sbin/modprobe", 0o120777, b"/bin/busybox")
    for path in first:
        archive += _cpio_entry(f"first/{path.name}", 0o100644, path.read_bytes())
    return archive + _cpio_entry("TRAILER!!!", 0)


def _with_dependencies(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """Files in the order in which they can be loaded (modules.dep names the deepest last)."""
    needs = dict(
        line.split(":", 1) for line in (modules / "modules.dep").read_text().splitlines() if line
    )
    path_of = {Path(path).stem.replace("-", "_"): path for path in needs}
    ordered: dict[str, None] = {}
    for name in names:
        if name in path_of:  # else it is built in
            path = path_of[name]
            ordered |= dict.fromkeys([*reversed(needs[path].split()), path])
    return [modules / path for path in ordered]


def _cpio_entry(name: str, mode: int, content: bytes = b"") -> bytes:
    """One member of an initramfs (Linux Documentation/driver-api/early-userspace/buffer-format)."""
    raw_name = name.encode() + b"\0"
    fields = (1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw_name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw_name
    return _padded(head) + _padded(content)


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 4)


def main() -> None:
    timeout = float(os.environ.get("IMAGER_GUEST_TIMEOUT", "600"))
    result = run_in_guest(sys.argv[1:], timeout)
    print(result.log)
    print(f"guest: {result.seconds:.0f} s, exit code {result.exit_code}")
    sys.exit(0 if result.passed else 1)


if __name__ == "__main__":
    main()
