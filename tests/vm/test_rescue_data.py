"""A restored disk gets its data back in the rescue system, by restic from another disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from imager.loopdevice import loop_device
from imager.process import run
from tests.machines.qemu import BOOT_SECONDS, Disk, Machine
from tests.support.commandline import CHECKOUT, command
from tests.support.disks import MIB, make_filesystem, make_random, make_sparse, mounted
from tests.vm.rescue import CHOICE, YES_NO, Person, build
from tests.vm.rescuedisks import seconds_of

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3 * BOOT_SECONDS)]

PART_MIB = 94
SECRET = "correct horse\n"


class Server:
    """A disk with a system, whose mail is backed up to a disk that its fstab mounts at /backup."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mail = folder / "srv/mail"
        self.mail.mkdir(parents=True)
        make_random(self.mail / "1", 2 * MIB)
        (self.mail / "2").write_text("Dear reader")
        self.backup = make_sparse(folder / "backup.img", 128 * MIB)
        make_filesystem(self.backup, "ext4")
        run(["tune2fs", "-L", "backup", str(self.backup)])
        self.disk = self._make_disk()

    def _make_disk(self) -> Path:
        tree = self.folder / "tree"
        for name, text in {
            "etc/fstab": "LABEL=server / ext4 defaults 0 1\nLABEL=backup /backup ext4 ro 0 2\n",
            "etc/hostname": "mail1\n",
            "etc/imager/restic.password": SECRET,
            "etc/imager/imager.toml": self.config("/backup/restic", "/etc/imager/restic.password"),
        }.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
        for name in ("backup", "dev", "proc", "sys", "run"):
            (tree / name).mkdir()
        filesystem = make_sparse(self.folder / "filesystem.img", PART_MIB * MIB)
        run(["mkfs.ext4", "-q", "-F", "-L", "server", "-d", str(tree), str(filesystem)])
        disk = make_sparse(self.folder / "server.img", (PART_MIB + 2) * MIB)
        script = f"label: gpt\nstart=2048, size={PART_MIB * 2048}, type=L\n"
        run(["sfdisk", "--quiet", str(disk)], input_bytes=script.encode())
        with disk.open("r+b") as file:
            file.seek(MIB)
            file.write(filesystem.read_bytes())
        return disk

    def config(self, repository: object, password: object) -> str:
        return (
            f'[[data]]\nname = "mail"\nengine = "restic"\nrepository = "{repository}"\n'
            f'paths = ["{self.mail}"]\npassword-file = "{password}"\n'
        )

    def capture(self) -> Path:
        """With the data backup beside it."""
        images, secret = self.folder / "images", self.folder / "secret"
        secret.write_text(SECRET)
        with mounted(self.backup, self.folder / "mnt", "loop"):
            restic = self.folder / "mnt/restic"
            run(["restic", "init", "-r", str(restic), "--password-file", str(secret)])
            config = self.folder / "imager.toml"
            config.write_text(self.config(restic, secret))
            words = ("capture", self.disk, "--repo", images, "--init", "--name", "mail1", "--data")
            run(command(*words), environment=self.environment())
        return images

    def environment(self) -> dict[str, str]:
        return {
            "IMAGER_CONFIG": str(self.folder / "imager.toml"),
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
            "PYTHONPATH": str(CHECKOUT),
        }


def test_data_in_the_rescue_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path)
    images = server.capture()
    monkeypatch.setenv("IMAGER_CONFIG", str(tmp_path / "imager.toml"))
    iso = tmp_path / "rescue.iso"
    build(iso, "--repo", images, "--image", "mail1@latest", "--data")
    target = make_sparse(tmp_path / "target.img", server.disk.stat().st_size)
    disks = [
        Disk(target, "virtio", "target", keep=True),
        Disk(server.backup, "virtio", "backup", keep=True),
    ]
    with Machine(cdrom=iso, disks=disks) as machine:
        person = Person(machine)
        person.wait_until_ready()
        person.choose_restore()
        person.answer(r"type the name of the target \(\S+\): ", "vda", seconds=300)
        with seconds_of("restored, and the data with it"):
            person.answer(r"bring its data back now, from the data backup\? " + YES_NO, "y")
            assert person.see(r"1  (\S+) on /dev/vda1") == "mail1"
            person.answer(CHOICE, "1")
            person.answer(CHOICE, "1")  # the state that was taken with the image
            assert person.see(r"Data backup (\S+), restic") == "mail"
            person.answer(r"bring it back now\? " + YES_NO, "y")
            person.see("mail: brought back", seconds=300)
            person.answer(r"restart now\? ", "y")
        machine.wait_for_end(timeout_seconds=60)
    with (
        loop_device(str(target), MIB, PART_MIB * MIB) as device,
        mounted(device, tmp_path / "restored", "ro"),
    ):
        restored = tmp_path / "restored" / str(server.mail).lstrip("/")
        assert (restored / "1").read_bytes() == (server.mail / "1").read_bytes()
        assert (restored / "2").read_text() == "Dear reader"
        assert not any((tmp_path / "restored/run").iterdir())
