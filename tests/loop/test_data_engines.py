"""Data backups with the real restic and Borg, with commands and a plug-in."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from imager.data.backing import back_up
from imager.data.engines import open_engine
from imager.data.model import DataEntry, Password
from imager.errors import ImagerError, UsageError
from imager.process import run
from imager.progress import NullProgress
from tests.support.disks import MIB, make_random

pytestmark = pytest.mark.loop

ENGINES = ("restic", "borg")


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESTIC_CACHE_DIR", "BORG_BASE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    # a test's repository is a copy of one at another place
    monkeypatch.setenv("BORG_RELOCATED_REPO_ACCESS_IS_OK", "yes")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "srv/mail"
    (folder / "cur").mkdir(parents=True)
    (folder / "cur/1").write_text("first")
    (folder / "skip.tmp").write_text("not this")
    make_random(folder / "large", 4 * MIB)
    return folder


@cache
def empty_repository(engine: str) -> Path:
    """Made once: deriving a key is slow by design."""
    folder = Path(tempfile.mkdtemp(prefix="imager-test-data-"))
    atexit.register(shutil.rmtree, folder)
    secret, repository = folder / "secret", folder / "repository"
    secret.write_text("correct horse\n")
    if engine == "restic":
        run(["restic", "init", "-r", str(repository), "--password-file", str(secret)])
    else:
        variables = {"BORG_PASSCOMMAND": f"cat {secret}", "BORG_BASE_DIR": str(folder / "base")}
        run(["borg", "init", "-e", "repokey", str(repository)], environment=variables)
    return repository


def make_entry(engine: str, source: Path, folder: Path, **changes: object) -> DataEntry:
    """With a repository of its own, which is encrypted."""
    secret = folder / "secret"
    secret.write_text("correct horse\n")
    repository = folder / f"{engine}-repository"
    shutil.copytree(empty_repository(engine), repository)
    values: dict[str, object] = {
        "name": "mail",
        "engine": engine,
        "repository": str(repository),
        "paths": (str(source),),
        "excludes": ("*.tmp",),
        "password": Password(file=str(secret)),
        "timeout": 300.0,
    }
    return DataEntry(**{**values, **changes})  # type: ignore[arg-type]


class Heard(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = 0
        self.total = 0

    def start(self, label: str, total: int) -> None:
        self.total = total

    def advance(self, amount: int) -> None:
        self.done += amount

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize("name", ENGINES)
def test_there_and_back(name: str, source: Path, tmp_path: Path) -> None:
    entry = make_entry(name, source, tmp_path)
    (backup,) = back_up([entry], "before", NullProgress())
    assert backup.whole and backup.error is None, backup
    assert backup.snapshot is not None and backup.size is not None
    assert backup.size >= 4 * MIB
    assert "correct horse" not in str(backup)
    engine = open_engine(entry)
    assert [item.id for item in engine.snapshots()] == [backup.snapshot]
    (source / "cur/1").write_text("changed")
    target = tmp_path / "target"
    target.mkdir()
    engine.restore(backup.snapshot, target, NullProgress())
    restored = target / str(source).lstrip("/")
    assert (restored / "cur/1").read_text() == "first"
    assert not (restored / "skip.tmp").exists()
    assert (restored / "large").read_bytes() == (source / "large").read_bytes()
    hand = tmp_path / "hand"
    hand.mkdir()
    variables = {"BORG_PASSCOMMAND": f"cat {tmp_path}/secret"}
    run(engine.by_hand(backup.snapshot, hand), environment=variables)
    assert (hand / str(source).lstrip("/") / "cur/1").read_text() == "first"


@pytest.mark.parametrize("name", ENGINES)
def test_hosts_and_names_are_kept_apart(name: str, source: Path, tmp_path: Path) -> None:
    entry = make_entry(name, source, tmp_path, host="web1")
    # restic's tags are compared whole, Borg's archives by the start of their name
    change = {"host": "web2"} if name == "restic" else {"name": "mail-archive"}
    other = DataEntry(**{**vars(entry), **change})
    one, two = (str(backup.snapshot) for backup in back_up([entry, other], "before", Heard()))
    assert [item.id for item in open_engine(entry).snapshots()] == [one]
    open_engine(entry).forget([one])
    assert [item.id for item in open_engine(other).snapshots()] == [two]


@pytest.mark.parametrize("name", ENGINES)
def test_passwords_from_elsewhere(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = make_entry(name, source, tmp_path)
    secret = tmp_path / "se cret"
    (tmp_path / "secret").rename(secret)
    command = Password(command=("cat", str(secret)))
    assert not open_engine(DataEntry(**{**vars(entry), "password": command})).snapshots()
    variable = DataEntry(**{**vars(entry), "password": Password(variable="OUR_SECRET")})
    with pytest.raises(UsageError, match="no OUR_SECRET"):
        open_engine(variable).snapshots()
    monkeypatch.setenv("OUR_SECRET", "correct horse")
    assert not open_engine(variable).snapshots()


@pytest.mark.parametrize("name", ENGINES)
def test_what_cannot_be_read_is_said(name: str, source: Path, tmp_path: Path) -> None:
    """Root reads everything; a path that is not there is what can be missing."""
    entry = make_entry(name, source, tmp_path, paths=(str(source), str(tmp_path / "gone")))
    heard = Heard()
    (backup,) = back_up([entry], "before", heard)
    print(backup)
    assert not backup.whole
    assert backup.error or any("gone" in text for text in backup.warnings)
    assert heard.notes


def test_a_failure_leaves_the_others(source: Path, tmp_path: Path) -> None:
    good = make_entry("restic", source, tmp_path)
    bad = DataEntry(**{**vars(good), "name": "bad", "repository": str(tmp_path / "none")})
    heard = Heard()
    failed, taken = back_up([bad, good], "before", heard)
    assert failed.error and failed.snapshot is None and not failed.whole
    assert taken.whole
    assert any("FAILED" in text for text in heard.notes)
    required = DataEntry(**{**vars(bad), "required": True})
    with pytest.raises(ImagerError, match="so no image is made"):
        back_up([required], "before", heard)


def test_too_long(source: Path, tmp_path: Path) -> None:
    entry = DataEntry(
        "slow", "command", commands={"backup": ("sleep", "600")}, timeout=1.0, paths=(str(source),)
    )
    (backup,) = back_up([entry], "before", NullProgress())
    assert backup.error and "no end after 1 s" in backup.error


# --- commands ---


@pytest.fixture
def commands(source: Path, tmp_path: Path) -> DataEntry:
    """tar, with scripts as a user would write them."""
    store = tmp_path / "store"
    store.mkdir()
    scripts = {
        "backup": 'tar -C / -cf "$IMAGER_DATA_REPOSITORY/$IMAGER_DATA_SNAPSHOT.tar" '
        '"${IMAGER_DATA_PATHS#/}"\n'
        'echo "imager: progress 50 100"\necho "imager: progress 100 100"\n'
        'echo "imager: size $(stat -c %s "$IMAGER_DATA_REPOSITORY"/*.tar)"',
        "restore": 'tar -C "$IMAGER_DATA_TARGET" -xf '
        '"$IMAGER_DATA_REPOSITORY/$IMAGER_DATA_SNAPSHOT.tar"',
        "list": 'for f in "$IMAGER_DATA_REPOSITORY"/*.tar; do basename "$f" .tar; done',
        "forget": 'rm "$IMAGER_DATA_REPOSITORY/$IMAGER_DATA_SNAPSHOT.tar"',
    }
    words = {}
    for name, text in scripts.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nset -eu\n{text}\n")
        path.chmod(0o755)
        words[name] = (str(path),)
    return DataEntry("files", "command", str(store), (str(source),), commands=words)


def test_commands_there_and_back(commands: DataEntry, source: Path, tmp_path: Path) -> None:
    heard = Heard()
    (backup,) = back_up([commands], "before", heard)
    assert backup.whole, backup
    assert (heard.total, heard.done) == (0, 0) or heard.done == 100
    assert backup.size and backup.size > 4 * MIB
    engine = open_engine(commands)
    (snapshot,) = engine.snapshots()
    assert snapshot.id == backup.snapshot
    target = tmp_path / "target"
    target.mkdir()
    engine.restore(snapshot.id, target, NullProgress())
    assert (target / str(source).lstrip("/") / "cur/1").read_text() == "first"
    engine.forget([snapshot.id])
    assert not list((tmp_path / "store").iterdir())


def test_a_command_that_fails(source: Path) -> None:
    words = {"backup": ("sh", "-c", "echo no tape >&2; exit 7")}
    entry = DataEntry("tape", "command", commands=words)
    (backup,) = back_up([entry], "before", NullProgress())
    assert backup.error and "no tape" in backup.error
    with pytest.raises(UsageError, match="no command to restore"):
        open_engine(entry).restore("x", Path("/"), NullProgress())


def test_in_another_root(commands: DataEntry, source: Path, tmp_path: Path) -> None:
    """The programs of a system that is mounted elsewhere run with its root."""
    root = tmp_path / "root"
    busybox = shutil.which("busybox")
    assert busybox is not None
    (root / "bin").mkdir(parents=True)
    (root / "out").mkdir()
    shutil.copy(busybox, root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    (root / "bin/back").write_text(
        '#!/bin/sh\necho "$IMAGER_DATA_SNAPSHOT" > "$IMAGER_DATA_TARGET/out/id"\n'
    )
    (root / "bin/back").chmod(0o755)
    entry = DataEntry("files", "command", commands={"restore": ("back",)}, root=root)
    open_engine(entry).restore("abc", root, NullProgress())
    assert (root / "out/id").read_text() == "abc\n"
    with pytest.raises(UsageError, match="is not below"):
        open_engine(entry).restore("abc", tmp_path, NullProgress())


def test_restic_of_another_root(source: Path, tmp_path: Path) -> None:
    """The root has no restic: this system's is used, on the root's paths."""
    entry = make_entry("restic", source, tmp_path)
    (backup,) = back_up([entry], "before", NullProgress())
    assert backup.snapshot
    root = tmp_path / "root"
    (root / "backup").parent.mkdir()
    (tmp_path / "restic-repository").rename(root / "backup")
    (root / "etc").mkdir()
    (tmp_path / "secret").rename(root / "etc/secret")
    there = {
        "repository": "/backup",
        "password": Password(file="/etc/secret"),
        "root": root,
    }
    engine = open_engine(DataEntry(**{**vars(entry), **there}))
    assert [item.id for item in engine.snapshots()] == [backup.snapshot]
    engine.restore(backup.snapshot, root, NullProgress())
    assert (root / str(source).lstrip("/") / "cur/1").read_text() == "first"
    # and its own restic is used when it has one, with its root as the root
    (root / "usr/bin").mkdir(parents=True)
    (root / "lib64").mkdir()
    shutil.copy(shutil.which("restic") or "", root / "usr/bin/restic")
    for library in _libraries("restic"):
        place = root / str(library).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)
    shutil.rmtree(root / str(source).lstrip("/"))
    engine = open_engine(DataEntry(**{**vars(entry), **there}))
    engine.restore(backup.snapshot, root, NullProgress())
    assert (root / str(source).lstrip("/") / "cur/1").read_text() == "first"


def _libraries(name: str) -> list[Path]:
    """What a program is linked with; nothing if it is static."""
    listed = subprocess.run(
        ["ldd", shutil.which(name) or name], capture_output=True, text=True, check=False
    )
    words = listed.stdout.split()
    return [Path(word) for word in words if word.startswith("/")] if listed.returncode == 0 else []


# --- plug-ins ---


def test_a_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed as a distribution, as pip does."""
    package = tmp_path / "site"
    (package / "paper-1.0.dist-info").mkdir(parents=True)
    (package / "paper-1.0.dist-info/METADATA").write_text("Name: paper\nVersion: 1.0\n")
    (package / "paper-1.0.dist-info/entry_points.txt").write_text(
        "[imager.data]\npaper = paper_engine:Paper\nbroken = paper_engine:Missing\n"
    )
    (package / "paper_engine.py").write_text(
        "from imager.data.model import Taken\n"
        "class Paper:\n"
        "    def __init__(self, entry):\n        self.entry = entry\n"
        "    def back_up(self, progress):\n"
        "        return Taken(f\"{self.entry.options['ink']}-1\", 12)\n"
        "    def by_hand(self, snapshot, target):\n        return ['read', snapshot]\n"
    )
    monkeypatch.syspath_prepend(str(package))
    entry = DataEntry("letters", "paper", options={"ink": "blue"})
    (backup,) = back_up([entry], "before", NullProgress())
    assert (backup.snapshot, backup.size, backup.restore) == ("blue-1", 12, ("read", "blue-1"))
    with pytest.raises(ImagerError, match="the plug-in for broken failed"):
        open_engine(DataEntry("x", "broken"))
    with pytest.raises(UsageError, match="no engine stone"):
        open_engine(DataEntry("x", "stone"))
