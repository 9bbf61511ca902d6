"""A job's timer runs for real: in a Debian machine, under its systemd."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.machines.debian_disk import BOOT_MARKER, debian_disk
from tests.machines.qemu import BOOT_SECONDS, Disk, Machine
from tests.machines.toolbox import ENTER, FOLDER, IMAGER, make_toolbox

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(6 * BOOT_SECONDS),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: builds a disk"),
]

RUN_SECONDS = 300


def test_the_timer_runs(tmp_path: Path) -> None:
    toolbox = Disk(make_toolbox(tmp_path / "toolbox.img"), serial="toolbox", keep=True)
    with Machine(disks=[Disk(debian_disk(), serial="system"), toolbox]) as machine:
        machine.expect(BOOT_MARKER, timeout_seconds=2 * BOOT_SECONDS)
        machine.log_in(timeout_seconds=BOOT_SECONDS)

        def run(command: str) -> str:
            return machine.run(command, timeout_seconds=RUN_SECONDS)

        run(ENTER)
        run("printf '[metrics]\\ntextfile = \"/run/imager.prom\"\\n' > /root/imager.toml")
        run("mkdir -p /etc/imager && mv /root/imager.toml /etc/imager/imager.toml")
        run(f"{IMAGER} repo init --repo {FOLDER}/images")
        words = "/dev/vda1 --name web1 --calendar minutely --keep-last 2 --io best-effort"
        said = run(f"{IMAGER} schedule add often {words} --repo {FOLDER}/images")
        assert "next run: 2" in said, said
        assert run("systemctl is-enabled imager-often.timer") == "enabled\n"
        verified = run(
            "systemd-analyze verify --man=no /etc/systemd/system/imager-often.*; echo $?"
        )
        assert verified == "0\n"

        deadline = time.monotonic() + 2 * RUN_SECONDS
        manifests = f"ls {FOLDER}/images/manifests 2>/dev/null | wc -l"
        record = 'grep -c \'"result": "good"\' /var/lib/imager/jobs/often.json'
        while int(run(f"{record} || true").split()[0]) < 1:
            assert time.monotonic() < deadline, run("journalctl -u imager-often --no-pager | tail")
            time.sleep(3)
        run("systemctl stop imager-often.timer")
        run("while systemctl is-active -q imager-often.service; do sleep 1; done")
        assert int(run(manifests)) >= 1
        (job,) = json.loads(run(f"{IMAGER} status --json"))["jobs"]
        assert (job["result"], job["problems"]) == ("good", []), job
        assert 'imager_job_success{image_job="often",name="web1"} 1' in run("cat /run/imager.prom")
        shown = run("systemctl show imager-often.service -p Result -p Nice -p IOSchedulingClass")
        assert sorted(shown.split()) == ["IOSchedulingClass=2", "Nice=10", "Result=success"]
        run(f"{IMAGER} schedule remove often")
        assert run("systemctl list-unit-files 'imager-*' --no-legend") == ""
