"""Side by side: imager against the usual tools, on one real Debian filesystem, in one run.

    python -m bench.compare [--rounds 3] [--only capture,restore,…] [--work DIR]

The disk is `tests.machines.debian_disk`'s server profile: 16 GiB, some 4 GB used, 1 GB of that
incompressible, 1.5 GB of stale data in free space. Its root filesystem is cut out into a sparse raw
file that every tool reads, so that all do the same work. The page cache is warm, every command
includes what it needs to put its output on stable storage (`sync FILE`), and the tools take turns.
Quote the ratios: absolute times hold for one machine only.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from imager.blocksource import FileSource
from imager.loopdevice import loop_device
from imager.partitions import read_partition_table
from tests.machines.debian_disk import debian_disk

GIB = 1 << 30
CHANGED_BYTES = 200_000_000


@dataclass
class Run:
    """One timed command: seconds, CPU seconds, peak MiB of its largest process."""

    wall: float
    cpu: float
    peak: float


@dataclass
class Row:
    phase: str
    tool: str
    runs: list[Run] = field(default_factory=list)
    size: int | None = None

    def median(self, name: str) -> float:
        return statistics.median(getattr(run, name) for run in self.runs)


def timed(command: str) -> Run:
    """Run a shell line (pipes are part of what is compared) and account for all its processes.

    GNU time does the accounting: a child forked from this process would start with our memory.
    """
    with tempfile.NamedTemporaryFile() as report:
        timing = ["time", "-o", report.name, "-f", "%e %U %S %M"]
        result = subprocess.run(
            [*timing, "bash", "-o", "pipefail", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if result.returncode:
            said = result.stderr.decode()
            raise SystemExit(f"exit code {result.returncode} from: {command}\n{said}")
        wall, user, system, peak = map(float, Path(report.name).read_text().split())
    return Run(wall, user + system, peak / 1024)


class Bench:
    def __init__(self, work: Path, rounds: int) -> None:
        self.work = work
        self.rounds = rounds
        self.rows: dict[tuple[str, str], Row] = {}
        self.source = work / "root.img"
        self.imager = f"{shlex.quote(sys.executable)} -m imager"

    def compare(self, phase: str, tools: dict[str, Callable[[], Run]]) -> None:
        """Let the tools take turns, ``rounds`` times."""
        for _ in range(self.rounds):
            for tool, run in tools.items():
                row = self.rows.setdefault((phase, tool), Row(phase, tool))
                row.runs.append(run())
                last = row.runs[-1]
                print(f"  {phase:<10} {tool:<44} {last.wall:7.2f} s {last.cpu:7.2f} CPU s")

    def size(self, phase: str, tool: str, size: int) -> None:
        self.rows[phase, tool].size = size

    # --- the source ---

    def make_source(self) -> None:
        """The root filesystem of the server disk, as a sparse raw file of its own."""
        if self.source.exists():
            return
        disk = debian_disk(size_bytes=16 * GIB, profile="server")
        with FileSource(str(disk)) as source:
            root = max(read_partition_table(source).partitions, key=lambda part: part.size)
            part = self.source.with_suffix(".part")
            with part.open("wb") as out:
                out.truncate(root.size)
                for extent in source.data_extents().within(root.offset, root.size):
                    for at in range(extent.offset, extent.end, 4 << 20):
                        content = source.pread(at, min(4 << 20, extent.end - at))
                        out.seek(at - root.offset)
                        out.write(content)
        part.rename(self.source)

    def warm(self, *paths: Path) -> None:
        """Have files in the page cache."""
        timed(f"cat {' '.join(map(str, paths))} > /dev/null")

    # --- phases ---

    def capture(self) -> None:
        src, work = self.source, self.work
        image, raw, qcow = work / "partclone.zst", work / "dd.zst", work / "qemu.qcow2"

        def ours(repo: str, options: str, block: str) -> Callable[[], Run]:
            def run() -> Run:
                shutil.rmtree(work / repo, ignore_errors=True)
                block_size = f"--block-size {block}" if block else ""
                timed(f"{self.imager} repo init --repo {work / repo} {block_size}")
                return timed(f"{self.imager} capture {src} --repo {work / repo} {options}")

            return run

        tools = {
            "partclone.ext4 -c | zstd -3 -T0": lambda: timed(
                f"partclone.ext4 -c -s {src} -o - -L {work}/log | zstd -3 -T0 -q -f -o {image}"
                f" && sync {image}"
            ),
            "dd | zstd -3 -T0": lambda: timed(
                f"dd if={src} bs=4M status=none | zstd -3 -T0 -q -f -o {raw} && sync {raw}"
            ),
            "qemu-img convert -c (zstd)": lambda: timed(
                f"qemu-img convert -W -m 8 -c -O qcow2 -o compression_type=zstd {src} {qcow}"
                f" && sync {qcow}"
            ),
            "imager --level 3, blocks of 1 MiB": ours("level3", "--level 3", "1M"),
            "imager": ours("default", "", ""),
        }
        self.compare("capture", tools)
        for tool, path in zip(tools, (image, raw, qcow), strict=False):
            self.size("capture", tool, path.stat().st_size)
        for tool, repo in (
            ("imager --level 3, blocks of 1 MiB", "level3"),
            ("imager", "default"),
        ):
            self.size("capture", tool, _folder_size(work / repo))

    def verify(self) -> None:
        work = self.work
        plain = work / "partclone.img"
        timed(f"zstd -d -q -f {work}/partclone.zst -o {plain}")
        self.compare(
            "verify",
            {
                "partclone.chkimg": lambda: timed(f"partclone.chkimg -s {plain} -L {work}/log"),
                "imager": lambda: timed(f"{self.imager} verify --repo {work}/default"),
            },
        )
        plain.unlink()

    def restore(self) -> None:
        src, work = self.source, self.work
        target = work / "target.img"
        size = src.stat().st_size

        def fresh(command: str) -> Callable[[], Run]:
            def run() -> Run:
                target.unlink(missing_ok=True)
                timed("sync")
                return timed(f"{command} && sync {target}")

            return run

        image = f"{work}/default"
        self.compare(
            "restore",
            {
                "zstd -d | partclone.ext4 -r": fresh(
                    f"truncate -s {size} {target} && zstd -dc -q {work}/partclone.zst"
                    f" | partclone.ext4 -r -s - -O {target} -L {work}/log"
                ),
                "qemu-img convert": fresh(
                    f"qemu-img convert -W -m 8 -O raw {work}/qemu.qcow2 {target}"
                ),
                "cp --sparse=always": fresh(f"cp --sparse=always {src} {target}"),
                "imager": fresh(f"{self.imager} restore root@latest {target} --yes --repo {image}"),
            },
        )
        target.unlink()

    def second(self) -> None:
        """About 200 MB of files changed and added, then captured again."""
        work = self.work
        before, changed = work / "before.img", work / "changed.img"
        timed(f"cp --reflink=auto --sparse=always {self.source} {before}")
        timed(f"cp --sparse=always {before} {changed}")
        _change_files(changed)
        os.environ["BORG_REPO"] = f"{work}/borg"
        os.environ["BORG_BASE_DIR"] = f"{work}/borg-home"
        os.environ["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"
        options = "--read-special --chunker-params fixed,262144 --compression zstd,3"
        growth: dict[str, list[int]] = {"borg": [], "imager": []}

        def borg() -> Run:
            for path in (work / "borg", work / "borg-home"):
                shutil.rmtree(path, ignore_errors=True)
            timed(f"borg init -e none && borg create {options} ::a {before}")
            size = _folder_size(work / "borg")
            self.warm(changed)
            run = timed(f"borg create {options} ::b {changed}")
            growth["borg"].append(_folder_size(work / "borg") - size)
            return run

        def ours() -> Run:
            shutil.rmtree(work / "second", ignore_errors=True)
            timed(f"{self.imager} capture {before} --repo {work}/second --init --name x")
            size = _folder_size(work / "second")
            self.warm(changed)
            run = timed(f"{self.imager} capture {changed} --repo {work}/second --name x")
            growth["imager"].append(_folder_size(work / "second") - size)
            return run

        tools = {f"borg create, {options[15:]}": borg, "imager": ours}
        self.compare("second", tools)
        for tool, sizes in zip(tools, growth.values(), strict=True):
            self.size("second", tool, int(statistics.median(sizes)))
        for path in (before, changed):
            path.unlink()

    def limits(self) -> None:
        """An empty 1 TiB file, 16 GiB of real zeros behind a block device, and start-up."""
        work = self.work
        sparse = work / "sparse.img"
        with sparse.open("wb") as file:
            file.truncate(1 << 40)
        zeros = work / "zeros.img"
        with zeros.open("wb") as file:
            file.truncate(16 * GIB)

        def capture(path: str, name: str) -> Callable[[], Run]:
            def run() -> Run:
                shutil.rmtree(work / "limits", ignore_errors=True)
                return timed(
                    f"{self.imager} capture {path} --repo {work}/limits --init --name {name}"
                )

            return run

        with loop_device(str(zeros), read_only=True) as device:
            self.compare(
                "limits",
                {
                    "imager: an empty sparse file of 1 TiB": capture(str(sparse), "sparse"),
                    "imager: a 16 GiB device of zeros": capture(device, "zeros"),
                    "imager --help": lambda: timed(f"{self.imager} --help"),
                },
            )
        sparse.unlink()
        zeros.unlink()

    # --- the table ---

    def print_table(self) -> None:
        print()
        print("| phase | tool | wall s | CPU s | peak MiB | size MB |")
        print("|---|---|---:|---:|---:|---:|")
        for row in self.rows.values():
            size = f"{row.size / 1e6:.0f}" if row.size is not None else ""
            print(
                f"| {row.phase} | {row.tool} | {row.median('wall'):.2f} | "
                f"{row.median('cpu'):.2f} | {row.median('peak'):.0f} | {size} |"
            )
        self._print_ratios()

    def _print_ratios(self) -> None:
        print("\nratios (median of ours / median of theirs):")
        for (phase, tool), row in self.rows.items():
            if not tool.startswith("imager"):
                continue
            for (other_phase, other), base in self.rows.items():
                if phase == other_phase and not other.startswith("imager"):
                    wall = row.median("wall") / base.median("wall")
                    cpu = row.median("cpu") / base.median("cpu")
                    size = f", size {row.size / base.size:.3f}" if row.size and base.size else ""
                    print(f"  {phase}: {tool} / {other}: wall {wall:.2f}, CPU {cpu:.2f}{size}")


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _change_files(image: Path) -> None:
    """As an upgrade does: half of it new incompressible files, half existing files rewritten."""
    rng = random.Random(7)
    with tempfile.TemporaryDirectory() as folder, loop_device(str(image)) as device:
        subprocess.run(["mount", device, folder], check=True)
        try:
            root = Path(folder)
            left = CHANGED_BYTES // 2
            (root / "changed").mkdir()
            while left > 0:
                size = min(left, rng.randrange(20_000, 4_000_000))
                (root / "changed" / f"{left}.bin").write_bytes(rng.randbytes(size))
                left -= size
            files = sorted(
                path
                for path in (root / "usr/lib").rglob("*")
                if path.is_file() and not path.is_symlink() and path.stat().st_size > 300_000
            )
            rng.shuffle(files)
            left = CHANGED_BYTES // 2
            for path in files:
                if left <= 0:
                    break
                content = path.read_bytes()[:8_000_000]
                path.unlink()
                path.write_bytes(content[1:] + content[:1])
                left -= len(content)
            os.sync()
        finally:
            subprocess.run(["umount", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="capture,verify,restore,second,limits")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/imager-bench"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.work, arguments.rounds)
    bench.make_source()
    bench.warm(bench.source)
    with Path("/proc/cpuinfo").open() as info:
        model = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    print(f"{model}, {os.cpu_count()} cores; {resource.getpagesize()} byte pages")
    for phase in arguments.only.split(","):
        getattr(bench, phase)()
    bench.print_table()


if __name__ == "__main__":
    main()
