"""Media built on a kernel that is none: everything but booting them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bootmedia.iso import read_iso_file
from bootmedia.job import JOB_PATH, Job, NetworkSetup
from bootmedia.medium import RECORD_PATH, Medium, marker_path
from imager.errors import FormatError
from imager.initramfs import read_cpio
from imager.pack import pack_name
from imager.repository import Repository
from tests.support.commandline import imager
from tests.support.disks import MIB, make_random

pytestmark = pytest.mark.skipif(
    shutil.which("grub-mkimage") is None or not Path("/usr/lib/grub/i386-pc").is_dir(),
    reason="GRUB's tools (grub-common, grub-pc-bin, grub-efi-amd64-bin) are not installed",
)

VERSION = "6.1.0-0-test"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a kernel that is not signed, and a module that nobody needs."""
    root = tmp_path_factory.mktemp("kernel")
    (root / "boot").mkdir()
    (root / "boot" / f"vmlinuz-{VERSION}").write_bytes(b"\x90" * MIB)
    modules = root / "lib/modules" / VERSION
    (modules / "kernel").mkdir(parents=True)
    (modules / "modules.dep").write_text("kernel/unneeded.ko:\n")
    return root


@pytest.fixture(autouse=True)
def then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def build(out: Path, kernel: Path, *words: object, code: int = 0) -> Any:
    command = ["media", "build", out, "--modules-dir", kernel, "--modules", "host", "--json"]
    return imager(*command, *words, code=code).json


def job_of(layer: bytes) -> Job:
    (content,) = (
        member.content for member in read_cpio(io.BytesIO(layer)) if member.name == JOB_PATH
    )
    assert content is not None
    return Job.from_bytes(content, JOB_PATH)


def test_an_iso(kernel: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "rescue.iso"
    work.mkdir()
    built = build(out, kernel, "--work", work, "--network", "192.0.2.7/24", "--no-boot-entry")
    assert built["paths"] == [str(out)]
    assert built["size"] == built["overhead"] == out.stat().st_size
    assert built["kernel"] == VERSION
    assert built["secure_boot"] is False
    assert any("not signed" in text for text in built["warnings"])
    assert not any(work.iterdir()), "the work folder is left as it was"

    medium = Medium.from_bytes(read_iso_file(out, RECORD_PATH), RECORD_PATH)
    assert medium.to_json() == built["medium"]
    assert (medium.volume, medium.volumes, medium.created) == (1, 1, 1_700_000_000)
    assert read_iso_file(out, marker_path(medium.id)) == b""
    for file in medium.files:
        content = read_iso_file(out, file.path, limit=256 * MIB)
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256)
    menu = read_iso_file(out, "boot/grub/grub.cfg").decode()
    assert f"imager.memory={medium.least_memory // MIB}" in menu
    assert medium.id in menu

    job = job_of(read_iso_file(out, "boot/job.img"))
    assert (job.medium_id, job.kernel, job.volumes) == (medium.id, VERSION, 1)
    assert job.network == NetworkSetup("static", None, "192.0.2.7/24")
    assert (job.boot_entry, job.fill_fallback) == (False, True)


def test_the_same_input_gives_the_same_bytes(kernel: Path, tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("a.iso", "b.iso", "c.iso"))
    for path in (first, second):
        build(path, kernel)
    assert first.read_bytes() == second.read_bytes()
    built = build(other, kernel, "--kernel-args", "nomodeset")
    assert built["medium"]["id"] != json.loads(read_iso_file(first, RECORD_PATH))["id"]


def test_a_folder_for_the_network(kernel: Path, tmp_path: Path) -> None:
    out = tmp_path / "pxe"
    built = build(out, kernel, "--format", "pxe", "--fetch", "http://192.0.2.1/images")
    assert built["paths"] == [str(out)]
    job = job_of((out / "job.img").read_bytes())
    assert (job.volumes, job.repositories) == (0, ("http://192.0.2.1/images",))
    assert "initrd=job.img" in (out / "boot.ipxe").read_text()
    build(out, kernel, "--format", "pxe")
    assert job_of((out / "job.img").read_bytes()).repositories == (), "built again"


def test_images_on_several_volumes(kernel: Path, repo: Path, tmp_path: Path) -> None:
    source = make_random(tmp_path / "web1.img", 100 * MIB)
    image = imager("capture", source, "--repo", repo, "--json").json["image"]
    whole = build(tmp_path / "whole.iso", kernel, "--repo", repo, "--image", "web1@latest")
    size = whole["overhead"] + 72 * MIB
    words = ["--repo", repo, "--image", image, "--volume-size", size]
    built = build(tmp_path / "rescue.iso", kernel, *words, "--unattended", "web1@latest=only")
    assert built["paths"] == [str(tmp_path / f"rescue-{n}.iso") for n in range(1, 3)]
    assert [pin["id"] for pin in built["medium"]["images"]] == [image]

    packs: list[str] = []
    for number, path in enumerate(map(Path, built["paths"]), 1):
        assert path.stat().st_size <= size
        medium = Medium.from_bytes(read_iso_file(path, RECORD_PATH), RECORD_PATH)
        assert (medium.id, medium.volume, medium.volumes) == (built["medium"]["id"], number, 2)
        for name in ("repository.json", f"manifests/{image}.json"):
            assert read_iso_file(path, f"images/{name}") == (repo / name).read_bytes()
        for pack in (repo / "packs").rglob("*.pack"):
            name = f"packs/{pack.parent.name}/{pack.name}"
            try:
                content = read_iso_file(path, f"images/{name}", limit=256 * MIB)
            except FormatError:
                continue
            assert content == pack.read_bytes()
            packs.append(name)
    stored = {str(path.relative_to(repo)) for path in (repo / "packs").rglob("*.pack")}
    top = Repository.open(str(repo)).manifest(image).disks[0].top.pack
    # each pack on one volume, but that of the block map on both
    assert sorted(packs) == sorted([*stored, pack_name(top)])
    job = job_of(read_iso_file(tmp_path / "rescue-1.iso", "boot/job.img"))
    assert job.unattended is not None
    assert (job.unattended.image, job.volumes) == (image, 2)
    assert job.images[0].disks[0].root == Repository.open(str(repo)).manifest(image).disks[0].root


def test_what_is_not_overwritten(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/kept").touch()
    build(tmp_path / "data", kernel, "--format", "pxe", code=4)
    build(tmp_path / "data", kernel, code=4)
    assert (tmp_path / "data/kept").exists()
    build(tmp_path / "nowhere/rescue.iso", kernel, code=2)


def test_no_kernel(tmp_path: Path) -> None:
    error = build(tmp_path / "rescue.iso", tmp_path, code=1)["error"]
    assert "kernel" in error["message"]
    assert not (tmp_path / "rescue.iso").exists()
