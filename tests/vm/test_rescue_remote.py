"""The rescue system from afar: a fixed address, SSH, and an image of the machine's disk taken to
another one."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from imager.process import run
from tests.machines.debian_disk import debian_disk
from tests.machines.qemu import BOOT_SECONDS, Disk, Machine, Network
from tests.support.commandline import imager_alone
from tests.support.disks import GIB, make_filesystem, make_sparse, mounted
from tests.vm.rescue import CHOICE, MENU, YES_NO, Person, build

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3 * BOOT_SECONDS)]

SSH_OPTIONS = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = tmp_path_factory.mktemp("key") / "key"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
    return key


@pytest.fixture(scope="module")
def medium(key: Path) -> Path:
    network = "10.0.2.15/24,10.0.2.2,10.0.2.3"  # where QEMU's user network forwards ports to
    iso = key.with_name("rescue.iso")
    build(iso, "--ssh-key", key.with_suffix(".pub"), "--network", network)
    return iso


def test_ssh_and_capture(medium: Path, key: Path, tmp_path: Path) -> None:
    backup = make_sparse(tmp_path / "backup.img", 2 * GIB)
    make_filesystem(backup, "ext4")
    port = free_port()
    disks = [Disk(debian_disk(), "virtio", "source"), Disk(backup, "sata", "backup", keep=True)]
    with Machine(cdrom=medium, disks=disks, network=Network(ports=((port, 22),))) as machine:
        person = Person(machine)
        person.wait_until_ready()
        assert "partition table: gpt" in ssh(key, port, "imager inspect /dev/vda")
        assert "10.0.2.15/24" in ssh(key, port, "ip addr")
        person.answer(MENU, "5")
        person.answer(CHOICE, "1")  # the only filesystem on the second disk
        person.answer(CHOICE, "2")
        person.answer("the image's name: ", "server")
        person.answer(r"\(Enter: none\): ", "before the move")
        person.answer(YES_NO, "y")
        person.answer(r"begin now\? " + YES_NO, "y")
        image = person.see(r"image (\S+) of server: ", seconds=300)
        person.see(MENU)
    with mounted(backup, tmp_path / "backup", "loop,ro"):
        repository = tmp_path / "backup/imager"
        assert "all sound" in imager_alone("verify", "--repo", repository).out
        restored = tmp_path / "restored.img"
        imager_alone("restore", image, restored, "--yes", "--repo", repository)
    with Machine(restored) as machine:
        machine.log_in()
        assert machine.run("hostname").strip() == "imager-test"


def ssh(key: Path, port: int, command: str) -> str:
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    line = ["ssh", *options, "-i", str(key), "-p", str(port), "root@127.0.0.1", command]
    return run(line, timeout_seconds=120).stdout.decode()


def test_a_stranger_is_not_let_in(medium: Path, tmp_path: Path) -> None:
    other, port = tmp_path / "other", free_port()
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)])
    with Machine(cdrom=medium, network=Network(ports=((port, 22),))) as machine:
        Person(machine).wait_until_ready()
        options = [word for option in SSH_OPTIONS for word in ("-o", option)]
        line = ["ssh", *options, "-i", str(other), "-p", str(port), "root@127.0.0.1", "true"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
