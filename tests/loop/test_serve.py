"""``imager serve`` and the clients that people use: libnbd's, QEMU's, with and without TLS."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.commandline import Outcome, finish, imager, start
from tests.support.disks import digest
from tests.support.nbdclient import NbdClient

pytestmark = pytest.mark.loop

MIB = 1 << 20
SIZE = 48 * MIB + 512


def make_disk(path: Path) -> None:
    """Data, text and holes, without a partition table."""
    chance = random.Random(5)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at in (0, 3, 4, 17, 46):
            file.seek(at * MIB + 12345)
            file.write(chance.randbytes(MIB) + b"imager " * 50_000)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A repository with an image ``web``, and the disk that it is of."""
    folder = tmp_path_factory.mktemp("serve")
    disk, repo = folder / "sda", folder / "repo"
    make_disk(disk)
    imager("repo", "init", "--repo", repo)
    imager("capture", disk, "--name", "web", "--repo", repo)
    return repo, disk


@contextmanager
def serving(repo: Path, *words: object) -> Iterator[tuple[subprocess.Popen[str], list[Any]]]:
    """A server that listens, and its exports; ended by Ctrl-C, which is a success."""
    process = start("serve", "web@latest", "--repo", repo, "--json", *words)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        assert lines, finish(process)
        yield process, json.loads("".join(lines))["exports"]
        process.send_signal(signal.SIGINT)
        assert finish(process).code == 0
    finally:
        process.kill()
        process.wait()


def tool(*words: object, code: int = 0) -> Outcome:
    done = subprocess.run(
        [*map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_libnbd_and_qemu_read_what_was_imaged(image: tuple[Path, Path], tmp_path: Path) -> None:
    repo, disk = image
    with serving(repo, "--socket", tmp_path / "nbd") as (_, exports):
        (export,) = exports
        assert (export["name"], export["size"]) == ("sda", SIZE)
        uri = export["uri"]
        (known,) = tool("nbdinfo", "--json", uri).json["exports"]
        assert known["is_read_only"] and known["can_multi_conn"]
        assert (known["block_size_minimum"], known["block_size_maximum"]) == (1, 32 * MIB)
        extents = tool("nbdinfo", "--map", "--json", uri).json
        assert sum(extent["length"] for extent in extents) == SIZE
        assert {extent["type"] for extent in extents} == {0, 3}

        tool("nbdcopy", uri, tmp_path / "copy")
        assert digest(tmp_path / "copy") == digest(disk)
        assert (tmp_path / "copy").stat().st_blocks * 512 < SIZE // 2

        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, disk)
        ranges = tool("qemu-img", "map", "--output=json", "-f", "raw", uri).json
        assert not all(found["data"] for found in ranges)

        overlay = tmp_path / "overlay"
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, overlay)
        tool(
            *("qemu-io", "-c", "write -P 7 1M 4k", "-c", "read -P 7 1M 4k"),
            *("-c", "read -P 0 8M 1M", overlay),
        )
        refused = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 4k", uri], capture_output=True, check=False
        )
        assert refused.returncode or b"ermitted" in refused.stdout + refused.stderr
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, disk)


def test_a_client_that_is_killed_takes_nothing_along(
    image: tuple[Path, Path], tmp_path: Path
) -> None:
    repo, disk = image
    with serving(repo, "--socket", tmp_path / "nbd") as (_, (export,)):
        for _ in range(3):
            with subprocess.Popen(
                ["nbdcopy", export["uri"], "-"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
            ) as client:
                assert client.stdout is not None
                client.stdout.read(MIB)  # it is in the middle
                client.kill()
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", export["uri"], disk)


def test_without_open_files_it_waits_and_does_not_spin(
    image: tuple[Path, Path], tmp_path: Path
) -> None:
    with serving(image[0], "--socket", tmp_path / "nbd") as (process, _):
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(tmp_path / "nbd"))
            used = cpu_seconds(process.pid)
            time.sleep(1)
            assert cpu_seconds(process.pid) - used < 0.5
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
            waiting.settimeout(60)
            assert waiting.recv(8) == b"NBDMAGIC"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As libnbd and QEMU want them: an authority, a server and a client; and a stranger's."""
    folder = tmp_path_factory.mktemp("pki")
    for authority, names in (("ca", ("server", "client")), ("other-ca", ("stranger",))):
        make_key(folder, authority)
        tool(
            *("openssl", "req", "-x509", "-new", "-key", folder / f"{authority}-key.pem"),
            *("-subj", f"/CN={authority}", "-days", 30, "-out", folder / f"{authority}-cert.pem"),
        )
        for name in names:
            make_key(folder, name)
            request, extra = folder / f"{name}.csr", folder / f"{name}.ext"
            extra.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
            tool(
                *("openssl", "req", "-new", "-key", folder / f"{name}-key.pem"),
                *("-subj", f"/CN={name}", "-out", request),
            )
            tool(
                *("openssl", "x509", "-req", "-in", request, "-days", 30, "-CAcreateserial"),
                *("-CA", folder / f"{authority}-cert.pem"),
                *("-CAkey", folder / f"{authority}-key.pem"),
                *("-extfile", extra, "-out", folder / f"{name}-cert.pem"),
            )
    return folder


def make_key(folder: Path, name: str) -> None:
    tool(
        "openssl",
        "ecparam",
        "-name",
        "prime256v1",
        "-genkey",
        "-noout",
        "-out",
        folder / f"{name}-key.pem",
    )


def identity(certificates: Path, folder: Path, name: str | None) -> Path:
    """A folder as libnbd's tls-certificates."""
    folder.mkdir()
    files = {"ca-cert.pem": "ca-cert.pem"}
    if name:
        files |= {f"client-{kind}.pem": f"{name}-{kind}.pem" for kind in ("cert", "key")}
    for there, here in files.items():
        (folder / there).write_bytes((certificates / here).read_bytes())
    return folder


def test_only_clients_with_a_certificate_come_in(
    image: tuple[Path, Path], certificates: Path, tmp_path: Path
) -> None:
    repo, disk = image
    with serving(
        repo,
        *("--listen", "127.0.0.1:0", "--tls-certificate", certificates / "server-cert.pem"),
        *("--tls-key", certificates / "server-key.pem"),
        *("--tls-clients", certificates / "ca-cert.pem"),
    ) as (_, (export,)):
        uri = export["uri"]
        assert uri.startswith("nbds://127.0.0.1:")
        own = identity(certificates, tmp_path / "own", "client")
        tool("nbdcopy", f"{uri}?tls-certificates={own}", tmp_path / "copy")
        assert digest(tmp_path / "copy") == digest(disk)

        stranger = identity(certificates, tmp_path / "stranger", "stranger")
        nobody = identity(certificates, tmp_path / "nobody", None)
        for folder in (stranger, nobody):
            tool("nbdinfo", f"{uri}?tls-certificates={folder}", code=1)
        tool("nbdinfo", uri.replace("nbds://", "nbd://"), code=1)

        options = f"driver=nbd,host=127.0.0.1,port={uri.split(':')[2].split('/')[0]},export=sda"
        tool(
            *("qemu-img", "compare", "--object"),
            f"tls-creds-x509,id=tls,endpoint=client,dir={own}",
            *("--image-opts", f"{options},tls-creds=tls", f"driver=raw,file.filename={disk}"),
        )


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["web@latest", "--listen", "0.0.0.0:0"],
        ["web@latest", "--socket", "/tmp/x", "--listen", "127.0.0.1:0"],
        ["web@latest", "--all", "--listen", "127.0.0.1:0"],
        ["--listen", "127.0.0.1:0"],
        ["web@latest", "--tls-key", "/tmp/x"],
        ["web@latest", "--listen", "127.0.0.1:port"],
    ],
)
def test_contradictions(image: tuple[Path, Path], words: list[str]) -> None:
    imager("serve", *words, "--repo", image[0], code=2)


def test_all_images_by_their_ids(image: tuple[Path, Path], tmp_path: Path) -> None:
    repo, disk = image
    second = imager("capture", disk, "--name", "db", "--repo", repo, "--json").json
    try:
        process = start("serve", "--all", "--repo", repo, "--socket", tmp_path / "nbd")
        assert process.stdout is not None
        lines = list(iter(process.stdout.readline, "end with Ctrl-C\n"))
        assert len(lines) == 2 and f"/{second['image']}/sda?" in lines[0]
        with NbdClient(tmp_path / "nbd") as client:
            assert client.go(f"{second['image']}/sda").size == SIZE
            assert client.read(0, MIB) == disk.read_bytes()[:MIB]
        process.send_signal(signal.SIGTERM)
        assert finish(process).code == 0
    finally:
        process.kill()
        imager("rm", second["image"], "--yes", "--repo", repo)
