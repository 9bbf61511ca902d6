"""At the menu of the rescue system: what is refused, and media that go away in the middle.

Nothing hangs, everything is explained, and the menu comes back.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from imager.repository import Repository
from tests.machines.qemu import Disk, Machine
from tests.support.disks import MIB, make_sparse
from tests.vm.rescue import CHOICE, MENU, TARGET_NAME, YES_NO, Person, build
from tests.vm.rescuedisks import (
    is_untouched,
    make_repository,
    restored_outside,
    same_bytes,
    seconds_of,
    slow_down,
)

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

ANYWAY = r"To go on, type anyway: "
HALFWAY = r"restoring \S+ +[2-8]\d%"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an image of a UEFI machine beside ``data``, of a disk without an EFI partition."""
    folder = make_repository(tmp_path_factory.mktemp("refusals"))
    repository = Repository.open(str(folder))
    document = repository.find("data@latest").document
    hardware = document["hardware"] | {"firmware": "uefi"}
    older = {"id": "20200101t000000z-00000000", "name": "uefi", "hardware": hardware}
    repository.commit(document | older)
    return folder


@pytest.fixture(scope="module")
def medium(repository: Path) -> Path:
    return build(
        repository.with_name("rescue.iso"),
        *("--repo", repository, "--image", "data@latest", "--image", "uefi@latest"),
        *("--network", "none"),
    )


def plan(person: Person, target: str, *, image: str = "1") -> None:
    """Choose what to restore and where, up to the plan."""
    person.answer(MENU, "1")
    person.answer(CHOICE, image)
    person.answer(CHOICE, target)
    for _ in ("grow", "delta", "read back"):
        person.answer(YES_NO, "n")


def type_name(person: Person) -> None:
    person.machine.send(person.see(TARGET_NAME))


def said(person: Person, pattern: str) -> str:
    """What was said up to the pattern (without groups), in one line."""
    return re.sub(r"\s+", " ", person.see(f"(?s:(.*?)){pattern}"))


def test_targets_that_do_not_fit(medium: Path, tmp_path: Path) -> None:
    """Too small; sectors of 4096 bytes; a machine that the image would not boot in; another name
    typed than the target's."""
    disks = [
        Disk(make_sparse(tmp_path / "small.img", 64 * MIB), "virtio", "small", keep=True),
        Disk(make_sparse(tmp_path / "fits.img", 128 * MIB), "virtio", "fits", keep=True),
        Disk(
            make_sparse(tmp_path / "4kn.img", 128 * MIB), "nvme", "4kn", keep=True, sector_size=4096
        ),
    ]
    with seconds_of("targets that do not fit"), Machine(cdrom=medium, disks=disks) as machine:
        person = Person(machine)
        person.wait_until_ready()
        numbers = {"nvme": "1", "small": "2", "fits": "3"}
        plan(person, numbers["small"])
        assert re.search(r"Refused: - .*partitions", said(person, "nothing was written"))
        plan(person, numbers["nvme"])
        assert "sectors of 4096 bytes" in said(person, "nothing was written")
        plan(person, numbers["fits"], image="2")
        words = said(person, ANYWAY)
        assert "In this machine: will not boot" in words
        assert "booted by UEFI, and the disk has no boot code for BIOS" in words
        machine.send("")
        plan(person, numbers["fits"])
        person.answer(TARGET_NAME, "sda")
        person.see("another name: nothing was written")
        person.see(MENU)
    assert all(is_untouched(disk.image) for disk in disks)


def test_disc_taken_out(medium: Path, repository: Path, tmp_path: Path) -> None:
    """The restore fails and says why; the menu goes on, and knows the unfinished target."""
    target = make_sparse(tmp_path / "target.img", 128 * MIB)
    with (
        seconds_of("disc taken out, and in again"),
        Machine(cdrom=medium, disks=[Disk(target, keep=True)]) as machine,
    ):
        person = Person(machine)
        person.wait_until_ready()
        plan(person, "1")
        slow_down(machine, "disc")
        type_name(person)
        person.see(HALFWAY)
        machine.change_cdrom(None)
        assert "error: " in said(person, "Input/output error")
        machine.change_cdrom(medium)
        plan(person, "1")
        assert "it is gone on with" in said(person, "All that is on")
    assert not same_bytes(target, restored_outside(repository, target))


def test_stick_pulled(medium: Path, tmp_path: Path) -> None:
    target = make_sparse(tmp_path / "target.img", 128 * MIB)
    with (
        seconds_of("stick pulled"),
        Machine(usb=medium, disks=[Disk(target, keep=True)]) as machine,
    ):
        person = Person(machine)
        person.wait_until_ready()
        plan(person, "2")
        slow_down(machine, "stick-image")
        type_name(person)
        person.see(HALFWAY)
        machine.unplug_usb()
        assert "error: " in said(person, "Input/output error")
        person.see(MENU)
