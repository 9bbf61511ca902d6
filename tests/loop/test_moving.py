"""Export and import: other programs' files become the same image again."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imager.errors import ToolError
from imager.foreign import make_raw
from tests.support.commandline import imager
from tests.support.disks import digest

pytestmark = [
    pytest.mark.loop,
    pytest.mark.skipif(os.geteuid() != 0, reason="partclone needs root"),
]

MIB = 1 << 20
SIZE = 64 * MIB

# Number, first sector, sectors: ext4, swap, and in an extended partition FAT's place, empty.
GPT = """label: gpt
label-id: 11111111-2222-4333-8444-555555555555
start=2048, size=65536, type=L
start=67584, size=16384, type=S
"""
MBR = """label: dos
label-id: 0x12345678
start=2048, size=65536, type=83
start=67584, size=16384, type=82
start=83968, size=32768, type=5
start=86016, size=20480, type=83
"""
SWAP_UUID = "0c0ffee0-1111-4222-8333-444444444444"


def tool(*words: object, content: bytes | None = None) -> bytes:
    done = subprocess.run(
        [*map(str, words)], input=content, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def make_disk(path: Path, table: str = GPT) -> None:
    """A table with boot code, ext4 with files, and swap."""
    folder = path.with_name("files")
    folder.mkdir()
    chance = random.Random(3)
    for n in range(30):
        (folder / f"{n}").write_bytes(chance.randbytes(n * 10_000) + b"text " * n * 100)
    with path.open("wb") as disk:
        disk.truncate(SIZE)
    tool("sfdisk", "--quiet", path, content=table.encode())
    part = path.with_name("part")
    for kind, at, size in (("ext4", 2048, 65536), ("swap", 67584, 16384), ("ext4", 86016, 20480)):
        with part.open("wb") as file:
            file.truncate(size * 512)
        if kind == "swap":
            tool("mkswap", "--quiet", f"--uuid={SWAP_UUID}", "--label=pool", part)
        else:
            tool("mkfs.ext4", "-q", "-b", "1024", "-d", folder, part)
        if at == 86016 and table is GPT:
            continue
        write(path, at * 512, part.read_bytes())
    part.unlink()
    write(path, 0, chance.randbytes(440))


def write(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moving") / "web.img"
    make_disk(path)
    return path


@pytest.fixture
def captured(repo: Path, disk: Path) -> dict[str, Any]:
    """The disk's image in ``repo``."""
    found: dict[str, Any] = imager("capture", disk, "--name", "web", "--repo", repo, "--json").json
    return found


def imported(repo: Path, path: Path, *words: object) -> dict[str, Any]:
    command = ["import", path, "--name", "again", "--repo", repo, "--json", *words]
    found: dict[str, Any] = imager(*command).json
    imager("verify", found["image"], "--repo", repo)
    return found


def root(document: dict[str, Any]) -> str:
    return str(document["disks"][0]["root"])


@pytest.mark.parametrize("form", ["raw", "qcow2", "vmdk", "vhdx", "vdi"])
def test_there_and_back(repo: Path, captured: dict[str, Any], tmp_path: Path, form: str) -> None:
    file = tmp_path / f"web.{form}"
    done = imager(
        *("export", "web@latest", file, "--format", form, "--verify", "--repo", repo, "--json")
    ).json
    assert done["verified"] and done["stored_bytes"] < SIZE // 2
    again = imported(repo, file)
    assert root(again) == root(captured)
    assert again["imported"] == {"from": file.name, "kind": form, "disks": {"web": form}}
    assert again["statistics"]["new_blocks"] == 0
    assert sorted(path.name for path in tmp_path.iterdir() if "web" in path.name) == [file.name]


def test_a_compressed_copy_by_dd(
    repo: Path, captured: dict[str, Any], disk: Path, tmp_path: Path
) -> None:
    file = tmp_path / "copy.raw.packed"
    file.write_bytes(tool("gzip", "-1", "-c", disk))
    again = imported(repo, file, "--scratch", tmp_path)
    assert root(again) == root(captured)
    assert again["imported"]["kind"] == "gzip, raw"
    assert not list(tmp_path.glob("imager-import-*"))


def test_compressors(disk: Path, tmp_path: Path) -> None:
    content = disk.read_bytes()[: 3 * MIB] + bytes(3 * MIB)
    for program in ("xz", "zstd", "bzip2", "lz4"):
        file, raw = tmp_path / "packed", tmp_path / "raw"
        file.write_bytes(tool(program, "-1", "-c", content=content))
        assert make_raw([file], raw, tmp_path) == f"{program}, raw"
        assert digest(raw) == hashlib.sha256(content).hexdigest()
        assert raw.stat().st_blocks * 512 < 4 * MIB
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(ToolError):
            make_raw([file], raw, tmp_path)


def test_a_file_that_is_there_stays(repo: Path, captured: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("mine")
    imager("export", "web@latest", file, "--repo", repo, code=4)
    assert file.read_text() == "mine"
    imager("export", "web@latest", file, "--repo", repo, "--force")
    assert root(imported(repo, file)) == root(captured)
    imager("export", "web@latest", tmp_path / "x", "--format", "vdx", "--repo", repo, code=2)
    imager("export", "web@latest", tmp_path / "no" / "x", "--repo", repo, code=2)
    imager("export", "web@latest", "/dev/null", "--force", "--repo", repo, code=4)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_from_a_damaged_image_there_is_no_file(
    repo: Path, captured: dict[str, Any], tmp_path: Path, form: str
) -> None:
    pack = max((repo / "packs").rglob("*.pack"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    imager("export", "web@latest", tmp_path / "x", "--format", form, "--repo", repo, code=3)
    assert sorted(tmp_path.iterdir()) == before


def test_a_partclone_image(repo: Path, disk: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    tool("dd", f"if={disk}", f"of={part}", "bs=1M", "skip=1", "count=32", "conv=sparse")
    image = tmp_path / "root.img"
    clone(part, image)
    again = imported(repo, image)
    own = imager("capture", part, "--name", "part", "--repo", repo, "--json").json
    assert root(again) == root(own)
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 1
    image.write_bytes(content)
    imager("import", image, "--name", "bad", "--repo", repo, code=1)


def clone(part: Path, image: Path) -> None:
    log = image.with_name("log")
    tool("partclone.extfs", "-c", "-q", "-s", part, "-O", image, "-L", log)
    log.unlink()


# --- Clonezilla ----------------------------------------------------------------------------------


def save_like_clonezilla(disk: Path, folder: Path, table: str) -> None:
    """As its scripts name the files, with the programs that they run."""
    folder.mkdir()
    whole = disk.read_bytes()
    is_gpt = table is GPT
    saved = [("sda1", 2048, 65536)] + ([] if is_gpt else [("sda5", 86016, 20480)])
    (folder / "clonezilla-img").write_text("saved\n")
    (folder / "disk").write_text("sda\n")
    (folder / "parts").write_text(" ".join(["sda1", "sda2", *(n for n, *_ in saved[1:])]) + "\n")
    dump = tool("sfdisk", "--dump", disk).decode().replace(f"{disk}", "/dev/sda")
    (folder / "sda-pt.sf").write_text(dump)
    (folder / "sda-pt.parted").write_text(
        f"Model: ATA X (scsi)\nDisk /dev/sda: {SIZE // 512}s\n"
        "Sector size (logical/physical): 512B/512B\nPartition Table: x\n"
    )
    (folder / "sda-mbr").write_bytes(whole[:512])
    (folder / "sda-hidden-data-after-mbr").write_bytes(whole[512 : 2048 * 512])
    if is_gpt:
        (folder / "sda-gpt-1st").write_bytes(whole[: 34 * 512])
        (folder / "sda-gpt-2nd").write_bytes(whole[-33 * 512 :])
    (folder / "swappt-sda2.info").write_text(f'UUID="{SWAP_UUID}"\nLABEL="pool"\n')
    for name, first, sectors in saved:
        part = folder / "part"
        part.write_bytes(whole[first * 512 : (first + sectors) * 512])
        clone(part, folder / "image")
        packed = tool("gzip", "-c", folder / "image")
        (folder / "image").unlink()
        part.unlink()
        for n, at in enumerate(range(0, len(packed), MIB)):
            piece = folder / f"{name}.ext4-ptcl-img.gz.a{'abcdefghijklmnop'[n]}"
            piece.write_bytes(packed[at : at + MIB])


@pytest.fixture(scope="module")
def saved(disk: Path) -> Path:
    """The disk in a folder of Clonezilla."""
    folder = disk.with_name("saved")
    save_like_clonezilla(disk, folder, GPT)
    return folder


@pytest.mark.parametrize("table", [GPT, MBR], ids=["gpt", "mbr"])
def test_a_folder_of_clonezilla(repo: Path, tmp_path: Path, table: str) -> None:
    disk, folder = tmp_path / "sda", tmp_path / "2026-saved"
    make_disk(disk, table)
    save_like_clonezilla(disk, folder, table)
    own = imager("capture", disk, "--name", "own", "--repo", repo, "--json").json
    again = imported(repo, folder)
    assert again["imported"]["kind"] == "clonezilla"
    assert "gzip, partclone" in again["imported"]["disks"]["sda"]
    assert again["disks"][0]["table"] == own["disks"][0]["table"]
    first, second = (
        imager("export", f"{document['image']}", tmp_path / name, "--repo", repo).code
        for document, name in ((own, "a"), (again, "b"))
    )
    assert first == second == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("ecryptfs.info", b""),
        ("lvm_vg_dev.list", b"vg /dev/sda1 x\n"),
        ("sda1.ntfs-ntfs-img.gz.aa", b""),
        ("sda1.ext4-img.gz.aa", b""),
        ("sda1.ext4-ptcl-img.lrz", b""),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    repo: Path, saved: Path, tmp_path: Path, file: str, content: bytes
) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(saved, folder)
    if file.startswith("sda1"):
        for path in folder.glob("sda1.*"):
            path.unlink()
    (folder / file).write_bytes(content)
    refused = imager("import", folder, "--name", "x", "--repo", repo, code=1)
    assert "not supported" in refused.err
    assert imager("list", "--repo", repo, "--json").json in ([], {"images": []})


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\0ntfsclone-image" + bytes(5000), "ntfsclone"),
        (b"PaRtImAgE-VoLuMe" + bytes(5000), "partimage"),
        (b"LRZI" + bytes(5000), "lrzip"),
    ],
)
def test_other_files_are_refused_by_name(
    repo: Path, tmp_path: Path, content: bytes, word: str
) -> None:
    file = tmp_path / "x.img"
    file.write_bytes(content)
    assert word in imager("import", file, "--name", "x", "--repo", repo, code=1).err


def test_a_disk_image_that_reaches_for_other_files_is_refused(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(MIB))
    file = tmp_path / "x.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "secret", file)
    assert "backing file" in imager("import", file, "--name", "x", "--repo", repo, code=1).err
    (tmp_path / "empty").mkdir()
    imager("import", tmp_path / "empty", "--name", "x", "--repo", repo, code=2)
    imager("import", tmp_path / "nothing", "--name", "x", "--repo", repo, code=1)
