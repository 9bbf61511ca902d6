"""Rescue media without building one: options, the record, network boot files, and the check with
a QEMU that plays its part."""

from __future__ import annotations

from pathlib import Path

import pytest

from bootmedia import check
from bootmedia.check import MODES, Mode, check_boots, why_not
from bootmedia.fitness import version_key, warnings_about
from bootmedia.job import NetworkSetup, PinnedImage, TargetRule
from bootmedia.medium import RECORD_PATH, Medium, marker_path, medium_id
from bootmedia.moduleindex import ModuleIndex
from bootmedia.netboot import write_netboot
from imager.cli.media import parse_network
from imager.errors import FormatError, ToolError, UsageError
from imager.fingerprint import Device, Fingerprint, NetworkCard
from imager.progress import NullProgress
from tests.support.commandline import imager
from tests.support.disks import MIB
from tests.support.media import MEDIUM, make_iso

# --- options ---


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("dhcp", NetworkSetup()),
        ("none", NetworkSetup(mode="none")),
        ("192.0.2.7/24", NetworkSetup("static", None, "192.0.2.7/24")),
        (
            "192.0.2.7/24,192.0.2.1,192.0.2.53,192.0.2.54",
            NetworkSetup("static", None, "192.0.2.7/24", "192.0.2.1", ("192.0.2.53", "192.0.2.54")),
        ),
        (
            "2001:db8::7/64,2001:db8::1",
            NetworkSetup("static", None, "2001:db8::7/64", "2001:db8::1"),
        ),
    ],
)
def test_network(text: str, meant: NetworkSetup) -> None:
    assert parse_network(text) == meant


@pytest.mark.parametrize("text", ["", "static", "192.0.2.7", "192.0.2.7/33", "192.0.2.7/24,gate"])
def test_network_that_is_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_network(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "vmdk"], "iso or pxe"),
        (["--modules", "some"], "all or host"),
        (["--then", "sleep"], "reboot or poweroff"),
        (["--network", "192.0.2.7"], "192.0.2.7"),
        (["--grow"], "--unattended"),
        (["--report-url", "http://192.0.2.1/"], "--unattended"),
        (["--unattended", "web1@latest"], "which image goes to which disk"),
        (["--unattended", "web1@latest=serial="], "which image goes to which disk"),
        (["--unattended", "web1@latest=any"], "which image goes to which disk"),
        (["--volume-size", "much"], "not a size"),
    ],
)
def test_wrong_usage(repo: Path, tmp_path: Path, words: list[str], said: str) -> None:
    outcome = imager("media", "build", tmp_path / "out.iso", "--repo", repo, *words, code=2)
    assert said in outcome.err
    assert not (tmp_path / "out.iso").exists()


def test_a_private_key_does_not_go_onto_a_medium(tmp_path: Path) -> None:
    key = tmp_path / "id_ed25519"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    outcome = imager("media", "build", tmp_path / "out.iso", "--ssh-key", key, code=2)
    assert "private key" in outcome.err
    key.write_text("# nothing\n")
    outcome = imager("media", "build", tmp_path / "out.iso", "--ssh-key", key, code=2)
    assert "no public keys" in outcome.err


# --- the record of a medium ---


def test_record() -> None:
    assert Medium.from_bytes(MEDIUM.to_bytes(), RECORD_PATH) == MEDIUM
    for wrong in (b"", b"{", b"[]", b'{"id": 7}'):
        with pytest.raises(FormatError):
            Medium.from_bytes(wrong, RECORD_PATH)


def test_the_id_comes_from_the_content() -> None:
    first = medium_id([b"a", b"bc"])
    assert (len(first), int(first, 16) >= 0) == (16, True)
    assert first == medium_id([b"a", b"bc"])
    assert first != medium_id([b"ab", b"c"])
    assert marker_path(first) == f".imager/{first}"


# --- network boot ---


@pytest.mark.parametrize("signed", [True, False])
def test_network_boot_folder(tmp_path: Path, signed: bool) -> None:
    kernel, layer, loader = tmp_path / "k", tmp_path / "l", tmp_path / "e"
    for path in (kernel, layer, loader):
        path.write_text(path.name)
    folder = tmp_path / "pxe"
    folder.mkdir()
    write_netboot(
        folder,
        kernel=kernel,
        layers={"python.img": layer, "job.img": layer},
        arguments="quiet",
        least_memory=512 * MIB,
        loaders={"shimx64.efi": loader} if signed else {},
    )
    script = (folder / "boot.ipxe").read_text()
    assert script.startswith("#!ipxe\n")
    assert "kernel vmlinuz initrd=python.img initrd=job.img quiet" in script
    assert script.index("\ninitrd python.img") < script.index("\ninitrd job.img")
    assert "initrd /python.img /job.img" in (folder / "grub/grub.cfg").read_text()
    assert (folder / "vmlinuz").read_text() == "k"
    assert (folder / "shimx64.efi").exists() is signed
    text = (folder / "README.txt").read_text()
    assert "512 MiB" in text
    assert ("does not boot with Secure Boot" in text) is not signed


# --- does it still fit ---

_INDEX = ModuleIndex({"modules.alias": "alias pci:v00008086d* e1000e\n"})


def test_fitness() -> None:
    medium = Medium(
        **{
            **vars(MEDIUM),
            "images": (PinnedImage("20200101t000000z-00000000", "web1"), PinnedImage("2", "db")),
        }
    )
    known = Device("pci", "0000:00:02.0", driver="e1000e", modalias="pci:v00008086d000010D3sv")
    other = Device("pci", "0000:00:03.0", driver="megaraid_sas", modalias="pci:v00001000d0005Dsv")
    unused = Device("pci", "0000:00:04.0", modalias="pci:v00001000d0005Esv")
    hardware = Fingerprint(
        storage=(other, unused), network=(NetworkCard("eth0", devices=(known, other)),)
    )
    newest = {"web1": "20210101t000000z-00000000", "db": "2"}
    found = list(warnings_about(medium, _INDEX, hardware, "6.1.0-12-amd64", newest.get))
    assert len(found) == 4
    assert "is newer than" in found[0] and "web1" in found[0]
    assert "6.1.0-12-amd64" in found[1]
    assert "storage device 0000:00:03.0 (megaraid_sas)" in found[2]
    assert "network device 0000:00:03.0" in found[3]
    assert not list(warnings_about(medium, _INDEX, Fingerprint(), "6.1.0-1-amd64", {}.get))


def test_kernel_versions() -> None:
    versions = ["5.15.0-9-generic", "6.1.0-9-amd64", "6.1.0-10-amd64", "6.12.1"]
    assert sorted(["6.12.1", *versions[:3]], key=version_key) == versions


# --- the check ---


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a QEMU of our own; it finds ``$console``, ``$monitor`` and ``$said``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder / "qemu-system-x86_64"


def play(qemu: Path, part: str) -> None:
    qemu.write_text(
        "#!/bin/bash\n"
        'for word in "$@"; do case $word in\n'
        "    file:*) console=${word#file:} ;;\n"
        "    file,id=word,path=*) said=${word#*path=} ;;\n"
        "esac; done\n" + part
    )
    qemu.chmod(0o755)


def try_boots(tmp_path: Path, *modes: Mode, limit: float = 20) -> list[check.Attempt]:
    iso = make_iso(tmp_path / "rescue.iso", size=1000)
    return check_boots(iso, NullProgress(), modes=modes, accel="tcg", limit_seconds=limit)


def test_a_boot_that_works(qemu: Path, tmp_path: Path) -> None:
    play(qemu, 'printf "\\033[2Jimager-rescue: ready 0.1.0\\r\\n" > "$console"; sleep 1')
    (attempt,) = try_boots(tmp_path, MODES[0])
    assert (attempt.mode, attempt.outcome, attempt.reason) == ("BIOS CD", "works", "")
    assert attempt.milliseconds > 0


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ('echo "Kernel panic - not syncing" > "$console"; sleep 1', "Kernel panic"),
        ('echo "error: file not found." > "$console"; sleep 1', "file not found"),
        ("exit 0", "switched itself off"),
        ("echo no such machine >&2; exit 1", "no such machine"),
        ("exec sleep 2", "in time"),
    ],
)
def test_a_boot_that_fails(qemu: Path, tmp_path: Path, part: str, reason: str) -> None:
    play(qemu, part)
    (attempt,) = try_boots(tmp_path, MODES[1], limit=1)
    assert attempt.outcome == "fails"
    assert reason in attempt.reason


def test_secure_boot_must_be_on(
    qemu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firmware = tmp_path / "OVMF"
    firmware.mkdir()
    monkeypatch.setattr(check, "_OVMF", firmware)
    (mode, *_) = (mode for mode in MODES if mode.firmware == "secureboot")
    assert "ovmf" in why_not(mode, firmware_folder=firmware)
    for name in ("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd"):
        (firmware / name).touch()
    assert why_not(mode, firmware_folder=firmware) == ""
    assert "without signed" in why_not(mode, signed=False, firmware_folder=firmware)
    play(qemu, 'echo "imager-rescue: ready" > "$console"; sleep 1')
    (attempt,) = try_boots(tmp_path, mode)
    assert "did not say that Secure Boot is on" in attempt.reason


def test_without_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "find_tool", lambda name: None)
    with pytest.raises(ToolError, match="not installed"):
        try_boots(tmp_path, MODES[0])


def test_target_rules() -> None:
    from imager.cli.media import _rule

    assert _rule("web1@latest=only") == ("web1@latest", "", "only")
    assert _rule("web1@latest/sda=serial=A=B") == ("web1@latest", "sda", "serial=A=B")
    assert TargetRule("sda", "serial=A=B").target == "serial=A=B"
