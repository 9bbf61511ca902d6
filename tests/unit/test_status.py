"""What becomes of runs: imager status, notifications, metrics."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.policy import default as mail_policy
from pathlib import Path

import pytest

from imager.errors import UsageError
from imager.joblocks import hold_job
from imager.jobrecord import (
    FAILED,
    GOOD,
    PARTIAL,
    DataResult,
    JobRecord,
    JobRun,
    load_record,
    save_record,
)
from imager.jobstatus import JobStatus, read_status
from imager.metrics import render, textfile_of, write_textfile
from imager.notify import Notify, tell
from imager.units import show_age
from tests.support.commandline import imager
from tests.support.disks import MIB, make_random
from tests.support.jobs import own_folders

NOON = "2026-11-25T12:00:00Z"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_folders(tmp_path, monkeypatch)


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


# --- status -------------------------------------------------------------------------------------


@pytest.fixture
def job(repo: Path, tmp_path: Path) -> str:
    disk = make_random(tmp_path / "web1.img", MIB)
    imager("schedule", "add", "nightly", disk, "--repo", repo, "--calendar", "daily")
    return "nightly"


def status(after: timedelta = timedelta(0)) -> JobStatus:
    (found,) = read_status(datetime.now(UTC) + after).jobs
    return found


def change_last_run(**values: object) -> None:
    record = load_record("nightly")
    run = replace(record.runs[0], **values)  # type: ignore[arg-type]
    save_record("nightly", replace(record, runs=(run, *record.runs[1:])))


@needs_systemd
def test_never_ran_good_overdue(job: str) -> None:
    assert status().problems == ("never ran",)
    assert "never ran" in imager("status", code=1).out
    image = imager("schedule", "run", job, "--json").json["image"]
    found = status()
    assert (found.problems, found.word, found.image) == ((), "good", image)
    assert imager("status", "--json").json["good"] is True
    assert image in imager("status").out
    # the calendar's next time and the slack after it are less than two days away
    late = status(timedelta(days=2))
    assert late.word == "overdue" and late.age and late.age >= 2 * 86400
    assert late.due == found.next


@needs_systemd
@pytest.mark.parametrize("result", [FAILED, PARTIAL, "incomplete", "interrupted", "running"])
def test_what_went_wrong_is_a_problem(job: str, result: str) -> None:
    imager("schedule", "run", job)
    change_last_run(result=result, error="no\nmore")
    found = status()
    assert found.word == ("interrupted" if result == "running" else result)
    assert job in imager("status", code=1).out
    with hold_job(job):
        assert status().running
        assert bool(status().problems) == (result != "running")


@needs_systemd
def test_images_that_are_gone_and_repositories(job: str, repo: Path) -> None:
    image = imager("schedule", "run", job, "--json").json["image"]
    imager("rm", image, "--yes", "--repo", repo)
    assert "gone" in status().problems[0]
    repo.rename(repo.with_name("elsewhere"))
    assert status().problems[0].startswith("repository: ")


@needs_systemd
def test_a_damaged_job_and_a_damaged_manifest(job: str, repo: Path, tmp_path: Path) -> None:
    imager("schedule", "run", job)
    (repo / "manifests/20200101t000000z-00000000.json").write_text("{}")
    assert status().word == "damaged"
    (tmp_path / "config/jobs/nightly.toml").write_text("[")
    assert status().word == "unreadable"


@needs_systemd
def test_the_age_of_data(job: str) -> None:
    imager("schedule", "run", job)
    data = (DataResult("mail", "abc", NOON), DataResult("db", "", NOON, False, "no password"))
    change_last_run(data=data)
    found = status()
    assert found.problems == ("data: backup db is not whole: no password",)
    assert [(item.name, item.finished) for item in found.data] == [("mail", NOON)]


@needs_systemd
def test_images_without_a_job(job: str, repo: Path, tmp_path: Path) -> None:
    imager("schedule", "run", job)
    other = make_random(tmp_path / "web9.img", MIB)
    for _ in range(2):
        imager("capture", other, "--repo", repo)
    found = imager("status", "--json").json
    assert found["good"]
    (lineage,) = found["without_job"]
    assert (lineage["name"], lineage["images"]) == ("web9", 2)
    assert "web9" in imager("status").out


def test_no_jobs_is_no_problem() -> None:
    assert imager("status", "--json").json == {"good": True, "jobs": [], "without_job": []}
    assert "no jobs" in imager("status").out


def test_ages() -> None:
    ages = [show_age(seconds) for seconds in (0, 119, 120, 7199, 7200, 172799, 172800)]
    assert ages == ["0 s", "119 s", "2 min", "119 min", "2 h", "47 h", "2 days"]


# --- notifications ------------------------------------------------------------------------------

GOOD_RUN = JobRun(
    NOON, GOOD, NOON, exit_code=0, image="20261125t120000z-00000000", lineage="web1", host="h"
)
BAD_RUN = replace(GOOD_RUN, result=FAILED, exit_code=1, image="", error='disk "x"\nis missing')


@pytest.mark.parametrize(
    "on, due",
    [
        ("failure", [False, True, False, True, True]),
        ("always", [True] * 5),
        ("change", [False, True, True, True, False]),
    ],
)
def test_when_a_notification_is_due(on: str, due: list[bool]) -> None:
    pairs = [
        (GOOD_RUN, GOOD_RUN),
        (BAD_RUN, GOOD_RUN),
        (GOOD_RUN, BAD_RUN),
        (BAD_RUN, None),
        (BAD_RUN, BAD_RUN),
    ]
    assert [Notify(on=on).is_due(*pair) for pair in pairs] == due


@pytest.mark.parametrize(
    "table",
    [
        {"on": "sometimes"},
        {"command": 1},
        {"command": ["a", 1]},
        {"mail": ["root"]},
        {"mail": "root\nBcc: x"},
        {"webhook": "ftp://host/"},
        {"timeout": 0},
        {"color": "red"},
    ],
)
def test_settings_that_are_wrong(table: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"\[notify\]"):
        Notify.from_table(table)


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def test_a_command_gets_its_environment(tmp_path: Path) -> None:
    command = script(tmp_path / "tell", f'env -0 > "{tmp_path}/$1"')
    assert tell(Notify(command=(command, "out")), "nightly", BAD_RUN, GOOD_RUN) == []
    lines = (tmp_path / "out").read_text().split("\0")
    told = dict(line.split("=", 1) for line in lines if line.startswith("IMAGER_"))
    assert told["IMAGER_JOB"] == "nightly" and told["IMAGER_RESULT"] == FAILED
    assert told["IMAGER_RESULT_BEFORE"] == GOOD and told["IMAGER_EXIT_CODE"] == "1"
    assert told["IMAGER_ERROR"] == 'disk "x"\nis missing' and told["IMAGER_IMAGE"] == ""


def test_mail_goes_to_sendmail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "sendmail", f'echo "$@" > "{tmp_path}/words"; cat > "{tmp_path}/mail"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert tell(Notify(mail="root@example.org"), "nightly", BAD_RUN, None) == []
    assert (tmp_path / "words").read_text() == "-i -- root@example.org\n"
    mail = message_from_bytes((tmp_path / "mail").read_bytes(), policy=mail_policy)
    assert mail["To"] == "root@example.org" and "nightly" in mail["Subject"]
    assert "is missing" in mail.get_content()


class Hook(http.server.BaseHTTPRequestHandler):
    got: list[bytes]
    answer = 204

    def do_POST(self) -> None:
        self.got.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.answer)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[tuple[str, type[Hook]]]:
    class Own(Hook):
        got: list[bytes] = []  # noqa: RUF012

    server = http.server.HTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/secret", Own
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_gets_json(hook: tuple[str, type[Hook]]) -> None:
    url, server = hook
    assert tell(Notify(webhook=url), "nightly", BAD_RUN, GOOD_RUN) == []
    (content,) = server.got
    document = json.loads(content)
    assert document["job"] == "nightly" and document["result"] == FAILED
    assert document["before"] == GOOD and document["error"] == BAD_RUN.error
    server.answer = 500
    (problem,) = tell(Notify(webhook=url), "nightly", BAD_RUN, GOOD_RUN)
    assert "500" in problem and "secret" not in problem


def test_what_cannot_be_told_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way by itself: one that fails does not keep the others from being tried."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("imager.process._SYSTEM_FOLDERS", ())
    failing = script(tmp_path / "fails", "exit 3")
    settings = Notify(command=(failing,), mail="root", webhook="http://127.0.0.1:1/", timeout=30)
    problems = tell(settings, "nightly", BAD_RUN, None)
    assert len(problems) == 3 and "exit code 3" in problems[0]


@needs_systemd
def test_a_failing_notification_never_fails_the_run(job: str, tmp_path: Path) -> None:
    (tmp_path / "imager.toml").write_text(
        f'[notify]\non = "always"\ncommand = ["{tmp_path}/none"]\n'
        '[metrics]\ntextfile = "/proc/none/x.prom"\n'
    )
    outcome = imager("schedule", "run", job)
    assert "notification by" in outcome.err and "no metrics are written" in outcome.err
    assert status().problems == ()


# --- metrics ------------------------------------------------------------------------------------

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
SAMPLE = re.compile(rf"({NAME})\{{({LABEL}(?:,{LABEL})*)\}} (\S+)\Z")


def parse(text: str) -> dict[tuple[str, str], float]:
    """Its text format, strictly: each family once, help and type first, no sample twice."""
    found: dict[tuple[str, str], float] = {}
    families: list[str] = []
    typed = ""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            families.append(line.split(" ")[2])
        elif line.startswith("# TYPE "):
            _, _, typed, kind = line.split(" ")
            assert typed == families[-1] and kind == "gauge"
        else:
            match = SAMPLE.match(line)
            assert match, line
            assert match[1] == typed == families[-1]
            assert (match[1], match[2]) not in found
            found[match[1], match[2]] = float(match[3])
    assert len(set(families)) == len(families)
    return found


def test_metrics_of_jobs() -> None:
    good = replace(
        GOOD_RUN, stored_bytes=17179869185, milliseconds=1500, freeze_milliseconds=147, used_bytes=5
    )
    records = {
        "nightly": JobRecord(last_good=good, runs=(replace(BAD_RUN, milliseconds=20), good)),
        "new": JobRecord(),
        "hourly": JobRecord(last_good=good, runs=(JobRun(NOON), good)),
    }
    found = parse(render(records))
    noon = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()

    def of(name: str, job: str, more: str = "", lineage: str = "web1") -> float:
        return found[f"imager_job_{name}", f'image_job="{job}",name="{lineage}"{more}']

    assert of("last_success_timestamp_seconds", "nightly") == noon
    assert of("success", "nightly") == 0 and of("success", "hourly") == 1
    assert of("exit_code", "nightly") == 1 and of("duration_seconds", "hourly") == 1.5
    assert of("stored_bytes", "hourly") == 17179869185
    assert of("freeze_seconds", "hourly") == 0.147
    assert of("result", "nightly", ',result="failed"') == 1
    assert of("result", "nightly", ',result="good"') == 0
    assert not [labels for _, labels in found if '"new"' in labels]


def test_labels_are_escaped() -> None:
    odd = replace(GOOD_RUN, lineage='a"b\\c\nd')
    found = parse(render({"x": JobRecord(runs=(odd,), last_good=odd)}))
    assert {labels.partition(",result")[0] for _, labels in found} == {
        'image_job="x",name="a\\"b\\\\c\\nd"'
    }


def test_the_file_is_replaced_and_readable(tmp_path: Path) -> None:
    file = tmp_path / "collector/imager.prom"
    assert textfile_of({"textfile": str(file)}) == file and textfile_of({}) is None
    for wrong in ("relative.prom", "/no/ending", 3):
        with pytest.raises(UsageError):
            textfile_of({"textfile": wrong})
    records = {"x": JobRecord(runs=(GOOD_RUN,), last_good=GOOD_RUN)}
    write_textfile(file, records)
    before = file.stat()
    write_textfile(file, records)
    assert file.stat().st_ino != before.st_ino and file.stat().st_mode & 0o777 == 0o644
    assert list(file.parent.iterdir()) == [file]
    parse(file.read_text())


@needs_systemd
def test_a_run_writes_metrics(job: str, tmp_path: Path) -> None:
    (tmp_path / "imager.toml").write_text(f'[metrics]\ntextfile = "{tmp_path}/imager.prom"\n')
    imager("schedule", "run", job)
    found = parse((tmp_path / "imager.prom").read_text())
    assert found["imager_job_success", 'image_job="nightly",name="web1"'] == 1
