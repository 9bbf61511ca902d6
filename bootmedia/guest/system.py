"""The machine under the rescue system: its memory, its kernel's log, and its end."""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path

from bootmedia.job import JOB_PATH, Job
from imager.errors import ImagerError

SENTINELS = Path("/sentinel")

# linux/reboot.h, as the C library's reboot(3) takes them
_RESTART, _POWER_OFF = 0x01234567, 0x4321FEDC

# Levels of syslog(2): "quiet" and loglevel=3 silence the second, never the first.
_URGENT, _INFORMATION = 2, 6


def announce(text: str) -> None:
    """On all of the kernel's consoles, for those who watch a serial line."""
    _tell_kernel(_URGENT, text)


def note(text: str) -> None:
    """Into the kernel's log, and on its consoles when the machine was booted with messages."""
    _tell_kernel(_INFORMATION, f"imager-rescue: {text}")


def _tell_kernel(level: int, text: str) -> None:
    with suppress(OSError), Path("/dev/kmsg").open("w") as kernel_log:
        for line in text.splitlines():
            kernel_log.write(f"<{level}>{line}\n")
            kernel_log.flush()  # each write is one message


def read_job(root: Path = Path("/")) -> Job:
    """What this medium is for. Raises ImagerError where there is none, or it is damaged."""
    try:
        return Job.from_bytes((root / JOB_PATH).read_bytes(), JOB_PATH)
    except OSError as error:
        raise ImagerError(f"/{JOB_PATH}: {error.strerror}: this is no rescue system") from None


def missing_layers(job: Job, folder: Path = SENTINELS) -> list[str]:
    """Layers that were not unpacked to their end: the machine has too little memory."""
    return [name for name in job.layers if not (folder / name).exists()]


def kernel_argument(name: str, line: str | None = None) -> str | None:
    """The last value of ``name=`` on the kernel's command line."""
    text = Path("/proc/cmdline").read_text() if line is None else line
    found = re.findall(rf"(?:^|\s){re.escape(name)}=(\S*)", text)
    return found[-1] if found else None


def reboot() -> None:
    """Write out what is pending and restart; returns only when the kernel refuses."""
    _end(_RESTART)


def power_off() -> None:
    """Write out what is pending and switch the machine off."""
    _end(_POWER_OFF)


def _end(how: int) -> None:
    os.sync()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.reboot(how):
        number = ctypes.get_errno()
        raise ImagerError(f"the kernel did not end the system: {os.strerror(number)}")
