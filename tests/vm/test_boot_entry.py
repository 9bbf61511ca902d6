"""Boot entries in the variables of real firmware: `tests/guest/test_boot_entry.py` in OVMF."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.machines import guest
from tests.machines.qemu import _firmware_options

pytestmark = pytest.mark.vm


def test_in_a_uefi_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = guest._qemu

    def with_firmware(kernel: Path, initrd: Path) -> list[str]:
        firmware = _firmware_options("uefi", tmp_path / "variables.fd")
        return [*plain(kernel, initrd), *firmware]

    monkeypatch.setattr(guest, "_qemu", with_firmware)
    result = guest.run_in_guest(["-s", "tests/guest/test_boot_entry.py"], timeout=240)
    print(result.log)
    assert result.passed
    assert "1 passed" in result.log
