"""What the rescue system stands on: drivers by modalias, the medium, its job, fixed addresses."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bootmedia.guest import coldplug, medium, network
from bootmedia.guest.coldplug import Drivers
from bootmedia.guest.network import Network
from bootmedia.guest.system import missing_layers, read_job
from bootmedia.job import JOB_PATH, Job, NetworkSetup
from imager.errors import ImagerError, ObjectMissing, UsageError

ID = "0123456789abcdef"
JOB = Job(ID, 0, "1.0", "6.1", 0, ("python", "modules", "job"))

INDEX = {
    "modules.dep": "bus.ko:\ncard.ko: bus.ko\nhelper.ko:\nproud.ko:\n",
    "modules.alias": "alias pci:v1* card\nalias pci:v2* proud\nalias cpu:* helper\n",
    "modules.softdep": "softdep proud pre: helper\n",
    "modules.builtin": "kernel/loop.ko\n",
}


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    for name, text in INDEX.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def inserted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel was given; it takes no helper."""
    names: list[str] = []

    def insert(file: Path) -> None:
        names.append(file.name)
        if file.name == "helper.ko":
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(coldplug, "insert_module", insert)
    return names


def test_a_device_gets_its_driver_after_what_that_needs(modules: Path, inserted: list[str]) -> None:
    drivers = Drivers(modules)
    drivers.load_for("pci:v12")
    drivers.load_for("pci:v12")
    drivers.load_for("cpu:type:x86")
    assert inserted == ["bus.ko", "card.ko"]
    assert drivers.load("loop") and drivers.load("card")
    assert not drivers.load("nothing")
    assert inserted == ["bus.ko", "card.ko"]


def test_a_helper_that_fails_keeps_no_driver_away(modules: Path, inserted: list[str]) -> None:
    drivers = Drivers(modules)
    assert drivers.load("proud")
    assert inserted == ["helper.ko", "proud.ko"]
    (failure,) = drivers.failures
    assert failure.startswith("helper.ko: ")
    assert not drivers.load("helper")


def test_it_goes_on_until_no_device_is_new(
    modules: Path, inserted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def present() -> list[str]:
        """The second device is behind the first one's driver."""
        return ["pci:v1", "pci:v2"] if "card.ko" in inserted else ["pci:v1"]

    monkeypatch.setattr(coldplug, "_modaliases", present)
    assert Drivers(modules).coldplug() == 4
    assert inserted[-1] == "proud.ko"


@pytest.mark.parametrize("pack", [lzma.compress, zstandard.compress, lambda raw: raw])
def test_modules_are_unpacked(pack: Callable[[bytes], bytes]) -> None:
    assert coldplug._unpacked(pack(b"\x7fELF module")) == b"\x7fELF module"


@pytest.mark.parametrize("magic", [b"\xfd7zXZ\0", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_a_damaged_module_is_a_failure_of_that_one(magic: bytes, tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("bad.ko.xz:\n")
    (tmp_path / "bad.ko.xz").write_bytes(magic + b"\xff" * 40)
    drivers = Drivers(tmp_path)
    assert not drivers.load("bad")
    assert len(drivers.failures) == 1


def test_an_iso_is_known_by_its_descriptor(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.write_bytes(bytes(16 * 2048) + b"\x01CD001\x01")
    assert medium._is_iso(str(device))
    for content in (b"", bytes(1 << 16)):
        device.write_bytes(content)
        assert not medium._is_iso(str(device))
    assert not medium._is_iso(str(tmp_path / "none"))


def test_a_medium_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medium, "_devices", lambda: iter(()))
    with pytest.raises(ObjectMissing, match=f"the medium {ID} was not found"):
        medium.find_medium(ID, 0.5)
    with pytest.raises(ObjectMissing, match="volume 2"):
        medium.find_medium(ID, 0, volume=2)


def test_layers_that_were_cut_are_named(tmp_path: Path) -> None:
    (tmp_path / "python").touch()
    assert missing_layers(JOB, tmp_path) == ["modules", "job"]


def test_the_job_is_read(tmp_path: Path) -> None:
    with pytest.raises(ImagerError, match="no rescue system"):
        read_job(tmp_path)
    file = tmp_path / JOB_PATH
    file.parent.mkdir(parents=True)
    file.write_bytes(JOB.to_bytes())
    assert read_job(tmp_path) == JOB


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (NetworkSetup("static"), "network address"),
        (NetworkSetup("static", address="192.0.2.300/24"), "192.0.2.300"),
        (NetworkSetup("static", address="192.0.2.7/24", gateway="x"), "'x'"),
        (NetworkSetup("pigeon"), "network mode 'pigeon'"),
    ],
)
def test_set_ups_that_cannot_be(
    setup: NetworkSetup, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "run", lambda *_, **__: pytest.fail("touched a card"))
    with pytest.raises(UsageError, match=reason):
        Network(lambda _: None).set_up(setup)
