"""The rescue system started over the network, as each firmware does it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.machines.qemu import BOOT_SECONDS, Firmware, Machine, Network
from tests.vm.rescue import READY, build

pytestmark = [pytest.mark.vm, pytest.mark.timeout(2 * BOOT_SECONDS)]

IPXE, SHIM = "boot.ipxe", "shimx64.efi"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("netboot") / "tftp", "--format", "pxe")


@pytest.mark.parametrize(
    ("firmware", "bootfile"), [("bios", IPXE), ("uefi", IPXE), ("secure-boot", SHIM)]
)
def test_the_network_boots_it(firmware: Firmware, bootfile: str, folder: Path) -> None:
    begun = time.monotonic()
    # iPXE is not signed: with Secure Boot the firmware fetches shim by itself.
    network = Network(tftp=folder, bootfile=bootfile, rom=bootfile == IPXE)
    with Machine(firmware=firmware, network=network) as machine:
        end = machine.expect(READY, timeout_seconds=BOOT_SECONDS)
        print(f"{firmware}: ready {time.monotonic() - begun:.1f} s after power-on")
        ready = machine.log[:end].splitlines()[-1]
    assert ("secure boot=on" in ready) == (firmware == "secure-boot")
