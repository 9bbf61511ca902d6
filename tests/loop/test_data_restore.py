"""An image with its data backups: taken together, listed, and brought back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bootmedia.closure import python_layer
from tests.support.commandline import imager
from tests.support.disks import (
    MIB,
    loop_disk,
    make_filesystem,
    make_sparse,
    mounted,
    needs_loop,
)

pytestmark = needs_loop

ENGINE = """#!/bin/sh
# A data backup as small as it can be: folders of copies.
set -eu
cd "$IMAGER_DATA_REPOSITORY"
case $1 in
backup)
    test ! -e fail || { echo "the tape is full" >&2; exit 1; }
    id=$(date +%s%N)-copy
    mkdir "$id"
    tar -C / -cf - "${IMAGER_DATA_PATHS#/}" | tar -C "$id" -xf -
    echo "imager: snapshot $id" ;;
restore) # of the path alone: what is above it has owners and modes that stay
    mkdir -p "${IMAGER_DATA_TARGET%/}$IMAGER_DATA_PATHS"
    cd "$IMAGER_DATA_SNAPSHOT$IMAGER_DATA_PATHS"
    cp -a . "${IMAGER_DATA_TARGET%/}$IMAGER_DATA_PATHS/" ;;
list) for f in *-copy; do test ! -d "$f" || echo "$f $(date -u -r "$f" +%FT%TZ)"; done ;;
forget) rm -r "$IMAGER_DATA_SNAPSHOT" ;;
esac
"""


class Server:
    """Its data, its configuration and a disk to image."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.data = folder / "srv/data"
        self.data.mkdir(parents=True)
        self.store = folder / "store"
        self.store.mkdir()
        engine = folder / "engine"
        engine.write_text(ENGINE)
        engine.chmod(0o755)
        self.config = folder / "imager.toml"
        self.write_config()
        monkeypatch.setenv("IMAGER_CONFIG", str(self.config))
        self.disk = make_sparse(folder / "disk", 8 * MIB)
        make_filesystem(self.disk, "ext4")

    def write_config(self, more: str = "") -> None:
        commands = "\n".join(
            f'{name} = ["{self.folder}/engine", "{name}"]'
            for name in ("backup", "restore", "list", "forget")
        )
        self.config.write_text(
            f'[[data]]\nname = "files"\nengine = "command"\nrepository = "{self.store}"\n'
            f'paths = ["{self.data}"]\n{commands}\n{more}\n'
        )

    def write(self, text: str) -> None:
        (self.data / "text").write_text(text)

    def capture(self, repo: Path, *options: object, code: int = 0) -> dict[str, object]:
        done = imager("capture", self.disk, "--repo", repo, "--data", "--json", *options, code=code)
        return dict(done.json)

    def snapshots(self) -> list[str]:
        return sorted(path.name for path in self.store.iterdir() if path.is_dir())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def test_image_and_data_there_and_back(server: Server, repo: Path) -> None:
    server.write("first")
    image = server.capture(repo)
    (backup,) = image["data"]  # type: ignore[misc]
    assert backup["snapshot"] == server.snapshots()[0]
    server.write("second")
    server.capture(repo)
    listed = imager("data", "list", image["id"], "--repo", repo)
    assert backup["snapshot"] in listed.out and "whole" in listed.out
    assert "by hand: env" in listed.out
    assert imager("data", "list", image["id"], "--repo", repo, "--json").json["data"] == [backup]
    assert backup["snapshot"] in imager("show", image["id"], "--repo", repo).out
    server.write("third")
    restore = ("data", "restore", image["id"], "--repo", repo)
    refused = imager(*restore, code=4)
    assert "no terminal" in refused.err
    assert f"overwrites in {server.data}: 1 files, 5 B" in refused.out
    assert (server.data / "text").read_text() == "third"
    imager(*restore, "--yes")
    assert (server.data / "text").read_text() == "first"
    imager(*restore, "--yes", "--latest")
    assert (server.data / "text").read_text() == "second"


def test_below_a_mounted_disk(server: Server, repo: Path) -> None:
    server.write("first")
    image = server.capture(repo)
    point = server.folder / "mnt"
    point.mkdir()
    restore = ("data", "restore", image["id"], "--repo", repo, "--yes", "--at", point)
    assert "nothing is mounted at" in imager(*restore, code=4).err
    with loop_disk(server.disk) as device, mounted(device, point):
        imager(*restore)
        restored = point / str(server.data).lstrip("/") / "text"
        assert restored.read_text() == "first"
        # its fstab wants another disk there
        (point / "etc").mkdir()
        (point / "etc/fstab").write_text(f"UUID=1-2 {server.data} ext4 defaults 0 2\n")
        refused = imager(*restore, code=4)
        assert "is not mounted, where the fstab wants UUID=1-2" in refused.err
    assert not list(point.iterdir())
    imager(*restore, "--folder")
    assert restored.read_text() == "first"


def test_a_failing_backup_marks_the_image(server: Server, repo: Path) -> None:
    (server.store / "fail").touch()
    image = server.capture(repo, code=5)
    listed = imager("data", "list", image["id"], "--repo", repo, code=5)
    assert "FAILED" in listed.out and "the tape is full" in listed.out
    assert "DATA-FAILED" in imager("list", "--repo", repo).out
    failed = imager("data", "restore", image["id"], "--repo", repo, "--yes", code=4)
    assert "it failed when the image was made" in failed.err
    server.write_config("required = true")
    stopped = imager("capture", server.disk, "--repo", repo, "--data", code=1)
    assert "so no image is made" in stopped.err
    server.write_config('required = true\nwhen = "after"')
    server.capture(repo, code=5)
    assert len(imager("list", "--repo", repo, "--json").json) == 2


def test_old_snapshots_go_but_not_what_images_name(server: Server, repo: Path) -> None:
    server.write("first")
    server.capture(repo)
    named = server.snapshots()
    server.write_config("retention = { last = 1 }")
    for _ in range(3):
        imager("data", "run", "--repo", repo)
    left = server.snapshots()
    assert len(left) == 2
    assert left[0] == named[0]


def test_what_is_gone_is_said(server: Server, repo: Path) -> None:
    server.write("first")
    image = server.capture(repo)
    shutil.rmtree(server.store / server.snapshots()[0])
    gone = imager("data", "restore", image["id"], "--repo", repo, "--yes", code=4)
    assert "is gone; try --latest" in gone.err


def test_a_file_is_captured_without_the_data_of_this_machine(server: Server, repo: Path) -> None:
    server.write("first")
    imager("capture", server.disk, "--repo", repo)
    assert not server.snapshots()
    with loop_disk(server.disk) as device:
        imager("capture", device, "--repo", repo, "--no-data")
        assert not server.snapshots()
        imager("capture", device, "--repo", repo)
        assert len(server.snapshots()) == 1


def test_configurations_that_are_refused(server: Server, repo: Path) -> None:
    def refused(text: str) -> str:
        server.config.write_text(text)
        return imager("data", "run", "--repo", repo, code=2).err

    assert "has no data backups" in refused("")
    assert "does not belong into" in refused('[[data]]\nname="a"\nengine="restic"\npassword="x"')
    assert "needs a repository and paths" in refused('[[data]]\nname="a"\nengine="borg"')
    assert "what is pahts?" in refused(
        '[[data]]\nname="a"\nengine="command"\nbackup=["x"]\npahts=["/"]'
    )
    assert "no engine stone" in imager_failure(server, repo)
    server.config.chmod(0o666)
    assert "others could change it" in imager("data", "run", "--repo", repo, code=2).err


def imager_failure(server: Server, repo: Path) -> str:
    server.config.write_text('[[data]]\nname="a"\nengine="stone"\n')
    return imager("data", "run", "--repo", repo, code=5).out


def test_a_medium_carries_what_the_data_needs(server: Server, tmp_path: Path) -> None:
    server.config.write_text("")
    refused = imager("media", "build", tmp_path / "iso", "--data", code=2)
    assert "imager.toml has no data backups" in refused.err
    layer = python_layer(data=("borg", "restic"))
    assert "/usr/bin/restic" in layer.tree
    assert any(text.startswith("borg is not carried") for text in layer.warnings)
