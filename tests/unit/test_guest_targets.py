"""Rules that pick a target: exactly one disk, or a refusal that says why of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from bootmedia.guest import targets
from bootmedia.guest.session import Session
from bootmedia.guest.targets import Candidate, candidates, choose_target
from bootmedia.job import Job, TargetRule
from imager.deviceuse import Use
from imager.diskidentity import DiskIdentity
from imager.errors import RefusedError

GIB = 1 << 30


def disk(path: str, gib: int | None, reason: str | None = None, **known: str) -> Candidate:
    size = None if gib is None else gib * GIB
    return Candidate(path, DiskIdentity(path=path, size=size, **known), reason)  # type: ignore[arg-type]


STICK = disk("/dev/sda", 16, "this rescue medium", model="Stick")
SMALL = disk("/dev/sdb", 2, model="Disk", serial="S1")
LARGE = disk("/dev/sdc", 8, model="Disk", serial="S2", wwn="0x5000c500a1b2c3d4")
OTHER = disk("/dev/nvme0n1", 8, model="Other", serial="S3")
UNKNOWN = disk("/dev/sdd", None, model="Unknown")


@pytest.mark.parametrize(
    ("rule", "present", "chosen"),
    [
        ("only", [STICK, SMALL, LARGE, UNKNOWN], LARGE),
        ("serial=S2", [SMALL, LARGE, OTHER], LARGE),
        ("serial=s2 ", [SMALL, LARGE, OTHER], LARGE),
        ("wwn=0x5000C500A1B2C3D4", [SMALL, LARGE, OTHER], LARGE),
        ("model=Other", [SMALL, LARGE, OTHER], OTHER),
        ("model=Disk", [SMALL, LARGE, OTHER], LARGE),
        ("/dev/nvme0n1", [SMALL, LARGE, OTHER], OTHER),
    ],
)
def test_one_fits(rule: str, present: list[Candidate], chosen: Candidate) -> None:
    assert choose_target(TargetRule("sda", rule), present, 8 * GIB) == chosen


@pytest.mark.parametrize(
    ("rule", "present", "reasons"),
    [
        ("only", [], ["no disk is fit"]),
        ("only", [SMALL, UNKNOWN], ["/dev/sdb.*too small: the image needs", "/dev/sdd.*too small"]),
        (
            "only",
            [LARGE, OTHER],
            ["several disks are fit", "/dev/sdc.*: fit", "/dev/nvme0n1.*: fit"],
        ),
        ("only", [STICK], ["/dev/sda.*this rescue medium"]),
        ("model=Stick", [STICK, LARGE], ["/dev/sda.*this rescue medium", "/dev/sdc.*not the one"]),
        ("serial=S1", [SMALL, LARGE], ["/dev/sdb.*too small", "/dev/sdc.*not the one"]),
        ("serial=S9", [SMALL, LARGE], ["/dev/sdb.*not the one", "/dev/sdc.*not the one"]),
        ("/dev/sdz", [LARGE], ["no disk is fit"]),
        ("largest", [LARGE], ["'largest' is no rule"]),
        ("serial=", [UNKNOWN], ["'serial=' is no rule"]),
        ("path=/dev/sdc", [LARGE], ["is no rule"]),
    ],
)
def test_refused(rule: str, present: list[Candidate], reasons: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        choose_target(TargetRule("sda", rule), present, 4 * GIB)
    for reason in reasons:
        assert refused.match(reason)


def test_a_link_to_a_disk() -> None:
    """A rule with a link below /dev, as udev makes them."""
    rule = TargetRule("sda", "/dev/../dev/sdc")
    assert choose_target(rule, [LARGE, OTHER], GIB) == LARGE


def test_the_disks_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def uses_of(path: str) -> list[Use]:
        Path(path).stat()
        return [Use("sdb1", "in use as swap", True)] if path == "/dev/zero" else []

    monkeypatch.setattr(targets, "disks", lambda: ["/dev/null", "/dev/zero", "/dev/gone"])
    monkeypatch.setattr(targets, "uses_of", uses_of)
    job = Job("0123456789abcdef", 0, "1.0", "6.1", 0, ())
    with Session(job) as session:
        found = candidates(session)
    assert [(item.path, item.reason) for item in found] == [
        ("/dev/null", None),
        ("/dev/zero", "in use: sdb1 is in use as swap"),
    ]
