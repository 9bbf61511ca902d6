"""Jobs by the calendar: their files and units, their runs, and what is recorded of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from imager.errors import ImagerError, ObjectMissing, UsageError
from imager.joblocks import hold_disks, hold_job, job_runs
from imager.jobrecord import GOOD, RUNNING, JobRecord, JobRun, load_record, save_record
from imager.jobs import Job, Keep, load_job, save_job
from imager.oncalendar import check_calendar, span_seconds, times_after
from imager.repository import Repository
from imager.systemdunits import service_text, timer_text
from tests.support.commandline import finish, imager, start
from tests.support.disks import MIB, make_random
from tests.support.jobs import own_folders

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_folders(tmp_path, monkeypatch)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_random(tmp_path / "web1.img", MIB)


@pytest.fixture
def job(repo: Path, disk: Path) -> str:
    imager("schedule", "add", "nightly", disk, "--repo", repo, "--keep-last", 2)
    return "nightly"


def record(name: str = "nightly") -> JobRecord:
    return load_record(name)


# --- the job's file and the units ---------------------------------------------------------------


def test_a_job_comes_back_as_it_was_written() -> None:
    odd = 'a "b" \\ % $ ü\''
    job = Job(
        name="x",
        calendar="Mon 02:30",
        sources=("/dev/sda", f"/{odd}"),
        note=odd,
        repo=f"/{odd}",
        keep=Keep(last=0, daily=3),
        exclude_partitions=("4",),
        nice=0,
    )
    save_job(job)
    assert load_job("x") == job


def test_a_damaged_or_unknown_setting_is_named(job: str, tmp_path: Path) -> None:
    file = tmp_path / "config/jobs/nightly.toml"
    good = file.read_text()
    for text, said in (
        ("[", "cannot be read"),
        (f"colour = 1\n{good}", "colour"),
        ("", "calendar"),
    ):
        file.write_text(text)
        assert said in imager("schedule", "show", job, code=3).err
    file.write_text(good)
    imager("schedule", "remove", job)
    with pytest.raises(ObjectMissing):
        load_job(job)


@pytest.mark.parametrize(
    "words",
    [
        "nightly",
        "nightly {disk} --all-disks",
        "nightly web1.img",
        "a/b {disk}",
        "-- .hidden {disk}",
        "nightly {disk} --calendar sometimes",
        "nightly {disk} --random-delay soon",
        "nightly {disk} --timeout infinity",
        "nightly {disk} --io fast",
        "nightly {disk} --gc hourly",
        "nightly {disk} --cpu-weight 0",
        "nightly {disk} --keep-last 0",
        "nightly {disk} --environment-file secret",
        "nightly {disk}%0Ax",
        "nightly {disk} --repo images%0A",
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(
    disk: Path, tmp_path: Path, words: str
) -> None:
    texts = [word.replace("%0A", "\n").format(disk=disk) for word in words.split()]
    imager("schedule", "add", *texts, code=2)
    assert not list(tmp_path.glob("config/jobs/*")) and not list(tmp_path.glob("unit/*"))


def test_units_are_what_systemd_understands(tmp_path: Path, repo: Path) -> None:
    odd = make_random(tmp_path / "a b%n$HOME.img", MIB)
    folder = shutil.copytree(repo, tmp_path / 'im"ages $x %h')
    imager(
        *("schedule", "add", "odd", odd, "--repo", folder, "--calendar", "Mon..Fri 02:30"),
        *("--random-delay", "30min", "--environment-file", tmp_path / "s%e", "--io", "best-effort"),
    )
    units = sorted((tmp_path / "unit").iterdir())
    assert [unit.name for unit in units] == ["imager-odd.service", "imager-odd.timer"]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    service, timer = (unit.read_text() for unit in units)
    assert 'RequiresMountsFor="' in service and "%%h" in service and '\\"' in service
    assert "OnCalendar=Mon..Fri 02:30\nRandomizedDelaySec=30min\nPersistent=true" in timer


def test_a_line_break_never_gets_into_a_unit() -> None:
    good = Job("x", "daily", ("/dev/sda",))
    with pytest.raises(UsageError):
        timer_text(replace(good, calendar="daily\nUnit=x"))
    with pytest.raises(UsageError):
        service_text(replace(good, repo="/x\nExecStart=x"))


def test_secrets_go_by_file_only(job: str, tmp_path: Path) -> None:
    assert (tmp_path / "config/jobs/nightly.toml").stat().st_mode & 0o777 == 0o600
    assert "EnvironmentFile" not in service_text(load_job(job))
    with_file = replace(load_job(job), environment_file="/etc/imager/secrets")
    assert "EnvironmentFile=/etc/imager/secrets\n" in service_text(with_file)


# --- the calendar -------------------------------------------------------------------------------


def test_times_are_utc_whatever_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    noon = datetime(2026, 7, 1, 12, tzinfo=UTC)
    for zone, hour in (("UTC", 2), ("Europe/Berlin", 0), ("America/New_York", 6)):
        monkeypatch.setenv("TZ", zone)
        first, second = times_after("*-*-* 02:30", noon, 2)
        assert first == datetime(2026, 7, 2, hour, 30, tzinfo=UTC)
        assert (second - first).total_seconds() == 86400
    assert times_after("2020-01-01", noon) == []


def test_spans_and_expressions() -> None:
    assert span_seconds("1h 30min") == 5400 and span_seconds("0") == 0
    check_calendar("quarterly")
    for text in ("", "  ", "daily\nweekly", "--help"):
        with pytest.raises(UsageError):
            check_calendar(text)


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_captures_prunes_and_is_recorded(job: str, repo: Path) -> None:
    outcomes = [imager("schedule", "run", job, "--json").json for _ in range(3)]
    assert [item["result"] for item in outcomes] == [GOOD] * 3
    assert [item["pruned"] for item in outcomes] == [0, 0, 1]
    images = Repository.open(str(repo)).image_ids()
    assert images == [item["image"] for item in outcomes[1:]]
    found = record()
    assert [run.image for run in found.runs] == [item["image"] for item in reversed(outcomes)]
    assert found.last_good == found.runs[0] and found.last_gc
    assert found.runs[0].exit_code == 0 and found.runs[0].finished >= found.runs[0].started
    assert found.runs[-1].stored_bytes > MIB and found.runs[0].stored_bytes < MIB


def test_a_missing_source_fails_and_is_recorded(job: str, disk: Path) -> None:
    good = imager("schedule", "run", job, "--json").json
    disk.unlink()
    outcome = imager("schedule", "run", job, code=1)
    assert "web1.img" in outcome.err
    found = record()
    assert [run.result for run in found.runs] == ["failed", GOOD]
    assert found.runs[0].exit_code == 1 and "web1.img" in found.runs[0].error
    assert found.last_good and found.last_good.image == good["image"]


def test_a_missing_repository_is_not_made_where_a_mount_is_missing(job: str, repo: Path) -> None:
    shutil.rmtree(repo)
    repo.mkdir()
    imager("schedule", "run", job, code=1)
    assert not list(repo.iterdir())
    assert record().last_ended


def test_upkeep_that_fails_leaves_the_image(job: str, repo: Path) -> None:
    (repo / "manifests").mkdir(exist_ok=True)
    (repo / "manifests/20200101t000000z-00000000.json").write_text("{}")
    outcome = imager("schedule", "run", job, "--json", code=3).json
    assert outcome["result"] == "incomplete" and outcome["image"]
    last_good = record().last_good
    assert last_good and last_good.image == outcome["image"]


def test_a_job_runs_once_at_a_time(job: str, repo: Path) -> None:
    with hold_job(job):
        assert job_runs(job)
        assert "running already" in imager("schedule", "run", job, code=1).err
    assert not job_runs(job)
    assert not record().runs and not Repository.open(str(repo)).image_ids()
    imager("schedule", "run", job)


def test_one_capture_of_a_disk_at_a_time(job: str, disk: Path, tmp_path: Path) -> None:
    """The second waits for the first, whatever name it has for the disk."""
    link = tmp_path / "link.img"
    link.symlink_to(disk)
    waits, entered = threading.Event(), threading.Event()

    def second() -> None:
        with hold_disks([str(link)], lambda _: waits.set()):
            entered.set()

    thread = threading.Thread(target=second)
    with hold_disks([str(disk)], lambda text: pytest.fail(text)):
        thread.start()
        assert waits.wait(60) and not entered.is_set()
    thread.join(60)
    assert entered.is_set()


@pytest.fixture
def waiting_run(job: str, disk: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that waits for a disk, and would wait forever."""
    with hold_disks([str(disk)], print):
        process = start("schedule", "run", job)
        assert process.stderr is not None
        assert "waiting" in process.stderr.readline()
        try:
            yield process
        finally:
            process.kill()
            process.wait(60)


def test_a_run_that_is_stopped_says_so(waiting_run: subprocess.Popen[str]) -> None:
    assert record().runs[0].result == RUNNING
    waiting_run.send_signal(signal.SIGTERM)
    assert finish(waiting_run).code == 130
    assert record().runs[0].result == "interrupted"


def test_a_run_that_is_killed_is_seen_by_the_next(waiting_run: subprocess.Popen[str]) -> None:
    os.kill(waiting_run.pid, signal.SIGKILL)
    finish(waiting_run)
    assert record().runs[0].result == RUNNING and not job_runs("nightly")
    found = record().begin(JobRun("2026-11-25T00:00:00Z"))
    assert found.runs[1].result == "interrupted" and "killed" in found.runs[1].error


def test_thirty_runs_are_kept() -> None:
    found = JobRecord()
    for n in range(40):
        found = found.begin(JobRun(f"{n}")).end(JobRun(f"{n}", GOOD))
    assert [run.started for run in found.runs] == [f"{n}" for n in range(39, 9, -1)]
    save_record("x", found)
    assert load_record("x") == found


def test_a_damaged_record_is_an_empty_one(job: str, tmp_path: Path) -> None:
    imager("schedule", "run", job)
    (tmp_path / "state/jobs/nightly.json").write_text('{"runs": 1')
    assert record() == JobRecord()
    imager("schedule", "run", job)
    assert len(record().runs) == 1


def test_a_state_folder_that_cannot_be_written_is_told(job: str, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").write_text("")
    assert "state" in imager("schedule", "run", job, code=1).err
    with pytest.raises(ImagerError):
        save_record("x", JobRecord())


def test_list_and_show(job: str) -> None:
    imager("schedule", "run", job)
    (listed,) = imager("schedule", "list", "--json").json
    assert listed["name"] == job and listed["keep"]["last"] == 2
    shown = imager("schedule", "show", job, "--json").json
    assert shown["job"] == listed and shown["record"]["runs"][0]["result"] == GOOD
    assert job in imager("schedule", "list").out
    assert 'calendar = "daily"' in imager("schedule", "show", job).out
    imager("schedule", "show", "other", code=1)


def test_remove_takes_all_but_the_images(job: str, tmp_path: Path, repo: Path) -> None:
    image = json.loads(imager("schedule", "run", job, "--json").out)["image"]
    imager("schedule", "remove", job)
    assert not list(tmp_path.glob("unit/*")) and not list(tmp_path.glob("config/jobs/*"))
    assert not list(tmp_path.glob("state/jobs/*"))
    assert Repository.open(str(repo)).image_ids() == [image]
    imager("schedule", "remove", job, code=1)
