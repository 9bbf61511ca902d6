"""Captures of a mounted disk: imager with and without `track`, restic and borg on the same device;
and how long filesystems wait while fio writes at full rate.

    python -m bench tracking [--size GIB] [--used MB] [--changed MB] [--freezes N] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imager.loopdevice import loop_device
from imager.process import run

IMAGER = f"{shlex.quote(sys.executable)} -m imager"
MB = 1_000_000


def shell(line: str) -> float:
    """Seconds that it took."""
    started = time.perf_counter()
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} from: {line}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


@contextmanager
def mounted_disk(work: Path, size: int) -> Iterator[tuple[str, Path]]:
    image, folder = work / "disk.img", work / "mounted"
    with image.open("wb") as file:
        file.truncate(size)
    folder.mkdir()
    with loop_device(str(image)) as device:
        run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device])
        run(["mount", "-o", "noatime", device, str(folder)])
        try:
            yield device, folder
        finally:
            run(["umount", str(folder)])


def fill(folder: Path, amount: int, name: str) -> None:
    """Files of 1 MB that compress by half."""
    (folder / name).mkdir()
    for n in range(amount // MB):
        (folder / name / str(n)).write_bytes(os.urandom(MB // 2) + b"imager " * (MB // 14))
    run(["sync", "-f", str(folder)])


def capture(device: str, repo: Path) -> tuple[float, dict[str, object]]:
    line = f"{IMAGER} capture {device} --name bench --consistency track --no-data --json"
    started = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", f"{line} --repo {repo}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started, json.loads(done.stdout)


def side_by_side(work: Path, device: str, folder: Path, used: int, changed: int) -> None:
    repo, tracked = work / "imager", work / "tracked"
    for each in (repo, tracked):
        shell(f"{IMAGER} repo init --repo {each}")
    shell(f"RESTIC_PASSWORD=x restic init -q -r {work}/restic && borg init -e none {work}/borg")
    restic = f"RESTIC_PASSWORD=x restic -q -r {work}/restic backup --stdin < {device}"
    borg = f"borg create --read-special --noflags {work}/borg::$(date +%s%N) {device}"
    fill(folder, used, "used")
    print(f"first: imager {capture(device, repo)[0]:.1f} s", end=", ", flush=True)
    print(f"restic {shell(restic):.1f} s, borg {shell(borg):.1f} s", flush=True)
    fill(folder, changed, "changed")
    seconds, document = capture(device, repo)
    print(f"second: imager {seconds:.1f} s", end=", ", flush=True)
    print(f"restic {shell(restic):.1f} s, borg {shell(borg):.1f} s", flush=True)
    service = subprocess.Popen(
        [sys.executable, "-m", "imager", "track", "start", "--foreground", device]
    )
    try:
        while subprocess.run(
            ["bash", "-c", f"{IMAGER} track status {device}"], capture_output=True, check=False
        ).returncode:
            time.sleep(0.1)
        capture(device, tracked)
        for n in range(3):
            fill(folder, changed, f"tracked-{n}")
            seconds, document = capture(device, tracked)
            read = document["statistics"]["read_bytes"]  # type: ignore[index]
            print(f"with track: {seconds:.1f} s, {read / changed:.2f} of what was written read")
    finally:
        shell(f"{IMAGER} track stop {device}")
        service.wait()


def freezes(work: Path, device: str, folder: Path, count: int) -> None:
    """While fio writes 4 KiB and 1 MiB pieces at full rate."""
    repo = work / "freezes"
    shell(f"{IMAGER} repo init --repo {repo}")
    fio = subprocess.Popen(
        [
            "fio",
            "--name=load",
            f"--directory={folder}",
            "--rw=randwrite",
            "--bsrange=4k-1m",
            "--size=64m",
            "--numjobs=2",
            "--fsync=32",
            "--time_based",
            "--runtime=24h",
        ],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        found = []
        for _ in range(count):
            document = capture(device, repo)[1]
            found.append(document["tracked"]["freeze_milliseconds"])  # type: ignore[index]
    finally:
        fio.terminate()
        fio.wait()
    found.sort()
    print(
        f"{count} captures under fio, frozen for ms: median {statistics.median(found):.0f}, "
        f"99% {found[int(0.99 * (count - 1))]}, most {found[-1]}"
    )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench tracking")
    parser.add_argument("--size", type=int, default=16, help="GiB")
    parser.add_argument("--used", type=int, default=4000, help="MB")
    parser.add_argument("--changed", type=int, default=200, help="MB")
    parser.add_argument("--freezes", type=int, default=40)
    parser.add_argument("--work", type=Path, default=None)
    chosen = parser.parse_args(words)
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        work = Path(folder)
        with mounted_disk(work, chosen.size << 30) as (device, mounted):
            side_by_side(work, device, mounted, chosen.used * MB, chosen.changed * MB)
            freezes(work, device, mounted, chosen.freezes)


if __name__ == "__main__":
    main()
