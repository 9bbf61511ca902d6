"""Data backups without their tools: configuration, words, what an image keeps, what is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from imager.data.bringing import read_fstab
from imager.data.meter import Meter
from imager.data.model import (
    DataBackup,
    DataEntry,
    Password,
    Place,
    backups_of,
    data_is_whole,
    without_secrets,
)
from imager.data.settings import load_entries, read_entries
from imager.errors import FormatError, UsageError
from imager.manifest import Manifest
from imager.retention import Rules

FULL: dict[str, Any] = {
    "name": "mail",
    "engine": "restic",
    "repository": "rest:https://me:secret@host/",
    "paths": ["/srv/mail"],
    "excludes": ["*.tmp"],
    "password-command": ["pass", "show", "restic"],
    "retention": {"last": 3},
    "when": "after",
    "timeout": 60,
    "required": True,
    "exclude-partitions": ["UUID=1"],
}


def read(**changes: Any) -> DataEntry:
    item = {key: value for key, value in {**FULL, **changes}.items() if value is not None}
    return read_entries({"data": [item]}, "here")[0]


def test_all_keys() -> None:
    entry = read()
    assert (entry.name, entry.engine, entry.when, entry.timeout) == ("mail", "restic", "after", 60)
    assert entry.required and entry.paths == ("/srv/mail",) and entry.excludes == ("*.tmp",)
    assert entry.password == Password(command=("pass", "show", "restic"))
    assert entry.retention == Rules(last=3)
    assert entry.exclude_partitions == ("UUID=1",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"password": "x"}, "does not belong"),
        ({"name": "a/b"}, "needs a name"),
        ({"engine": None}, "needs an engine"),
        ({"when": "never"}, "before"),
        ({"paths": ["srv"]}, "not a path from the root"),
        ({"paths": "/srv"}, "must be a list"),
        ({"paths": None}, "needs a repository and paths"),
        ({"password-file": "/x"}, "one place only"),
        ({"retention": {"last": "3"}}, "retention is written"),
        ({"retention": {"last": -1}}, "cannot be negative"),
        ({"timeout": True}, "number of seconds"),
        ({"timeout": 0}, "number of seconds"),
        ({"required": "yes"}, "true or false"),
        ({"repositry": "x"}, "what is repositry"),
        ({"exclude-partitions": ["3"]}, "another disk's"),
        ({"engine": "command"}, "needs backup"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        read(**changes)
    assert "here, data backup 1" in error.value.message


def test_a_plug_in_has_keys_of_its_own() -> None:
    assert read(engine="tape", drive=3).options == {"drive": 3}


def test_two_of_one_name_and_no_list() -> None:
    with pytest.raises(UsageError, match="two data backups have one name"):
        read_entries({"data": [FULL, FULL]}, "here")
    with pytest.raises(UsageError, match=r"written as \[\[data\]\]"):
        read_entries({"data": FULL}, "here")


def test_of_another_root(tmp_path: Path) -> None:
    assert load_entries(tmp_path) == []
    config = tmp_path / "etc/imager/imager.toml"
    config.parent.mkdir(parents=True)
    config.write_text('[[data]]\nname = "a"\nengine = "command"\nbackup = ["x"]\n')
    (entry,) = load_entries(tmp_path)
    assert entry.root == tmp_path
    config.write_text("[[data]")
    with pytest.raises(UsageError, match="can't be read"):
        load_entries(tmp_path)


def test_places_of_programs(tmp_path: Path) -> None:
    beside, inside = Place(tmp_path, False), Place(tmp_path, True)
    assert beside.command(["restic"]) == ["restic"]
    assert beside.path("/etc/secret") == f"{tmp_path}/etc/secret"
    assert inside.command(["restic"]) == ["chroot", str(tmp_path), "restic"]
    assert inside.path("/etc/secret") == "/etc/secret"
    assert inside.folder(tmp_path / "a") == "/a" and inside.folder(tmp_path) == "/"
    with pytest.raises(UsageError, match="is not below"):
        inside.folder(Path("/elsewhere"))
    here = Place(Path("/"), True)
    assert here.command(["x"]) == ["x"] and here.path("/a") == "/a"


@pytest.mark.parametrize(
    ("repository", "shown"),
    [
        ("rest:https://me:secret@host:8000/x", "rest:https://me:***@host:8000/x"),
        ("sftp://me@host/x", "sftp://me@host/x"),
        ("/backup/restic", "/backup/restic"),
        ("me@host:/x", "me@host:/x"),
    ],
)
def test_secrets_of_addresses(repository: str, shown: str) -> None:
    assert without_secrets(repository) == shown


def test_of_a_manifest() -> None:
    whole = {"name": "a", "engine": "restic", "snapshot": "12345678abc", "finished": "then"}
    failed = {"name": "b", "engine": "borg", "error": "no space", "of the future": 1}

    def manifest(data: object) -> Manifest:
        return Manifest("i", 1 << 18, (), {"data": data})

    one, two = backups_of(manifest([whole, failed]))
    assert one.whole and "restic 12345678, then" in one.words()
    assert not two.whole and "b (borg) FAILED: no space" in two.words()
    assert data_is_whole(manifest([whole])) and not data_is_whole(manifest([whole, failed]))
    assert not data_is_whole(manifest("damage"))
    assert data_is_whole(Manifest("i", 1 << 18, (), {}))
    with pytest.raises(FormatError):
        backups_of(manifest([{"name": 3}]))
    assert DataBackup.from_json(one.to_json()) == one


def test_fstab(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/fstab").write_text(
        "# comment\nUUID=1 / ext4 defaults 0 1\nLABEL=x  /srv  xfs\nUUID=2 none swap sw 0 0\n"
        "tmpfs /tmp tmpfs defaults 0 0\nUUID=3 /usb ext4 noauto,user 0 0\n\n"
    )
    assert [(line.device, line.point) for line in read_fstab(tmp_path)] == [
        ("UUID=1", "/"),
        ("LABEL=x", "/srv"),
    ]
    assert read_fstab(tmp_path / "nowhere") == []


class Shown:
    def __init__(self) -> None:
        self.totals: list[int] = []
        self.done = 0

    def start(self, label: str, total: int) -> None:
        self.totals.append(total)

    def advance(self, amount: int) -> None:
        assert amount >= 0
        self.done += amount

    def note(self, message: str) -> None:
        raise AssertionError(message)


def test_a_meter_waits_for_the_total() -> None:
    shown = Shown()
    meter = Meter(shown, "data")
    for done, total in ((1, 10), (2, 20), (3, 20), (2, 20), (20, 20)):
        meter.show(done, total)
    assert (shown.totals, shown.done) == ([20], 20)


def test_a_meter_without_a_total() -> None:
    shown = Shown()
    meter = Meter(shown, "data")
    meter.show(5)
    meter.show(7)
    assert (shown.totals, shown.done) == ([0], 7)


def test_times_of_the_tools() -> None:
    from imager.data import restic

    assert restic._time("2026-11-25T02:01:02.123456789+01:00") == datetime(
        2026, 11, 25, 1, 1, 2, tzinfo=UTC
    )
    assert restic._time("2026-11-25T01:01:02Z") == datetime(2026, 11, 25, 1, 1, 2, tzinfo=UTC)
