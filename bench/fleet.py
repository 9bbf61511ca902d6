"""`python -m bench fleet`: a made-up repository of many images of many hosts, and what that costs.

Each image has a manifest as a capture writes it, a map pack with its page, and a data pack with the
blocks that changed; the rest it shares with the images before. It is not meant to be restored.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from imager.format import (
    PackHeader,
    PackKind,
    Page,
    Place,
    RecordKind,
    State,
    Trailer,
    digest_of,
    encode_record_header,
    encode_table,
    root_digest,
    seal,
    table_digest,
)
from imager.manifest import new_document
from imager.pack import Encoder, Record, pack_name
from imager.repository import Repository

BLOCK = 64 << 10
BLOCKS = 64
CHANGED = 4
NEWEST = datetime(2026, 11, 25, tzinfo=UTC)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench fleet", description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--hosts", type=int, default=100)
    parser.add_argument("--folder", help="where the repository is made; as large as 2 GB")
    options = parser.parse_args(arguments)
    for images in (options.images // 10, options.images):
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="fleet-") as folder:
            measure(Path(folder), images, options.hosts)


def measure(folder: Path, images: int, hosts: int) -> None:
    started = time.monotonic()
    repo = folder / "repo"
    make_repository(repo, images, hosts)
    print(f"\n{images} images of {hosts} hosts, made in {time.monotonic() - started:.0f} s")
    environment = {**os.environ, "IMAGER_CACHE_DIR": str(folder / "cache")}
    keep = ("--keep-last=10", "--keep-daily=30", "--keep-weekly=8", "--keep-monthly=24")
    print(f"{'':<34} {'wall s':>8} {'CPU s':>8} {'MiB':>6}")
    for label, words in (
        ("list, the first time", ["list"]),
        ("list", ["list"]),
        ("list of one name", ["list", "--name", "host7"]),
        ("list --json", ["list", "--json"]),
        ("prune --dry-run", ["prune", *keep, "--dry-run"]),
        ("gc --dry-run", ["gc", "--dry-run"]),
        ("gc --compact --dry-run", ["gc", "--compact", "--dry-run"]),
    ):
        wall, cpu, peak = timed([*words, "--repo", str(repo)], environment)
        print(f"{label:<34} {wall:8.2f} {cpu:8.2f} {peak:6.0f}", flush=True)


_MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
sys.exit(code)
"""


def timed(words: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Wall and CPU seconds of a command, and its peak memory in MiB."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, sys.executable, "-m", "imager", *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    cpu, peak = map(float, done.stdout.split())
    return time.monotonic() - started, cpu, peak


def make_repository(folder: Path, images: int, hosts: int) -> None:
    repository = Repository.create(str(folder), block_size=BLOCK)
    maker = _Maker(repository, random.Random(1))
    (folder / "manifests").mkdir()
    for n in range(256):
        (folder / "packs" / f"{n:02x}").mkdir(parents=True)
    for number in range(images):
        age = timedelta(minutes=10) * (images - number) / hosts
        maker.add(f"host{number % hosts}", NEWEST - age, number)


class _Maker:
    """Adds images, each with a few blocks that the one before of its host had not."""

    def __init__(self, repository: Repository, source: random.Random) -> None:
        self._repository = repository
        self._folder = Path(repository.store.url)
        self._source = source
        self._encoder = Encoder(1, BLOCK)
        self._disks: dict[str, list[tuple[bytes, Place]]] = {}

    def add(self, host: str, created: datetime, number: int) -> None:
        blocks = self._disks.get(host)
        changed = range(BLOCKS) if blocks is None else self._source.sample(range(BLOCKS), CHANGED)
        new = [self._source.randbytes(32) for _ in changed]
        records = [self._record(RecordKind.BLOCK, content) for content in new]
        places = self._pack(PackKind.DATA, records)
        blocks = blocks or [(b"", places[0])] * BLOCKS
        for at, record, place in zip(changed, records, places, strict=True):
            blocks[at] = record.entry.digest, place
        self._disks[host] = blocks
        page = Page(
            0,
            bytes([State.DATA]) * BLOCKS,
            tuple(digest for digest, _ in blocks),
            tuple(place for _, place in blocks),
        )
        (top,) = self._pack(PackKind.MAP, [self._record(RecordKind.PAGE, page.encode())])
        image_id = f"{created:%Y%m%dt%H%M%Sz}-{number:08x}"
        document = self._manifest(image_id, host, f"{created:%Y-%m-%dT%H:%M:%SZ}", page, top)
        (self._folder / f"manifests/{image_id}.json").write_bytes(seal(document))

    def _record(self, kind: RecordKind, content: bytes) -> Record:
        return self._encoder.encode(kind, digest_of(content), content)

    def _pack(self, kind: PackKind, records: list[Record]) -> list[Place]:
        pack_id = self._source.randbytes(16)
        header = PackHeader(kind, pack_id, 0).encode()
        body = b"".join(
            part
            for n, record in enumerate(records)
            for part in (encode_record_header(n, record.entry), record.frame)
        )
        table = encode_table([record.entry for record in records])
        offset = len(header) + len(body)
        trailer = Trailer(offset, len(records), table_digest(header, table)).encode()
        (self._folder / pack_name(pack_id)).write_bytes(header + body + table + trailer)
        return [Place(pack_id, n) for n in range(len(records))]

    def _manifest(
        self, image_id: str, host: str, created: str, page: Page, top: Place
    ) -> dict[str, Any]:
        size = BLOCKS * BLOCK
        root = root_digest(size, BLOCK, 0, page.content_digest()).hex()
        partitions = [
            {
                "number": n,
                "offset": n << 20,
                "size": 1 << 20,
                "used_bytes": 1 << 19,
                "certainty": "exact",
                "reason": None,
                "filesystem": {"kind": "ext4", "label": "root", "uuid": f"{n:032x}", "notes": []},
                "partition": {"number": n, "type": "linux", "name": "root", "flags": []},
            }
            for n in range(1, 4)
        ]
        disk = {
            "name": "sda",
            "path": "/dev/sda",
            "size": size,
            "logical_sector": 512,
            "physical_sector": 4096,
            "identity": {"model": "Samsung SSD 870", "serial": f"S{host}", "wwn": "0x5002538f"},
            "table": {"scheme": "gpt", "disk_id": "0" * 36, "partitions": [], "notes": []},
            "partitions": partitions,
            "unreadable": [],
            "height": 0,
            "top": {"pack": top.pack.hex(), "ordinal": top.ordinal},
            "root": root,
        }
        counts = ("read_bytes", "new_blocks", "known_blocks", "new_bytes", "milliseconds")
        return new_document(
            "image",
            id=image_id,
            name=host,
            host=host,
            note="",
            tool="imager 0.1.0",
            created=created,
            finished=created,
            previous=None,
            repository=self._repository.id,
            block_size=BLOCK,
            consistency="frozen",
            all_blocks=False,
            partial=False,
            hardware={"vendor": "Example", "product": "Server", "cpu": "x86-64", "boot": "uefi"},
            warnings=[],
            disks=[disk],
            statistics={
                "disk_bytes": size,
                "used_bytes": size,
                "stored_bytes": CHANGED * BLOCK,
                **dict.fromkeys(counts, 4711),
            },
        )
