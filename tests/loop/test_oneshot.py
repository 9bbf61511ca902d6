"""A rollback at the next start: GRUB's entry for one start, and every reason not to arrange it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bootmedia import oneshot
from bootmedia.grubonce import Entry, Grub
from bootmedia.guest.targets import Candidate, choose_target
from bootmedia.job import PinnedImage, TargetRule
from bootmedia.oneshot import Rollback
from imager.diskidentity import DiskIdentity
from imager.errors import RefusedError
from imager.fingerprint import Fingerprint
from imager.progress import NullProgress
from tests.machines.guest import debian_kernel
from tests.support.disks import (
    MIB,
    loop_disk,
    make_filesystem,
    make_gpt,
    make_sparse,
    mounted,
    needs_loop,
)

pytestmark = needs_loop

CONFIG = 'if [ "${next_entry}" ] ; then\n...\nsource $prefix/custom.cfg\n'
MACHINE = Fingerprint(firmware="bios", memory=4 << 30)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A mounted ext4 with /boot and GRUB's files, small."""
    backing = make_sparse(tmp_path / "root.img", 64 * MIB)
    with loop_disk(backing) as device:
        make_filesystem(device, "ext4")
        with mounted(device, tmp_path / "root") as folder:
            (folder / "boot/grub").mkdir(parents=True)
            (folder / "boot/grub/grub.cfg").write_text(CONFIG)
            yield folder


@pytest.fixture
def plan(root: Path, tmp_path: Path) -> Rollback:
    """That of a server whose images are fetched."""
    disk = make_gpt(tmp_path / "server.img")
    return Rollback(
        image=PinnedImage("20200101t000000z-00000000"),
        disks=(("sda", str(disk)),),
        repository="http://192.0.2.7/images",
        created=1,
        boot=root / "boot",
        modules_dir=debian_kernel(),
    )


@pytest.fixture
def small_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rescue system itself is built by a VM test: here its files are stand-ins of a MiB."""

    def build(plan: Rollback, targets: Any, machine: Any, work: Path, progress: Any) -> Any:
        names = ("vmlinuz", "python.img", "modules.img", "job.img")
        files = [work / name for name in names]
        for file in files:
            file.write_bytes(bytes(MIB))
        return files, "quiet"

    monkeypatch.setattr(oneshot, "_build", build)


def reasons(plan: Rollback, machine: Fingerprint = MACHINE) -> str:
    """Of a refusal, after which nothing is on /boot."""
    with pytest.raises(RefusedError) as refused:
        oneshot.arrange(plan, machine, NullProgress())
    assert not (plan.boot / oneshot.FOLDER).exists()
    assert oneshot.status(plan.boot) is None
    assert Grub(plan.boot).next_entry() is None
    return "\n".join(refused.value.reasons)


@pytest.mark.usefixtures("small_system")
def test_arranged_and_taken_back(plan: Rollback) -> None:
    grub = plan.boot / "grub"
    own = "menuentry 'mine' {\n}"
    (grub / "custom.cfg").write_text(own)
    for _ in range(2):  # a second one replaces the first
        arranged = oneshot.arrange(plan, MACHINE, NullProgress())
    (rule,) = arranged.targets
    assert rule.target.startswith("table=")
    text = (grub / "custom.cfg").read_text()
    assert text.startswith(own) and text.count("menuentry") == 2
    assert "linux /boot/imager-rollback/vmlinuz quiet" in text
    assert "initrd /boot/imager-rollback/python.img /boot/imager-rollback/modules.img" in text
    said = subprocess.run(
        ["grub-editenv", grub / "grubenv", "list"], capture_output=True, text=True, check=True
    )
    assert said.stdout == "next_entry=imager-rollback\n"
    assert (grub / "grubenv").stat().st_size == 1024
    status = oneshot.status(plan.boot)
    assert status is not None and status.waiting and status.arranged == arranged

    subprocess.run(["grub-editenv", grub / "grubenv", "unset", "next_entry"], check=True)
    status = oneshot.status(plan.boot)
    assert status is not None and not status.waiting, "GRUB has taken it"

    assert oneshot.cancel(plan.boot)
    assert (grub / "custom.cfg").read_text() == f"{own}\n"
    assert not (plan.boot / oneshot.FOLDER).exists()
    assert not oneshot.cancel(plan.boot)


def test_an_entry_alone_leaves_nothing(root: Path) -> None:
    grub = Grub(root / "boot")
    assert grub.refusals() == []
    kernel = root / "boot/vmlinuz"
    grub.arrange(Entry("imager-test", "a title", kernel, [kernel], "quiet"))
    assert grub.next_entry() == "imager-test"
    assert not grub.cancel("another")
    assert grub.cancel("imager-test")
    assert grub.next_entry() is None
    assert not (root / "boot/grub/custom.cfg").exists()


@pytest.mark.usefixtures("small_system")
def test_a_machine_that_cannot(plan: Rollback, root: Path) -> None:
    config = plan.boot / "grub/grub.cfg"
    config.write_text("set default=0\n")
    said = reasons(plan)
    assert "knows no entry for one start" in said and "does not read it" in said
    config.unlink()
    assert "there is no GRUB" in reasons(plan)
    config.write_text(CONFIG)
    unsigned = replace(MACHINE, secure_boot=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bootmedia.kernel.is_signed", lambda image: False)
        assert "Secure Boot is on" in reasons(plan, unsigned)
    assert oneshot.arrange(plan, unsigned, NullProgress()), "Debian's kernel is signed"
    oneshot.cancel(plan.boot)
    with (root / "ballast").open("wb") as file:
        for _ in range(48):
            file.write(bytes(MIB))
    assert "are needed" in reasons(plan)


@pytest.mark.usefixtures("small_system")
def test_where_grub_cannot_write(plan: Rollback, tmp_path: Path) -> None:
    """It would start the rescue system for ever."""
    backing = make_sparse(tmp_path / "btrfs.img", 128 * MIB)
    with loop_disk(backing) as device:
        make_filesystem(device, "btrfs")
        with mounted(device, tmp_path / "btrfs") as folder:
            (folder / "grub").mkdir()
            (folder / "grub/grub.cfg").write_text(CONFIG)
            assert "GRUB cannot write there" in reasons(replace(plan, boot=folder))
    environment = plan.boot / "grub/grubenv"
    environment.symlink_to("elsewhere")
    assert "is a link" in reasons(plan)


@pytest.mark.usefixtures("small_system")
def test_a_repository_out_of_reach(plan: Rollback, root: Path, tmp_path: Path) -> None:
    for url, reason in (
        ("s3://bucket/images", "does not read s3:// repositories"),
        ("http://localhost:8000/images", "served by this machine itself"),
        ("http://127.0.0.1/images", "served by this machine itself"),
    ):
        assert reason in reasons(replace(plan, repository=url))
    server = next(path.parent for path in tmp_path.glob("root.img"))
    own_disk = replace(plan, disks=(("sda", str(server / "root.img")),))
    images = root / "images"
    images.mkdir()
    assert "which is rolled back" in reasons(replace(own_disk, repository=str(images)))
    assert "takes plain partitions" in reasons(replace(plan, repository=str(images)))


@pytest.mark.usefixtures("small_system")
def test_a_repository_on_another_disk(
    plan: Rollback, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop device stands for the disk."""
    monkeypatch.setattr(oneshot, "_STACKED", ("dm-",))
    deep = root / "a/b/c/d"
    deep.mkdir(parents=True)
    assert "4 folders deep" in reasons(replace(plan, repository=str(deep)))
    monkeypatch.setattr(oneshot, "_has_module", lambda kernel, module: module != "ext4")
    assert "has no driver for it" in reasons(replace(plan, repository=str(deep.parent)))
    monkeypatch.setattr(oneshot, "_has_module", lambda kernel, module: module == "ext4")
    assert oneshot.arrange(replace(plan, repository=str(deep.parent)), MACHINE, NullProgress())


def test_how_a_disk_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(make_gpt(tmp_path / "server.img"))
    known: dict[str, Any] = {"serial": "S1", "wwn": "0x5"}
    other = DiskIdentity("/dev/other", serial="S1")
    monkeypatch.setattr(
        oneshot, "disk_identity", lambda found: DiskIdentity(found, size=1, **known)
    )
    assert oneshot._target_rule("sda", path, []) == TargetRule("sda", "serial=S1")
    assert oneshot._target_rule("sda", path, [other]) == TargetRule("sda", "wwn=0x5")
    known.clear()
    rule = oneshot._target_rule("sda", path, [other])
    assert isinstance(rule, TargetRule) and rule.target.startswith("table=")
    strange = str(make_sparse(tmp_path / "strange.img", 64 * MIB))
    there = [Candidate(file, DiskIdentity(file, size=64 * MIB)) for file in (strange, path)]
    assert choose_target(rule, there, MIB).path == path, "the rescue system finds it again"
    plain = str(make_sparse(tmp_path / "plain.img", MIB))
    assert "to be known by" in str(oneshot._target_rule("sda", plain, []))
