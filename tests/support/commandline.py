"""Running imager: in this process (quick), or as a process that can be killed and measured."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imager.__main__ import main

# A process between: a child's peak begins with what its parent had, and pytest has much.
_MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(f"\\n{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}", file=sys.stderr)
sys.exit(code)
"""

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be exactly one JSON document."""
        return json.loads(self.out)


def imager(*words: object, code: int = 0) -> Outcome:
    """Run a command in this process, without a terminal, and check its exit code."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["imager", *map(str, words)], io.StringIO()
    found = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        found = int(end.code or 0)
    finally:
        sys.argv, sys.stdin = before
    outcome = Outcome(found, out.getvalue(), err.getvalue())
    assert found == code, f"exit code {found} instead of {code}: {words}\n{outcome}"
    assert "Traceback" not in outcome.err, outcome.err
    return outcome


def imager_alone(*words: object, code: int = 0) -> Outcome:
    """Run a command in a process of its own, as a person would, and check its exit code."""
    done = subprocess.run(
        command(*words),
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert done.returncode == code, f"{words}: {outcome}"
    return outcome


def command(*words: object) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "imager", *map(str, words)]


def start(*words: object) -> subprocess.Popen[str]:
    """A running imager; standard output and error are pipes."""
    return subprocess.Popen(
        command(*words),
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], *, seconds: float = 60) -> Outcome:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def run_until(call: int, *words: object) -> tuple[Outcome, int]:
    """Run imager until its ``call``-th system call that changes a disk (``tests.support.cut``),
    which kills it with SIGKILL; and how many of them there were."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.cut", str(call), *map(str, words)],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    err, _, calls = result.stderr.rstrip().rpartition("\n")
    counted = int(calls.removeprefix("calls: ")) if calls.startswith("calls: ") else call
    return Outcome(result.returncode, result.stdout, err), counted


def peak_memory(*words: object) -> tuple[Outcome, int]:
    """Run to the end; the process's largest resident set, in bytes."""
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command(*words)],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    err, _, kilobytes = result.stderr.rstrip().rpartition("\n")
    return Outcome(result.returncode, result.stdout, err), int(kilobytes) << 10


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints how long a block took (shown by pytest -rP)."""
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.2f} s")
