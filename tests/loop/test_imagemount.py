"""A real server's image: its filesystems mounted, and what its kernel can drive."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from imager.blocksource import FileSource
from imager.capture import CaptureJob, SourceDisk, capture
from imager.compatibility import compare
from imager.diskidentity import DiskIdentity
from imager.errors import ImagerError
from imager.fingerprint import Device, Fingerprint
from imager.imagemount import mounted, read_image_drivers
from imager.imagesource import ImageSource
from imager.imagevolumes import OpenDisk, image_volumes
from imager.layout import read_layout
from imager.manifest import Manifest
from imager.process import run
from imager.progress import NullProgress
from imager.repository import Repository
from tests.machines.debian_disk import debian_disk
from tests.unit.test_allocation_lvm2 import MIB, START, linear, pv, text_of, volume

pytestmark = [
    pytest.mark.loop,
    pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root"),
]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, Manifest]:
    repository = Repository.create(str(tmp_path_factory.mktemp("debian") / "repo"))
    with FileSource(debian_disk()) as source:
        disk = SourceDisk("sda", source, read_layout(source), DiskIdentity(size=source.size))
        job = CaptureJob(disks=(disk,), name="debian")
        return repository, capture(job, repository, NullProgress())


def test_volumes(image: tuple[Repository, Manifest]) -> None:
    repository, manifest = image
    with ImageSource(repository, manifest.disks[0]) as source:
        found = image_volumes([OpenDisk(manifest.disks[0], source)])
        assert [volume.name for volume in found] == ["sda 1", "sda 2", "sda 3", "sda 4"]
        with pytest.raises(ImagerError, match="sda 3 is not readable: swap"):
            mounted(found[2]).__enter__()
        with mounted(found[3]) as root:
            assert (root / "etc/hostname").read_text() == "imager-test\n"


def test_boot_drivers(image: tuple[Repository, Manifest]) -> None:
    started = time.perf_counter()
    drivers, aliases, reason = read_image_drivers(*image)
    print(f"looked into the image: {time.perf_counter() - started:.1f} s")
    assert drivers is not None and aliases is not None, reason
    assert drivers.notes == ()
    assert drivers.kernel.endswith("-amd64")
    for name in ("ahci", "nvme", "virtio_blk", "virtio-scsi", "sd_mod", "usb_storage"):
        assert drivers.at_boot(name), name
    assert drivers.installed("e1000e") and drivers.installed("loop")
    assert drivers.installed("ext4") and not drivers.installed("no_such_driver")
    assert "ahci" in aliases("pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01")
    assert aliases("virtio:d00000002v00001AF4") == ["virtio_blk"]


def test_compared_with_a_machine(image: tuple[Repository, Manifest]) -> None:
    drivers, aliases, _ = read_image_drivers(*image)
    manifest = image[1]
    nvme = Device(bus="pci", driver="nvme", modalias="pci:v00001B36d00000010bc01sc08i02")
    here = Fingerprint(architecture="x86_64", firmware="uefi", storage=(nvme,))
    target = DiskIdentity(size=manifest.disks[0].size, logical_sector=512, transport="nvme")
    found = compare(manifest, manifest.disks[0], here, target, drivers, aliases)
    assert found.verdict == "will work", found.reasons


def test_a_logical_volume_in_two_pieces(tmp_path: Path) -> None:
    """With a kernel and modules in it: it is taken for the root."""
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/hostname").write_text("inside\n")
    (root / "lib/modules/6.1.0/kernel").mkdir(parents=True)
    (root / "lib/modules/6.1.0/kernel/nvme.ko.xz").write_bytes(b"")
    (root / "lib/modules/6.1.0/modules.dep").write_text("kernel/nvme.ko.xz:\n")
    inside = tmp_path / "inside"
    run(["mkfs.ext4", "-q", "-d", str(root), str(inside), "12M"])
    content = inside.read_bytes()
    image = pv(text_of(volume("root", linear(0, 8, "pv0", 10), linear(8, 4, "pv0", 2))))
    image[START + 10 * MIB : START + 18 * MIB] = content[: 8 * MIB]
    image[START + 2 * MIB : START + 6 * MIB] = content[8 * MIB :]
    path = tmp_path / "disk"
    path.write_bytes(image)
    repository = Repository.create(str(tmp_path / "repo"))
    with FileSource(path) as source:
        disk = SourceDisk("sda", source, read_layout(source), DiskIdentity(size=source.size))
        manifest = capture(CaptureJob(disks=(disk,), name="lvm"), repository, NullProgress())
    with ImageSource(repository, manifest.disks[0]) as opened:
        (found,) = image_volumes([OpenDisk(manifest.disks[0], opened)])
        assert found.name == "vg/root"
        with mounted(found) as folder:
            assert (folder / "etc/hostname").read_text() == "inside\n"
    drivers, _, reason = read_image_drivers(repository, manifest)
    assert drivers is not None, reason
    assert drivers.kernel == "6.1.0"
    assert drivers.installed_modules == {"nvme"}
    assert drivers.initramfs_modules is None and "no initramfs" in drivers.notes[0]
