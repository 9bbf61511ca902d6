"""The one door for subprocesses: argument lists, no shell, C locale, closed standard input."""

from __future__ import annotations

import os
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import IO

from imager.errors import ToolError

OnLine = Callable[[str], object]
"""Is told a line, without its end."""

# What is kept of a long-running program's messages, and how long it may take to end when asked to.
_KEPT_BYTES = 64 << 10
_END_SECONDS = 10.0
_LOOK_SECONDS = 0.5

# Debian keeps mkfs, sfdisk and resize2fs here; a user's PATH often lacks these folders.
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")


def search_path() -> str:
    """PATH with the system folders appended."""
    return os.pathsep.join([*os.get_exec_path(), *_SYSTEM_FOLDERS])


def find_tool(name: str) -> str | None:
    """Absolute path of a program, or None when it is not installed."""
    return shutil.which(name, path=search_path())


def run(
    command: list[str],
    *,
    input_bytes: bytes | None = None,
    accept: Iterable[int] = (0,),
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end and return its output as bytes.

    Raises ToolError when the program is missing, exceeds the time limit, or ends with an exit
    code that is not in ``accept``.
    """
    line = shlex.join(command)
    try:
        result = subprocess.run(
            command,
            input=input_bytes,
            stdin=subprocess.DEVNULL if input_bytes is None else None,
            capture_output=True,
            env=_variables(environment),
            timeout=timeout_seconds,
            check=False,
        )
    except FileNotFoundError:
        raise _not_installed(command) from None
    except subprocess.TimeoutExpired:
        raise ToolError(f"no end after {timeout_seconds} s: {line}") from None
    if result.returncode not in set(accept):
        said = (result.stderr or result.stdout).decode(errors="replace").strip()
        raise ToolError(f"exit code {result.returncode} from: {line}\n{said}")
    return result


def follow(
    command: list[str],
    *,
    on_output: OnLine | None = None,
    on_error: OnLine | None = None,
    on_wait: Callable[[], object] | None = None,
    accept: Iterable[int] = (0,),
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_seconds: float | None = None,
) -> int:
    """Run a program that takes long and tell its lines as they come; returns its exit code.

    ``on_output`` gets those of standard output, ``on_error`` those of standard error; ``on_wait``
    is called now and then while nothing comes. The program
    has a process group of its own, which is ended when the time is up and when an exception comes
    from a callback or an interrupt. Raises ToolError as ``run``, with the end of what it said.
    """
    line = shlex.join(command)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_variables(environment),
            cwd=folder,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise _not_installed(command) from None
    except OSError as error:
        raise ToolError(f"{command[0]} cannot be started: {error.strerror}") from None
    deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
    with process:
        try:
            assert process.stdout is not None and process.stderr is not None
            said = _tell_lines(
                {process.stdout: on_output, process.stderr: on_error}, process, deadline, on_wait
            )
            code = process.wait(_left(deadline))
        except subprocess.TimeoutExpired:
            raise ToolError(f"no end after {timeout_seconds:g} s: {line}") from None
        finally:
            _end_group(process)
    if code not in set(accept):
        raise ToolError(f"exit code {code} from: {line}\n{said}")
    return code


def _tell_lines(
    pipes: dict[IO[bytes], OnLine | None],
    process: subprocess.Popen[bytes],
    deadline: float | None,
    on_wait: Callable[[], object] | None,
) -> str:
    """Until both ends are closed; the end of what came by standard error, else by output."""
    pending = dict.fromkeys(pipes, b"")
    kept = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            left = _left(deadline)
            events = selector.select(_LOOK_SECONDS if left is None else min(left, _LOOK_SECONDS))
            if not events and process.poll() is not None:
                break  # what it started in the background holds the other end
            if not events and on_wait is not None:
                on_wait()
            for key, _ in events:
                pipe = next(each for each in pipes if each is key.fileobj)
                content = os.read(pipe.fileno(), 1 << 16)
                if not content:
                    selector.unregister(pipe)
                    content = b"\n" if pending[pipe] else b""
                kept[pipe] = (kept[pipe] + content)[-_KEPT_BYTES:]
                *lines, pending[pipe] = (pending[pipe] + content).split(b"\n")
                tell = pipes[pipe]
                for text in lines if tell else ():
                    assert tell is not None
                    tell(text.decode(errors="replace").rstrip("\r"))
            if deadline is not None and monotonic() >= deadline:
                raise subprocess.TimeoutExpired(process.args, 0)
    output, error = kept.values()
    return (error.strip() or output.strip()).decode(errors="replace")


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - monotonic(), 0)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Nothing to do for one that has ended by itself."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Companion:
    """A program that runs beside this one; ``pid`` is its own as long as it runs."""

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        self._process = process
        self._said = said
        self.pid = process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait(self, timeout_seconds: float) -> bool:
        """Whether it has ended within the time."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def said(self) -> str:
        """The end of its output and its messages."""
        size = os.fstat(self._said.fileno()).st_size
        kept = os.pread(self._said.fileno(), _KEPT_BYTES, max(size - _KEPT_BYTES, 0))
        return kept.decode(errors="replace").strip()


@contextmanager
def beside(command: list[str], *, inherit: Iterable[int] = ()) -> Iterator[Companion]:
    """Run a program beside this one until the block ends, which kills it if it still runs.

    It has a session of its own, so Ctrl-C is not for it, and gets the open files of ``inherit``.
    When this process is killed, so is it. Raises ToolError when it is missing.
    """
    if find_tool(command[0]) is None:
        raise _not_installed(command)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            # The kernel ends it when the thread that started it does, however that ends.
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=_variables(None),
            pass_fds=tuple(inherit),
            start_new_session=True,
        )
        try:
            yield Companion(process, said)
        finally:
            process.kill()
            process.wait()


class LeftRunning:
    """A program that runs on when this one has ended."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        return self._process.wait()


def leave_running(command: list[str], *, inherit: Iterable[int] = ()) -> LeftRunning:
    """Start a program in a session of its own, without input and output, with the open files of
    ``inherit``, and leave it to itself. Raises ToolError when it is missing."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_variables(None),
            pass_fds=tuple(inherit),
            start_new_session=True,
        )
    except FileNotFoundError:
        raise _not_installed(command) from None
    return LeftRunning(process)


def _variables(more: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "PATH": search_path(), **(more or {})}


def _not_installed(command: list[str]) -> ToolError:
    return ToolError(
        f"{command[0]} is not installed (needed for: {shlex.join(command)})",
        hint=f"install the package that provides {command[0]}",
    )


def attend(command: list[str], terminal: int) -> int:
    """Run a program that talks to a person on an open terminal; returns its exit code.

    Raises ToolError when the program is missing.
    """
    variables = {**os.environ, "PATH": search_path()}
    try:
        return subprocess.run(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env=variables, check=False
        ).returncode
    except FileNotFoundError:
        raise ToolError(f"{command[0]} is not installed") from None


def pass_through(command: list[str], *, output: int | None = None) -> int:
    """Run a program with this process's own terminal, files and locale; returns its exit code, or
    as a shell does 128 and the number of the signal that ended it.

    Ctrl-C is the program's alone as long as it runs. ``output`` is an open file for what it prints,
    where standard output is for something else. Raises ToolError when it cannot be started.
    """
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler is not inherited: default
    try:
        code = subprocess.run(command, stdout=output, check=False).returncode
    except FileNotFoundError:
        raise ToolError(f"{command[0]} is not installed") from None
    except OSError as error:
        raise ToolError(f"{command[0]} cannot be started: {error.strerror}") from None
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


@contextmanager
def pipe(files: Sequence[Path], *commands: list[str] | None) -> Iterator[IO[bytes]]:
    """What files that belong together hold, through some programs; None is no program.

    At the end of the block, raises ToolError with what the program said that failed. Who has not
    read to the end by then wants no more: nothing is checked, and the programs are ended.
    """
    chain = [["cat", "--", *map(str, files)], *filter(None, commands)]
    for command in chain:
        if find_tool(command[0]) is None:
            raise _not_installed(command)
    with ExitStack() as stack:
        output: IO[bytes] | None = None
        running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        for command in chain:
            said = stack.enter_context(tempfile.TemporaryFile())
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=output or subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    env=_variables(None),
                )
            )
            stack.callback(process.kill)
            if output is not None:
                output.close()  # so that who writes to it notices when who reads is gone
            output = process.stdout
            running.append((process, said))
        assert output is not None
        yield output
        if output.read(1):
            return
        codes = [process.wait() for process, _ in running]
        # One that wrote to another that failed was only cut off.
        failed = [n for n, code in enumerate(codes) if code not in (0, -signal.SIGPIPE)]
        if failed or any(codes):
            n = failed[-1] if failed else len(codes) - 1
            at_end = running[n][1]
            at_end.seek(0)
            text = at_end.read()[-_KEPT_BYTES:].decode(errors="replace").strip()
            raise ToolError(f"exit code {codes[n]} from: {shlex.join(chain[n])}\n{text}")
