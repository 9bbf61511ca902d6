"""Hooks: their configuration, their order, and that what was quiesced is thawed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imager.errors import UsageError
from imager.hooks import HookFailed, HookResult, HookRun, load_hooks
from imager.progress import NullProgress
from tests.support.commandline import CHECKOUT

Configure = Callable[[str], Path]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Write imager.toml; gives its folder. ``LOG`` in it stands for a file that hooks write to."""
    monkeypatch.setenv("IMAGER_CONFIG", str(tmp_path / "imager.toml"))

    def write(text: str) -> Path:
        (tmp_path / "imager.toml").write_text(text.replace("LOG", str(tmp_path / "log")))
        return tmp_path

    return write


def say(name: str, *points: str, more: str = "") -> str:
    lines = [
        f'{point} = ["sh", "-c", "echo {name} {point} $IMAGER_HOOK $IMAGER_NAME >> LOG"]'
        for point in points
    ]
    return "\n".join([f"[hooks.{name}]", *lines, more, ""])


ALL = ("before", "quiesce", "thaw", "after", "failed")


def log(folder: Path) -> list[str]:
    path = folder / "log"
    return path.read_text().splitlines() if path.exists() else []


def new_run(**about: str) -> HookRun:
    return HookRun(load_hooks(), NullProgress(), about)


class Listener(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def program(folder: Path, name: str, text: str, mode: int = 0o755) -> Path:
    file = folder / "hooks.d" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(mode)
    return file


def test_none(configure: Configure) -> None:
    assert load_hooks() == []
    configure('repo = "/images"\n')
    run = new_run()
    with run.around(), run.quiesced():
        pass
    assert run.results == [] and run.whole


def test_order_and_environment(configure: Configure) -> None:
    folder = configure(say("20-b", *ALL) + say("10-a", *ALL))
    program(folder, "15-c", f'echo "15-c $1 $IMAGER_HOOK $IMAGER_NAME" >> {folder}/log')
    program(folder, "16-not", "exit 1", mode=0o644)
    program(folder, ".hidden", "exit 1")
    run = new_run(name="web")
    with run.around(), run.quiesced():
        pass
    ups, downs = ("10-a", "15-c", "20-b"), ("20-b", "15-c", "10-a")
    order = [("before", ups), ("quiesce", ups), ("thaw", downs), ("after", downs)]
    assert log(folder) == [
        f"{name} {point} {point} web" for point, names in order for name in names
    ]
    assert [(item.name, item.point) for item in run.results] == [
        (name, point) for point, names in order for name in names
    ]
    assert run.whole
    assert HookResult.from_json(run.results[0].to_json()) == run.results[0]


def test_failed_is_told_the_error(configure: Configure) -> None:
    folder = configure('[hooks.x]\nfailed = ["sh", "-c", "echo $IMAGER_ERROR >> LOG"]\n')
    run = new_run()
    with pytest.raises(UsageError), run.around():
        raise UsageError("the disk is gone")
    assert log(folder) == ["the disk is gone"]


def test_a_quiesce_that_fails(configure: Configure) -> None:
    """Those before it and itself are thawed, those behind it never were asked."""
    bad = '[hooks.20-b]\nquiesce = ["false"]\nthaw = ["sh", "-c", "echo 20-b thaw >> LOG"]\n'
    folder = configure(say("10-a", "quiesce", "thaw") + bad + say("30-c", "quiesce", "thaw"))
    run = new_run(name="n")
    wanted = r"hook 20-b, quiesce: exit code 1"
    with pytest.raises(HookFailed, match=wanted) as caught, run.quiesced():
        pytest.fail("quiesced")
    assert "on-failure" in (caught.value.hint or "")
    assert log(folder) == ["10-a quiesce quiesce n", "20-b thaw", "10-a thaw thaw n"]
    assert not run.whole


def test_going_on_when_told_to(configure: Configure) -> None:
    configure('[hooks.a]\nquiesce = ["false"]\nthaw = ["false"]\non-failure = "continue"\n')
    listener = Listener()
    run = HookRun(load_hooks(), listener)
    with run.quiesced():
        pass
    assert [item.error is None for item in run.results] == [False, False]
    assert [note.split(":")[1] for note in listener.notes] == [
        " hook a, quiesce",
        " hook a, thaw",
    ]


def test_time_limit_ends_all_of_a_hook(configure: Configure) -> None:
    folder = configure(
        '[hooks.slow]\ntimeout = 0.5\nbefore = ["sh", "-c", "sleep 600 & echo $! > LOG; wait"]\n'
    )
    with pytest.raises(HookFailed, match=r"no end after 0\.5 s"), new_run().around():
        pytest.fail("begun")
    (child,) = log(folder)
    deadline = time.monotonic() + 60
    while Path("/proc", child).exists() and "Z" not in state(child):
        assert time.monotonic() < deadline, "what the hook had started lives on"
        time.sleep(0.05)


def state(pid: str) -> str:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UsageError("no"), SystemExit()])
def test_thaw_always_runs(configure: Configure, error: BaseException) -> None:
    folder = configure(say("a", "quiesce", "thaw"))
    run = new_run(name="n")
    with pytest.raises(type(error)), run.quiesced():
        raise error
    assert log(folder)[-1] == "a thaw thaw n"


PROGRAM = """
import signal, sys, time
from imager.hooks import HookRun, load_hooks
from imager.progress import NullProgress
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)
run = HookRun(load_hooks(), NullProgress())
with run.quiesced():
    print("quiesced", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_thaw(
    configure: Configure, tmp_path: Path, number: signal.Signals
) -> None:
    """Also a second one, which comes while the hook is at work."""
    folder = configure(
        '[hooks.a]\nquiesce = ["true"]\n'
        'thaw = ["sh", "-c", "echo begun >> LOG; while [ ! -e GO ]; do sleep 0.05; done; '
        'echo done >> LOG"]\n'.replace("GO", str(tmp_path / "go"))
    )
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=CHECKOUT,
        env={**os.environ, "IMAGER_CONFIG": str(folder / "imager.toml")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"quiesced\n"
        process.send_signal(number)
        deadline = time.monotonic() + 60
        while log(folder) != ["begun"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        (tmp_path / "go").touch()
        process.wait(60)
    assert log(folder) == ["begun", "done"]
    assert process.returncode != 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hooks = 3\n", "[hooks] must be a table"),
        ("[hooks]\na = 3\n", "[hooks.a] must be a table"),
        ('[hooks."a b"]\n', "must be a table, of a name"),
        ('[hooks.a]\nbefore = "stop postfix"\n', "before must be a list of words"),
        ("[hooks.a]\nbefore = []\n", "before must be a list of words"),
        ('[hooks.a]\nbefor = ["x"]\n', "unknown: befor"),
        ("[hooks.a]\ntimeout = 0\n", "timeout must be a number of seconds"),
        ("[hooks.a]\ntimeout = true\n", "timeout must be a number of seconds"),
        ('[hooks.a]\non-failure = "ask"\n', 'on-failure can be "stop" or "continue"'),
    ],
)
def test_mistakes(configure: Configure, text: str, said: str) -> None:
    configure(text)
    with pytest.raises(UsageError) as caught:
        load_hooks()
    assert said in caught.value.message


@pytest.mark.parametrize("what", ["imager.toml", "hooks.d", "hooks.d/x"])
def test_what_others_can_change_is_not_run(configure: Configure, what: str) -> None:
    folder = configure('[hooks.a]\nbefore = ["true"]\n')
    program(folder, "x", "true")
    assert len(load_hooks()) == 2
    (folder / what).chmod((folder / what).stat().st_mode | 0o020)
    with pytest.raises(UsageError, match="others could change it"):
        load_hooks()


def test_a_program_that_is_missing(configure: Configure) -> None:
    configure('[hooks.a]\nbefore = ["no-such-program"]\n')
    with pytest.raises(HookFailed, match="no-such-program is not installed"), new_run().around():
        pytest.fail("begun")
