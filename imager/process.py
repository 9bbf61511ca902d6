"""The one door for subprocesses: argument lists, no shell, C locale, closed standard input."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping

from imager.errors import ToolError

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
    variables = {**os.environ, "LC_ALL": "C", "PATH": search_path(), **(environment or {})}
    try:
        result = subprocess.run(
            command,
            input=input_bytes,
            stdin=subprocess.DEVNULL if input_bytes is None else None,
            capture_output=True,
            env=variables,
            timeout=timeout_seconds,
            check=False,
        )
    except FileNotFoundError:
        raise ToolError(
            f"{command[0]} is not installed (needed for: {line})",
            hint=f"install the package that provides {command[0]}",
        ) from None
    except subprocess.TimeoutExpired:
        raise ToolError(f"no end after {timeout_seconds} s: {line}") from None
    if result.returncode not in set(accept):
        said = (result.stderr or result.stdout).decode(errors="replace").strip()
        raise ToolError(f"exit code {result.returncode} from: {line}\n{said}")
    return result


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
