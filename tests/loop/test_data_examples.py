"""The documents' examples of servers with data, with the servers themselves: private instances in
a scratch folder, on sockets there."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imager.process import run
from tests.support.commandline import CHECKOUT, imager
from tests.support.disks import MIB, make_filesystem, make_sparse, needs_loop

pytestmark = needs_loop

EXAMPLES = CHECKOUT / "docs/examples"
SECONDS = 120.0
"""For a server to start on a loaded machine."""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Servers run as users of their own, whom pytest's folders don't let in."""
    with tempfile.TemporaryDirectory(prefix="imager-example-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def configure(
    example: str, scratch: Path, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example's own configuration, at other places."""
    text = (EXAMPLES / example / "imager.toml").read_text()
    for old, new in places.items():
        assert old in text, f"{old} is not in the example {example}"
        text = text.replace(f'"{old}', f'"{new}')
    config = scratch / "imager.toml"
    config.write_text(text)
    monkeypatch.setenv("IMAGER_CONFIG", str(config))


def capture(scratch: Path) -> str:
    """A small disk stands for the server's; what matters here is beside it."""
    disk = make_sparse(scratch / "disk", 4 * MIB)
    make_filesystem(disk, "ext4")
    words = ("capture", disk, "--repo", scratch / "images", "--init", "--name", "server", "--data")
    document = imager(*words, "--json").json
    assert [item["error"] for item in document["data"]] == [None]
    return str(document["id"])


def bring_back(scratch: Path, image: str, code: int = 0) -> str:
    words = ("data", "restore", image, "--repo", scratch / "images", "--yes")
    done = imager(*words, code=code)
    return done.out + done.err


def wait_for(what: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"not after {SECONDS} s: {what}"
        time.sleep(0.1)


# --- PostgreSQL ---

(PROGRAMS,) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:] or [Path("/nonexistent")]


class Cluster:
    """Named by its socket's folder, so that no port is needed."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.data = scratch / "main"
        self._user = pwd.getpwnam("postgres")
        for folder in (self.data, scratch / "sockets"):
            folder.mkdir()
            os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        self.run("initdb", "--auth=trust", "--no-sync", "--pgdata", str(self.data))

    def run(self, name: str, *words: str) -> str:
        drop = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"]
        command = [*drop, str(PROGRAMS / name), *words]
        return run(command, timeout_seconds=SECONDS).stdout.decode()

    @contextmanager
    def running(self) -> Iterator[None]:
        options = f"-c listen_addresses= -c unix_socket_directories={self.scratch}/sockets"
        log = self.scratch / "sockets/log"
        start = ("-D", str(self.data), "-w", "-t", str(int(SECONDS)), "-l", str(log))
        self.run("pg_ctl", *start, "-o", options, "start")
        try:
            yield
        finally:
            self.run("pg_ctl", "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def sql(self, text: str) -> str:
        where = ("-h", f"{self.scratch}/sockets", "-U", "postgres", "-AtX")
        return self.run("psql", *where, "-v", "ON_ERROR_STOP=1", "-c", text).strip()


def test_postgresql(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(scratch)
    store, script = scratch / "store", scratch / "postgresql-data"
    store.mkdir()
    shutil.chown(store, "postgres", "postgres")
    shutil.copy(EXAMPLES / "postgresql/postgresql-data", script)
    places = {
        "/backup/postgresql": store,
        "/var/lib/postgresql/15/main": cluster.data,
        "/etc/imager/postgresql-data": script,
    }
    configure("postgresql", scratch, places, monkeypatch)
    monkeypatch.setenv("PGHOST", f"{scratch}/sockets")
    with cluster.running():
        cluster.sql("create table orders (id int primary key, text text)")
        cluster.sql("insert into orders select n, 'order ' || n from generate_series(1, 5000) n")
        image = capture(scratch)
        cluster.sql("delete from orders where id > 10")
        assert "stop it first" in bring_back(scratch, image, code=1)
    shutil.rmtree(cluster.data / "base")  # worse than a wrong statement
    bring_back(scratch, image)
    with cluster.running():
        assert cluster.sql("select count(*), max(text) from orders") == "5000|order 999"
