"""The service that tracks a disk, as a unit of systemd."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from imager.errors import UsageError
from imager.jobs import replace_file
from imager.process import run
from imager.systemdunits import systemd_runs, unit_folder

_UNIT = """\
# Written by imager track start, which writes it anew.
[Unit]
Description=Tracking of writes to {disk}
DefaultDependencies=no
After=systemd-udevd.service local-fs.target
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=notify
ExecStart="{python}" -m imager track start --foreground {disk}
Restart=on-failure
RestartSec=5
UMask=0077
LockPersonality=true
RestrictRealtime=true
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""

_PATH = re.compile(r"/[A-Za-z0-9/_.:+-]+")


def track_unit(disk: str) -> str:
    """Its name. Raises UsageError for a path that no device has."""
    if not _PATH.fullmatch(disk):
        raise UsageError(f"{disk}: name the disk as in /dev, or below /dev/disk/by-id")
    return f"imager-track-{disk.strip('/').replace('/', '-')}.service"


def track_unit_text(disk: str) -> str:
    track_unit(disk)
    return _UNIT.format(disk=disk, python=re.sub(r'(["\\])', r"\\\1", sys.executable))


def install_track_unit(disk: str) -> bool:
    """Write it and have it run now and after each start; False when no systemd runs that could."""
    replace_file(unit_folder() / track_unit(disk), track_unit_text(disk).encode())
    if not systemd_runs():
        return False
    run(["systemctl", "daemon-reload"], timeout_seconds=120)
    run(["systemctl", "enable", track_unit(disk)], timeout_seconds=120)
    run(["systemctl", "restart", track_unit(disk)], timeout_seconds=120)
    return True


def remove_track_unit(disk: str) -> bool:
    """Whether there was one."""
    file = unit_folder() / track_unit(disk)
    if not file.exists():
        return False
    if systemd_runs():
        run(["systemctl", "disable", "--now", file.name], accept=(0, 1), timeout_seconds=120)
    Path(file).unlink(missing_ok=True)
    if systemd_runs():
        run(["systemctl", "daemon-reload"], timeout_seconds=120)
    return True
