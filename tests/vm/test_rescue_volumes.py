"""An image that is spread over several discs, of which the machine has a drive for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.machines.debian_disk import debian_disk
from tests.machines.qemu import BOOT_SECONDS, Disk, Machine
from tests.support.commandline import imager_alone
from tests.support.disks import make_sparse
from tests.vm.rescue import TARGET_NAME, Person, build

pytestmark = [pytest.mark.vm, pytest.mark.timeout(4 * BOOT_SECONDS)]

PUT_IN = r"Put in volume (\d+) of the medium, then press Enter"
NEXT = rf"{PUT_IN}|{TARGET_NAME}|restart now\? "
MOST_SWAPS = 20


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("volumes")
    repository = folder / "images"
    imager_alone("repo", "init", "--repo", repository)
    imager_alone("capture", debian_disk(), "--repo", repository, "--name", "server")
    words = ("--repo", repository, "--image", "server@latest", "--volume-size", "180M")
    build(folder / "rescue.iso", *words)
    paths = sorted(folder.glob("rescue-*.iso"))
    assert len(paths) > 1
    return paths


def test_restore_from_several_discs(volumes: list[Path], tmp_path: Path) -> None:
    target = make_sparse(tmp_path / "target.img", debian_disk().stat().st_size)
    swaps = []
    with Machine(cdrom=volumes[0], disks=[Disk(target, "virtio", keep=True)]) as machine:
        person = Person(machine)
        person.wait_until_ready()
        person.choose_restore()
        while len(swaps) < MOST_SWAPS:
            volume, name = person.look(NEXT, seconds=300).groups()
            if volume:
                swaps.append(int(volume))
                machine.change_cdrom(volumes[int(volume) - 1])
                machine.send("")
            elif name:
                machine.send(name)
            else:
                break
        print(f"discs put in: {swaps}")
        assert set(swaps) == set(range(1, len(volumes) + 1))
        machine.send("y")
        machine.wait_for_end(timeout_seconds=60)
    with Machine(target) as machine:
        machine.log_in()
        assert machine.run("hostname").strip() == "imager-test"


def test_a_volume_that_never_comes(volumes: list[Path], tmp_path: Path) -> None:
    """The person gives up: nothing was written, and the menu is there."""
    target = make_sparse(tmp_path / "target.img", debian_disk().stat().st_size)
    with Machine(cdrom=volumes[0], disks=[Disk(target, "virtio", keep=True)]) as machine:
        person = Person(machine)
        person.wait_until_ready()
        person.choose_restore()
        assert person.see(PUT_IN) == "2"
        machine.send("")
        person.see("volume 2 was not found on any disk or drive", seconds=60)
        person.see(PUT_IN)
        machine.send("\x03")
        person.see("menu, 1 to 9")
    assert target.stat().st_blocks == 0
