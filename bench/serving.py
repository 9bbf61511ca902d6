"""The NBD server against qemu-nbd on a zstd-compressed qcow2 of the same disk, in turn, in one run.

    python -m bench serving DISK [--rounds 3] [--work DIR]

Sequential: ``nbdcopy URI null:`` per CPU second of the server, beside what zstd alone and zstd with
BLAKE3 reach on the same blocks in one thread. Random: 4 KiB reads one after the other by a client
in Python, at places of the used part; cold is the first round, warm the second one of 2000 places.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard
from blake3 import blake3

from imager.repository import Repository
from tests.support.nbdclient import NbdClient

_TICKS = os.sysconf("SC_CLK_TCK")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench serving")
    parser.add_argument("disk", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        measure(options.disk, Path(folder), options.rounds)


def measure(disk: Path, folder: Path, rounds: int) -> None:
    repo, qcow2 = folder / "repo", folder / "disk.qcow2"
    imager = [sys.executable, "-m", "imager"]
    subprocess.run([*imager, "repo", "init", "--repo", repo], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [*imager, "capture", disk, "--name", "bench", "--repo", repo],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    # The image, not the disk: stale data in free space is in neither then.
    export = [*imager, "export", "bench@latest", folder / "disk.raw", "--repo", repo]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    packing = ["-c", "-O", "qcow2", "-o", "compression_type=zstd"]
    subprocess.run(["qemu-img", "convert", *packing, folder / "disk.raw", qcow2], check=True)
    socket = folder / "nbd"
    servers = {
        "imager": [*imager, "serve", "bench@latest", "--repo", repo, "--socket", socket],
        "qemu-nbd": ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "qcow2", "-k", socket, qcow2],
    }
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(rounds):
        alone, hashed, size = rates(repo)
        print(f"zstd alone {alone:.0f} MB/s, with BLAKE3 {hashed:.0f} MB/s per CPU second")
        for name, command in servers.items():
            with running(command, socket) as pid:
                before = cpu_seconds(pid)
                started = time.monotonic()
                uri = f"nbd+unix:///?socket={socket}"
                subprocess.run(["nbdcopy", uri, "null:"], check=True)
                took, used = time.monotonic() - started, cpu_seconds(pid) - before
                seconds[name].append(took)
                rate = size / used / 1e6
                cold, warm = random_reads(socket, disk.stat().st_size, number)
                print(
                    f"{name}: sequential {size / took / 1e6:.0f} MB/s, {rate:.0f} per CPU second "
                    f"({rate / alone:.2f} of zstd); random 4 KiB cold {cold:.0f}/s, "
                    f"warm {warm:.0f}/s; memory {peak_mib(pid)} MiB"
                )
    ours, theirs = (statistics.median(found) for found in seconds.values())
    print(f"sequential, median: {theirs / ours:.2f} times qemu-nbd")


def rates(repo: Path) -> tuple[float, float, int]:
    """MB of content per CPU second, of zstd and with the digest; and the bytes of all blocks."""
    repository = Repository.open(str(repo))
    disk = repository.find("bench@latest").disks[0]
    frames, size = [], 0
    for run in repository.block_map(disk).runs():
        if run.place is None:
            continue
        pack = repository.pack(run.place.pack)
        size += pack.entries[run.place.ordinal].content_length
        if len(frames) < 1500:
            raw = pack.read(run.place.ordinal, 1)
            frames.append(bytes(pack.frame(raw, run.place.ordinal, run.place.ordinal)))
    decompressor = zstandard.ZstdDecompressor()
    started = time.process_time()
    done = sum(len(decompressor.decompress(frame)) for frame in frames)
    between = time.process_time()
    for frame in frames:
        blake3(decompressor.decompress(frame)).digest()
    ended = time.process_time()
    return done / (between - started) / 1e6, done / (ended - between) / 1e6, size


@contextmanager
def running(command: list[object], socket: Path) -> Iterator[int]:
    socket.unlink(missing_ok=True)
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def random_reads(socket: Path, size: int, seed: int) -> tuple[float, float]:
    """Reads a second, of places never read before, and then the same again."""
    places = [n * 4096 for n in random.Random(seed).sample(range(size // 4096), 2000)]
    found = []
    with NbdClient(socket) as client:
        client.go("")
        for _ in range(2):
            started = time.monotonic()
            for place in places:
                client.read(place, 4096)
            found.append(len(places) / (time.monotonic() - started))
    return found[0], found[1]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def peak_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) >> 10
