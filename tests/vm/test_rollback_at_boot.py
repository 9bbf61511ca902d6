"""A running server is rolled back: begun inside it, done by the rescue system at its next start."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.machines.debian_disk import BOOT_MARKER, Layout, copy_sparse, debian_disk
from tests.machines.qemu import SYSTEM_UP, Disk, Machine
from tests.support.commandline import CHECKOUT, imager_alone
from tests.support.disks import MIB, loop_disk, make_filesystem, make_sparse, mounted
from tests.vm.rescuedisks import seconds_of

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: builds a disk, mounts"),
]

BOOT_SECONDS = 600
"""Three starts and a build, emulated: half a minute each on an idle machine."""

ARRANGE_SECONDS = 900
"""The emulated machine collects the rescue system from files of the host."""

# What update-grub writes at the head and the end of grub.cfg (GRUB 2.06, 00_header and 41_custom).
GRUB_ONCE = """
insmod loadenv
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="0"
fi
"""
GRUB_CUSTOM = """
if [ -f ${config_directory}/custom.cfg ]; then
  source ${config_directory}/custom.cfg
elif [ -z "${config_directory}" -a -f $prefix/custom.cfg ]; then
  source $prefix/custom.cfg
fi
"""

# The host's root with a layer of memory above it, as in tests/machines/guest.py; /boot and the
# modules are the machine's own.
HOST = f"""
cd /run && mkdir host memory root && modprobe -a 9pnet_virtio 9p overlay
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=1048576,cache=loose host host
mount -t tmpfs -o size=60% memory memory && mkdir memory/upper memory/work
mount -t overlay -o lowerdir=host,upperdir=memory/upper,workdir=memory/work root root
mkdir -p root/checkout && mount --bind root{CHECKOUT} root/checkout
for each in tmp run; do mount -t tmpfs -o size=60% tmpfs root/$each; done
mkdir -p root{CHECKOUT} && mount --bind root/checkout root{CHECKOUT}
mkdir -p root/boot root/usr/lib/modules root/images
for each in proc sys dev; do mount --rbind /$each root/$each; done
mount --bind /boot root/boot && mount --bind /usr/lib/modules root/usr/lib/modules
mount /dev/vdb root/images && echo the host is there
"""


@contextmanager
def root_of(disk: Path, folder: Path) -> Iterator[Path]:
    part = Layout.for_size(disk.stat().st_size).root
    folder.mkdir(exist_ok=True)
    options = f"loop,offset={part.offset},sizelimit={part.size}"
    subprocess.run(["mount", "-t", "ext4", "-o", options, disk, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Debian with the GRUB that Debian's own tools would have set up."""
    folder = tmp_path_factory.mktemp("server")
    disk = folder / "server.img"
    copy_sparse(debian_disk(), disk)
    with root_of(disk, folder / "root") as root:
        grub = root / "boot/grub"
        config = grub / "grub.cfg"
        head, menu = config.read_text().split("set timeout=1\n")
        config.write_text(f"{GRUB_ONCE}{head}set timeout=1\n{menu}{GRUB_CUSTOM}")
        shutil.copytree("/usr/lib/grub/i386-pc", grub / "i386-pc", dirs_exist_ok=True)
        subprocess.run(["grub-editenv", grub / "grubenv", "create"], check=True)
        (root / "srv/state").write_text("before\n")
    yield disk
    disk.unlink()


def in_host(*words: str) -> str:
    """A command line that runs a program of the host inside the machine."""
    variables = ["env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"]
    inside = f"cd {shlex.quote(str(CHECKOUT))} && exec {shlex.join([*variables, *words])}"
    return shlex.join(["chroot", "/run/root", "sh", "-c", inside])


def test_rollback_at_boot(server: Path, tmp_path: Path) -> None:
    backup = make_sparse(tmp_path / "backup.img", 1024 * MIB)
    with loop_disk(backup) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "mnt") as folder:
            words = ["--init", "--repo", folder / "images", "--name", "server", "--json"]
            image = imager_alone("capture", server, *words).json["image"]
    disks = [Disk(server, "virtio", keep=True), Disk(backup, "virtio", "backup", keep=True)]
    share = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"
    imager = [sys.executable, "-m", "imager", "rollback"]
    with (
        seconds_of("up, changed, arranged, down"),
        Machine(disks=disks, memory_mib=2048, extra=("-virtfs", share)) as machine,
    ):
        machine.expect(SYSTEM_UP, timeout_seconds=BOOT_SECONDS)
        machine.log_in(timeout_seconds=BOOT_SECONDS)
        machine.run(
            "echo after >/srv/state; rm -r /usr/lib/apt; head -c 30M /dev/urandom >/srv/new"
        )
        script = "; ".join(line for line in HOST.splitlines() if line)
        assert "the host is there" in machine.run(script)
        repo = ["--repo", "/images/images"]
        said = machine.run(
            in_host(*imager, image, "/dev/vda", "--at-boot", "--yes", *repo, "--progress", "none"),
            timeout_seconds=ARRANGE_SECONDS,
        )
        assert "the next start does it" in said, said
        said = machine.run(in_host(*imager, "--status"), timeout_seconds=ARRANGE_SECONDS)
        assert image in said and "the next start does it" in said
        machine.run("sync")
        machine.send("systemctl reboot --force")
        machine.wait_for_end(timeout_seconds=BOOT_SECONDS)
    with seconds_of("rescue system"), Machine(disks=disks) as machine:
        machine.expect(r"imager-rescue: result exit=\d+ .*\n", timeout_seconds=BOOT_SECONDS)
        log = machine.wait_for_end(timeout_seconds=300)
        assert f"result exit=0 image={image} " in log, log[-3000:]
        assert "reason=rolled back" in log
    with seconds_of("as it was"), Machine(disks=disks) as machine:
        machine.expect(BOOT_MARKER, timeout_seconds=BOOT_SECONDS)
        machine.log_in(timeout_seconds=BOOT_SECONDS)
        assert machine.run("cat /srv/state") == "before\n"
        assert machine.run("ls -d /usr/lib/apt /srv/new /boot/imager-rollback 2>/dev/null") == (
            "/usr/lib/apt\n"
        )
        assert machine.run("cat /sys/class/dmi/id/sys_vendor /proc/1/comm").endswith("systemd\n")
