"""Programs that take long: their lines as they come, and their end."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from imager.errors import ToolError
from imager.process import follow


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_of_both_and_the_code() -> None:
    out: list[str] = []
    err: list[str] = []
    code = "import sys; print('a\\nb'); print('ä', file=sys.stderr); print('end', end=''); exit(3)"
    found = follow(
        python(code),
        on_output=out.append,
        on_error=err.append,
        accept=(0, 3),
        environment={"PYTHONUTF8": "1"},
    )
    assert (found, out, err) == (3, ["a", "b", "end"], ["ä"])


def test_lines_come_while_it_runs(tmp_path: Path) -> None:
    """It goes on only when its first line was heard."""
    gate = tmp_path / "gate"
    code = (
        "import sys, time, pathlib\nprint('first', flush=True)\n"
        f"while not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.01)\nprint('second')"
    )
    heard: list[str] = []

    def hear(line: str) -> None:
        heard.append(line)
        gate.touch()

    follow(python(code), on_output=hear, timeout_seconds=60)
    assert heard == ["first", "second"]


def test_waiting_is_told(tmp_path: Path) -> None:
    """It ends only when it was told of."""
    gate = tmp_path / "gate"
    code = f"import time, pathlib\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.01)"
    follow(python(code), on_wait=gate.touch, timeout_seconds=60)
    assert gate.exists()


def test_much_on_both_does_not_block() -> None:
    code = "import sys\nfor n in range(20000): print(n); print('x' * 50, file=sys.stderr)"
    out: list[str] = []
    follow(python(code), on_output=out.append)
    assert len(out) == 20000


def test_failure_tells_what_was_said() -> None:
    with pytest.raises(ToolError, match=r"exit code 2 from: .*\nno such thing"):
        follow(python("import sys; print('no such thing', file=sys.stderr); exit(2)"))


def test_missing_program() -> None:
    with pytest.raises(ToolError, match="no-such-program is not installed"):
        follow(["no-such-program"])


def test_too_long_ends_its_children_too(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)"
    )
    with pytest.raises(ToolError, match="no end after 5 s"):
        follow(python(code), timeout_seconds=5)
    if mark.exists():
        wait_until_gone(int(mark.read_text()))


def test_an_interrupt_ends_it(tmp_path: Path) -> None:
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(
            python("import os, time; print(os.getpid(), flush=True); time.sleep(600)"),
            on_output=interrupt,
        )
    wait_until_gone(pids[0])


def test_what_goes_on_in_the_background_is_not_waited_for() -> None:
    """It inherits standard output, as servers do that are started by their control program."""
    pids: list[int] = []
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid)"
    )
    follow(python(code), on_output=lambda line: pids.append(int(line)), timeout_seconds=300)
    os.kill(pids[0], signal.SIGKILL)
    wait_until_gone(pids[0])


def wait_until_gone(pid: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    status = Path(f"/proc/{pid}/stat")
    while status.exists() and ") Z " not in status.read_text(errors="replace"):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)
