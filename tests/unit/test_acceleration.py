"""KVM where it works, by a QEMU that plays its part: the real device may hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from imager import acceleration
from imager.acceleration import choose_acceleration, kvm_works
from imager.errors import UsageError


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a QEMU of our own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder / "qemu-system-x86_64"


def play(qemu: Path, part: str) -> None:
    """It finds ``$said``, the file of the firmware's words."""
    qemu.write_text(
        "#!/bin/bash\n"
        'for word in "$@"; do case $word in\n'
        "    file,id=word,path=*) said=${word#*path=} ;;\n"
        "esac; done\n" + part
    )
    qemu.chmod(0o755)


def test_kvm_is_probed_without_waiting_for_it(
    qemu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some hosts the first call into KVM never returns, and no signal ends it."""
    device = tmp_path / "kvm"
    assert not kvm_works(device)
    device.touch()
    monkeypatch.setattr(acceleration, "_PROBE_SECONDS", 1.0)
    play(qemu, "trap '' ALRM TERM; sleep 60")
    started = time.monotonic()
    assert not kvm_works(device)
    assert time.monotonic() - started < 50
    monkeypatch.setattr(acceleration, "_PROBE_SECONDS", 60.0)
    play(qemu, 'echo SeaBIOS > "$said"')
    assert kvm_works(device)


def test_it_is_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[Path] = []

    def probe(device: Path) -> bool:
        probes.append(device)
        return True

    monkeypatch.setattr(acceleration, "_REMEMBERED", tmp_path / "run" / "kvm")
    monkeypatch.setattr(acceleration, "kvm_works", probe)
    assert choose_acceleration("auto") == choose_acceleration("auto") == "kvm"
    assert len(probes) == 1


def test_acceleration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "_kvm_works_here", lambda: False)
    assert choose_acceleration("tcg") == choose_acceleration("auto") == "tcg"
    with pytest.raises(UsageError):
        choose_acceleration("kvm")
    with pytest.raises(UsageError):
        choose_acceleration("hvf")
    monkeypatch.setattr(acceleration, "_kvm_works_here", lambda: True)
    assert choose_acceleration("auto") == choose_acceleration("kvm") == "kvm"
