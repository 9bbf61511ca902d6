"""imager files: from an image to a folder, exactly, and never outside of it."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.files.copying import copy
from imager.files.model import Entry, Piece
from imager.files.tree import Found
from imager.process import run
from imager.repository import Repository
from tests.loop.allocation_lab import (
    SHUTDOWN_LOGFLUSH,
    crash,
    differences,
    make_image,
    mounted,
)
from tests.loop.files_lab import by_kernel, fill_with_all
from tests.support.commandline import CHECKOUT, command, imager
from tests.support.disks import MIB, make_gpt, make_sparse, needs_loop, write_at
from tests.unit.test_allocation_lvm2 import START, linear, pv, text_of, volume

pytestmark = needs_loop

WEB = "web@latest:2"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A repository with two images of a disk, and the tree in the partition of the first."""
    folder = tmp_path_factory.mktemp("files")
    disk = make_gpt(folder / "sda", 96 * MIB)
    part = make_image(folder / "part", ["mkfs.ext4", "-q", "-F", "-E", "nodiscard"], 70 * MIB)
    with mounted(part) as root:
        fill_with_all(root)
        (root / "usr/lib").mkdir(parents=True)
        (root / "lib").symlink_to("usr/lib")
        (root / "usr/lib/inside").write_text("through a link\n")
        (root / "up").symlink_to("../../../lib/inside")
    with mounted(part, "loop,ro") as root:
        tree = by_kernel(root)
    write_at(disk, 20 * MIB, part.read_bytes())
    Repository.create(str(folder / "repo"), block_size=64 << 10)
    imager("capture", disk, "--name", "before", "--repo", folder / "repo")
    with mounted(part) as root:
        (root / "tiny").write_bytes(b"FITS into an inode")
        (root / "empty").chmod(0o700)
        (root / "old").unlink()
        (root / "new folder").mkdir()
        os.chown(root / "late", 7, 8)
    write_at(disk, 20 * MIB, part.read_bytes())
    imager("capture", disk, "--name", "web", "--repo", folder / "repo")
    return folder / "repo", tree


@pytest.fixture
def files(made: tuple[Path, dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGER_REPO", str(made[0]))
    return made[0]


def as_kept(tree: dict[str, object], *, below: str = "") -> dict[str, object]:
    """What a copy keeps of a tree: not ctime and inode, nor the atime that reading changes."""
    kept = {}
    for name, (content, (mode, *rest), size, times, attributes, _) in tree.items():
        is_link = stat.S_ISLNK(mode)
        kept[name] = (content, (mode, *rest), size, None if is_link else times[1], attributes)
    return {name: value for name, value in kept.items() if name.startswith(below)}


# --- copying ---


def test_a_copy_has_all_of_the_tree(
    made: tuple[Path, dict[str, object]], files: Path, tmp_path: Path
) -> None:
    """On an ext4 of its own, so that every attribute and device has a place."""
    target = make_image(tmp_path / "target", ["mkfs.ext4", "-q", "-F"], 96 * MIB)
    with mounted(target) as root:
        outcome = imager("files", "cp", "-r", "--preserve", "before@latest:2", root / "all")
        assert "problems" not in outcome.out
        found = by_kernel(root / "all")
        for name in ("sparse", "written-behind-holes"):
            blocks = (root / "all" / name).stat().st_blocks
            assert blocks * 512 < 1 * MIB, f"{name} takes {blocks} blocks"
        first, second = (root / "all" / name for name in ("tiny", "tiny-hardlink"))
        assert first.samefile(second)
    assert differences(as_kept(made[1]), as_kept(found)) == {}


def test_what_is_there_is_replaced_or_gone_into(files: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/other").write_text("stays")
    (tmp_path / "tree/sparse").write_text("is replaced")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "tree/hardlink").symlink_to("../precious")
    imager("files", "cp", "-r", f"{WEB}/tree", tmp_path)
    assert (tmp_path / "tree/other").read_text() == "stays"
    assert (tmp_path / "tree/sparse").stat().st_size == 5_000_012
    assert not (tmp_path / "tree/hardlink").is_symlink()
    assert (tmp_path / "precious").read_text() == "precious"
    imager("files", "cp", f"{WEB}/tiny", tmp_path / "named")
    assert (tmp_path / "named").read_bytes() == b"FITS into an inode"
    assert not list(tmp_path.rglob(".imager-*"))


def test_a_link_in_the_destination_is_not_followed(files: Path, tmp_path: Path) -> None:
    """An attacker who may write there has put a link where a folder of the image will be."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "to/tree").mkdir(parents=True)
    (tmp_path / "to/tree/d1").symlink_to(tmp_path / "outside")
    outcome = imager("files", "cp", "-r", f"{WEB}/tree", tmp_path / "to", code=5)
    assert "/tree/d1: " in outcome.err
    assert list((tmp_path / "outside").iterdir()) == []
    assert (tmp_path / "to/tree/d2").is_dir()


class Evil:
    """A reader of a filesystem that someone made to break out."""

    notes = ()

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def entry(self, name: str, mode: int) -> Entry:
        number = (0, abs(hash(name)))
        return Entry(name, number, mode, 0, 0, 4, 1, 0, 0, 0, 0)

    def top(self) -> Entry:
        return self.entry("", stat.S_IFDIR | 0o755)

    def entries(self, folder: Entry) -> Iterator[Entry]:
        if folder.name == "":
            yield self.entry("link", stat.S_IFLNK | 0o777)
            for name in self._names:
                yield self.entry(name, stat.S_IFREG | 0o644)

    def names(self, folder: Entry) -> Iterator[str]:
        return (entry.name for entry in self.entries(folder))

    def find(self, folder: Entry, name: str) -> Entry | None:
        return next((entry for entry in self.entries(folder) if entry.name == name), None)

    def target(self, link: Entry) -> str:
        return ".."

    def attributes(self, entry: Entry) -> dict[str, bytes]:
        return {}

    def pieces(self, file: Entry) -> Iterator[Piece]:
        yield Piece(0, b"evil")


def test_names_that_lead_out(tmp_path: Path) -> None:
    names = ["..", "../out", "/tmp/imager-out", "link/out", ".", "", "a\0b", "fine"]
    to = tmp_path / "deep/to"
    to.mkdir(parents=True)
    reader = Evil(names)
    done = copy(reader, Found("", reader.top()), to, recursive=True, preserve=False)
    assert len(done.problems) == 7
    everything = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert everything == {"deep", "deep/to", "deep/to/link", "deep/to/fine"}


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may write to; those of pytest are for root only."""
    with tempfile.TemporaryDirectory(prefix="imager-test-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def test_without_root(files: Path, public: Path) -> None:
    """Content, modes and times come; devices and owners are listed as missing."""
    run(["cp", "-r", str(files), str(public / "repo")])
    run(["chmod", "-R", "a+rX", str(public / "repo")])
    words = ["files", "cp", "-r", "-p", f"{WEB}/tree", public, "--repo", public / "repo"]
    code = f"""
import os, sys
from tests.support.commandline import imager
imager("files", "cp", "-r", "-p", "{WEB}/tree", "{public}/root", "--repo", "{public}/repo")
os.setgroups([]); os.setgid(65534); os.setuid(65534)  # all modules are loaded by now
sys.argv = {["imager", *map(str, words)]!r}
from imager.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5, done
    assert "/tree/node: a block device: only root makes one" in done.stderr
    assert "only root gives files away" in done.stderr
    assert (public / "tree/sparse").read_bytes().endswith(b"after a hole")
    assert (public / "tree/sparse").stat().st_uid == 65534
    assert not (public / "tree/node").exists()


def test_a_damaged_block_takes_its_file_only(tmp_path: Path) -> None:
    """Exit code 3, the damaged file left out and named, all else copied."""
    part = make_image(tmp_path / "sda", ["mkfs.ext4", "-q", "-F", "-E", "nodiscard"], 16 * MIB)
    noise = os.urandom(1 << 20)
    with mounted(part) as root:
        (root / "before").write_text("before")
        (root / "noise").write_bytes(noise)
        (root / "then").write_text("then")
    Repository.create(str(tmp_path / "repo"), block_size=64 << 10)
    imager("capture", part, "--name", "web", "--repo", tmp_path / "repo")
    for path in (tmp_path / "repo/packs").rglob("*.pack"):
        at = path.read_bytes().find(noise[500_000:500_100])
        if at >= 0:
            write_at(path, at, b"\0" * 10)
    to = tmp_path / "to"
    outcome = imager("files", "cp", "-r", "web@latest:/", to, "--repo", tmp_path / "repo", code=3)
    assert "/noise: " in outcome.err and ".pack" in outcome.err
    assert sorted(path.name for path in to.iterdir()) == ["before", "lost+found", "then"]


# --- reading ---


def test_ls_cat_find(files: Path, tmp_path: Path) -> None:
    names = imager("files", "ls", WEB).out.splitlines()
    assert names == sorted(names)
    assert {"tree", "tiny", "not \\xff text\\n", "lost+found"} <= set(names)
    listed = imager("files", "ls", "-l", f"{WEB}/tree").out
    assert "brw-------" in listed and "8, 1" in listed and "ä link -> d1" in listed
    (entry,) = imager("files", "ls", f"{WEB}/tiny", "--json").json
    assert (entry["kind"], entry["size"], entry["links"]) == ("file", 18, 2)
    assert imager("files", "ls", f"{WEB}/lib/inside").out == "inside\n"
    for path in ("lib/inside", "usr/../lib/./inside", "up"):
        done = subprocess.run(
            command("files", "cat", f"{WEB}/{path}"), cwd=CHECKOUT, capture_output=True, check=True
        )
        assert done.stdout == b"through a link\n"
    sparse = subprocess.run(
        command("files", "cat", f"{WEB}/written-behind-holes"),
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    ).stdout
    assert len(sparse) == 12 * MIB and sparse[3 << 20 :][:4] == b"part"
    found = imager("files", "find", f"{WEB}/many", "--name", "*name1", "--type", "f").out
    assert found == f"/many/{'name' * 20}1\n"
    folders = imager("files", "find", WEB, "--type", "d", "--json").json
    assert {"/tree/d1", "/usr/lib"} <= {item["path"] for item in folders}


def test_diff(files: Path) -> None:
    expected = [
        "changed  / (mode)",
        "changed  /empty (mode)",
        "changed  /late (owner)",
        "added    /new folder",
        "removed  /old",
        "changed  /tiny (content)",
        "changed  /tiny-hardlink (content)",
    ]
    for more in ([], ["--quick"]):
        outcome = imager("files", "diff", "before@latest", "web@latest", "2/", *more)
        lines = set(outcome.out.splitlines())
        assert lines == {*expected[1:], "6 differences"}
    assert imager("files", "diff", "web@latest", "web@latest", "2/", "--json").json == []


def test_what_people_mistype(files: Path, tmp_path: Path) -> None:
    def said(*words: object, code: int) -> str:
        return imager("files", *words, code=code).err

    assert "there is no /nothing" in said("ls", f"{WEB}/nothing", code=1)
    assert "is a file, not a folder" in said("ls", f"{WEB}/tiny/x", code=1)
    assert "copy it with -r" in said("cp", f"{WEB}/tree", tmp_path, code=1)
    assert "no folder" in said("cp", f"{WEB}/tiny", tmp_path / "no/such", code=4)
    assert "is a folder" in said("cat", f"{WEB}/tree", code=1)
    assert "the image has no 7" in said("ls", "web@latest:7/", code=1)
    assert "nothing that is known" in said("ls", "web@latest:1/", code=1)
    assert "name a place" in said("ls", "web@latest", code=2)
    assert "say f, d or l" in said("find", WEB, "--type", "x", code=2)


def test_an_xfs_in_use_is_read_through_the_kernel(tmp_path: Path) -> None:
    """Its log is recovered in memory; nobody but root can."""
    part = make_sparse(tmp_path / "sda", 320 * MIB)
    run(["mkfs.xfs", "-q", "-f", str(part)])
    with mounted(part) as root:
        fill_with_all(root)
        os.sync()
        (root / "late").unlink()
        (root / "later").mkdir()
        crash(root, SHUTDOWN_LOGFLUSH)
    Repository.create(str(tmp_path / "repo"))
    imager("capture", part, "--name", "web", "--repo", tmp_path / "repo")
    outcome = imager("files", "ls", "web@latest:/", "--repo", tmp_path / "repo")
    assert "kernel driver of xfs" in outcome.err
    names = outcome.out.splitlines()
    assert "later" in names and "late" not in names
    with mounted(part, "loop,noatime") as root:
        expected = by_kernel(root)
    target = make_image(tmp_path / "target", ["mkfs.ext4", "-q", "-F"], 64 * MIB)
    with mounted(target) as root:
        words = ("cp", "-r", "-p", "web@latest:/", root / "all")
        imager("files", *words, "--repo", tmp_path / "repo")
        found = by_kernel(root / "all")
    for tree in (expected, found):
        for *_, attributes, _ in tree.values():  # type: ignore[misc]
            attributes.pop("trusted.SGI_ACL_FILE", None)
            attributes.pop("trusted.SGI_ACL_DEFAULT", None)
    assert differences(as_kept(expected), as_kept(found)) == {}


# --- the case to try ---


def test_a_mail_folder_out_of_a_mail_server_on_lvm(tmp_path: Path, repo: Path) -> None:
    """The volume lies in two pieces, and was in use: the journal has to be replayed."""
    inside = make_image(tmp_path / "inside", ["mkfs.ext4", "-q", "-F", "-E", "nodiscard"], 16 * MIB)
    box = "srv/vmail/example.org/anna/Maildir"
    with mounted(inside) as root:
        for name in ("cur", "new", "tmp", ".Sent/cur"):
            (root / box / name).mkdir(parents=True)
        for n in range(200):
            mail = root / box / "cur" / f"176000{n:04}.M{n}P1.mail,S=100:2,S"
            mail.write_text(f"From: {n}\n\nmail {n}\n")
            os.chown(mail, 5000, 5000)
            mail.chmod(0o600)
        expected = by_kernel(root / box)
    content = inside.read_bytes()
    image = pv(text_of(volume("mail", linear(0, 10, "pv0", 11), linear(10, 6, "pv0", 2))))
    image[START + 11 * MIB : START + 21 * MIB] = content[: 10 * MIB]
    image[START + 2 * MIB : START + 8 * MIB] = content[10 * MIB :]
    (tmp_path / "vda").write_bytes(image)
    imager("capture", tmp_path / "vda", "--name", "mail", "--repo", repo)
    place = f"mail@latest:vg/mail/{box}"
    with contextlib.chdir(tmp_path):
        imager("files", "cp", "-r", "-p", place, tmp_path / "restored", "--repo", repo)
    found = by_kernel(tmp_path / "restored")
    assert differences(as_kept(expected), as_kept(found)) == {}
    assert len(found) == 206
