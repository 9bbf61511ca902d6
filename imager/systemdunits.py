"""The timer and the service of a job: their text, and handing them to systemd.

No setting makes a mount namespace or a device policy for the service: a capture opens disks and
freezes mounted filesystems, and hooks do what the administrator wants. So what is left of
systemd's hardening is what neither needs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from imager.errors import ImagerError, UsageError
from imager.jobs import Job, check_name, replace_file
from imager.process import run

_SYSTEM_UNITS = Path("/etc/systemd/system")
_RUNS = Path("/run/systemd/system")  # sd_booted(3)

_TIMER = """\
# Written by imager schedule add, which writes it anew.
[Unit]
Description=Timer of the image job {name}

[Timer]
OnCalendar={calendar}
RandomizedDelaySec={random_delay}
Persistent=true
Unit=imager-{name}.service

[Install]
WantedBy=timers.target
"""

_SERVICE = """\
# Written by imager schedule add, which writes it anew.
[Unit]
Description=Image job {name}
Wants=network-online.target
After=network-online.target local-fs.target
{mounts}
[Service]
Type=oneshot
ExecStart={command}
{environment}TimeoutStartSec={timeout}
KillMode=mixed
Nice={nice}
IOSchedulingClass={io}
IOSchedulingPriority=7
CPUWeight={cpu_weight}
UMask=0077
LockPersonality=true
RestrictRealtime=true
SystemCallArchitectures=native
"""


def unit_folder() -> Path:
    """``IMAGER_UNIT_DIR``, else the administrator's units."""
    return Path(os.environ.get("IMAGER_UNIT_DIR", _SYSTEM_UNITS))


def unit_name(job: str, kind: str) -> str:
    """``kind``: timer or service."""
    return f"imager-{check_name(job)}.{kind}"


def timer_text(job: Job) -> str:
    return _TIMER.format(
        name=job.name,
        calendar=_escaped(job.calendar),
        random_delay=_escaped(job.random_delay),
    )


def service_text(job: Job) -> str:
    command = [sys.executable, "-m", "imager", "schedule", "run", job.name]
    local = job.repo and "://" not in job.repo
    secrets = job.environment_file
    return _SERVICE.format(
        name=job.name,
        mounts=f"RequiresMountsFor={_quoted(job.repo)}\n" if local else "",
        command=" ".join(_quoted(word).replace("$", "$$") for word in command),
        environment=f"EnvironmentFile={_escaped(secrets)}\n" if secrets else "",
        timeout=_escaped(job.timeout),
        nice=job.nice,
        io=job.io,
        cpu_weight=job.cpu_weight,
    )


def install_units(job: Job) -> bool:
    """Write both and let the timer run; False when no systemd runs that could."""
    folder = unit_folder()
    replace_file(folder / unit_name(job.name, "service"), service_text(job).encode())
    replace_file(folder / unit_name(job.name, "timer"), timer_text(job).encode())
    if not systemd_runs():
        return False
    run(["systemctl", "daemon-reload"], timeout_seconds=120)
    timer = unit_name(job.name, "timer")
    run(["systemctl", "enable", timer], timeout_seconds=120)
    run(["systemctl", "restart", timer], timeout_seconds=120)  # it may run with another calendar
    return True


def remove_units(job: str) -> None:
    """Stop the timer and remove both; a capture that is running ends by itself."""
    timer = unit_name(job, "timer")
    files = [unit_folder() / unit_name(job, kind) for kind in ("timer", "service")]
    if systemd_runs() and any(file.exists() for file in files):
        run(["systemctl", "disable", "--now", timer], accept=(0, 1), timeout_seconds=120)
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise ImagerError(f"{file} cannot be removed: {error.strerror}") from None
    if systemd_runs():
        run(["systemctl", "daemon-reload"], timeout_seconds=120)


def systemd_runs() -> bool:
    """Whether it would see these units."""
    return _RUNS.is_dir() and unit_folder() == _SYSTEM_UNITS


def _escaped(text: str) -> str:
    """One line, and no specifiers (systemd.unit(5))."""
    if not text.isprintable():
        raise UsageError(f"{text!r} cannot be written into a unit")
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """One word of a command line or of a list of paths (systemd.syntax(7), "Quoting")."""
    plain = _escaped(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain}"'
