"""`imager media check`: what boots is told to work, what is broken is told to fail; and what the
kernel of the rescue system reads from the medium is what was put on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bootmedia.iso import read_iso_file
from bootmedia.medium import RECORD_PATH, Medium
from tests.machines.qemu import BOOT_SECONDS, Machine
from tests.support.commandline import imager_alone
from tests.vm.rescue import MENU, READY_SECONDS, Person, build

pytestmark = [pytest.mark.vm, pytest.mark.timeout(7 * BOOT_SECONDS)]

MODES = ["BIOS CD", "BIOS USB", "UEFI CD", "UEFI USB", "Secure Boot CD", "Secure Boot USB"]

# Run by the rescue system's own Python, so that only its kernel stands between.
HASHES = (
    "import hashlib,json;from pathlib import Path;f=Path('/run/imager/medium');"
    "r=json.loads((f/'.imager/medium.json').read_text())['files'];"
    "n=[i['path'] for i in r if "
    "hashlib.sha256((f/i['path']).read_bytes()).hexdigest()!=i['sha256']];"
    "print('hashed',len(r),'differ',n)"
)


@pytest.fixture(scope="module")
def iso(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("check") / "rescue.iso")


def test_every_mode_works(iso: Path) -> None:
    attempts = imager_alone("media", "check", iso, "--accel", "tcg", "--json").json["boots"]
    for attempt in attempts:
        print(f"{attempt['mode']}: {attempt['outcome']} in {attempt['milliseconds'] / 1000:.1f} s")
    assert [(attempt["mode"], attempt["outcome"]) for attempt in attempts] == [
        (mode, "works") for mode in MODES
    ]


def test_a_medium_with_a_damaged_layer_is_told(iso: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.iso"
    shutil.copyfile(iso, broken)
    layer = read_iso_file(iso, "boot/modules.img", limit=1 << 28)
    with broken.open("r+b") as file:
        file.seek(iso.read_bytes().index(layer) + len(layer) // 2)
        file.write(bytes(len(layer) // 2))
    imager_alone("media", "check", broken, "--accel", "tcg", "--mode", "bios-cd", code=3)
    with Machine(cdrom=broken) as machine:
        machine.expect("sentinel failed: incomplete: modules", timeout_seconds=READY_SECONDS)


def test_the_kernel_reads_what_was_written(iso: Path) -> None:
    files = Medium.from_bytes(read_iso_file(iso, RECORD_PATH), RECORD_PATH).files
    with Machine(cdrom=iso) as machine:
        person = Person(machine)
        person.wait_until_ready()
        person.answer(MENU, "8")
        machine.send(f'python3 -c "{HASHES}"')
        assert person.see(r"hashed (\d+ differ .*)") == f"{len(files)} differ []"
