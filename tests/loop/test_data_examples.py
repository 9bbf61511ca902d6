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
from typing import Any

import pytest

from imager.errors import ToolError
from imager.process import follow, run
from tests.support.commandline import CHECKOUT, imager
from tests.support.disks import MIB, loop_disk, make_filesystem, make_sparse, needs_loop

pytestmark = needs_loop

EXAMPLES = CHECKOUT / "docs/examples"
SECONDS = 120.0
"""For a server to start on a loaded machine."""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Servers run as users of their own, whom pytest's folders don't let in."""
    options: dict[str, Any] = {"dir": "/var/tmp", "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(prefix="imager-example-", **options) as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def configure(
    example: str, scratch: Path, places: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example's own configuration, with other places and commands."""
    text = (EXAMPLES / example / "imager.toml").read_text()
    for old, new in places.items():
        assert old in text, f"{old} is not in the example {example}"
        text = text.replace(f'"{old}', f'"{new}')
    config = scratch / "imager.toml"
    config.write_text(text)
    monkeypatch.setenv("IMAGER_CONFIG", str(config))


def capture(scratch: Path, hooks: int = 0) -> str:
    """A small disk stands for the server's; what matters here is beside it."""
    disk = make_sparse(scratch / "disk", 4 * MIB)
    make_filesystem(disk, "ext4")
    with loop_disk(disk) as device:
        words = ("capture", device, "--repo", scratch / "images", "--init", "--name", "server")
        document = imager(*words, "--json").json
    assert [item["error"] for item in document["data"]] == [None]
    assert [item["error"] for item in document.get("hooks", [])] == [None] * hooks
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
    places: dict[str, object] = {
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


# --- mail ---

MESSAGE = b"From: a@example.test\nTo: anna@example.test\nSubject: hello %d\n\nDear Anna %d\n"


class MailServer:
    """Postfix takes mail by its ``sendmail`` and delivers it to a Maildir that Dovecot reads."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.mail = scratch / "mail"
        self._user = pwd.getpwnam("nobody")
        self.make_mail_folder()
        self._configure_postfix()
        self._configure_dovecot()

    def make_mail_folder(self) -> None:
        self.mail.mkdir()
        os.chown(self.mail, self._user.pw_uid, self._user.pw_gid)

    def _configure_postfix(self) -> None:
        self.postfix = self.scratch / "postfix"
        for name in ("", "queue", "data", "log"):
            (self.postfix / name).mkdir()
        os.chown(self.postfix / "data", pwd.getpwnam("postfix").pw_uid, -1)
        settings = {
            "compatibility_level": "3.6",
            "queue_directory": f"{self.postfix}/queue",
            "data_directory": f"{self.postfix}/data",
            "maillog_file": f"{self.postfix}/log/mail.log",
            "maillog_file_prefixes": str(self.postfix),
            "inet_interfaces": "127.0.0.1",
            "inet_protocols": "ipv4",
            "myhostname": "mail.example.test",
            "mydestination": "",
            "alias_maps": "",
            "virtual_mailbox_domains": "example.test",
            "virtual_mailbox_maps": "static:anna/",
            "virtual_mailbox_base": str(self.mail),
            "virtual_minimum_uid": "1",
            "virtual_uid_maps": f"static:{self._user.pw_uid}",
            "virtual_gid_maps": f"static:{self._user.pw_gid}",
        }
        lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
        (self.postfix / "main.cf").write_text(lines)
        (self.postfix / "master.cf").write_text(
            "pickup unix n - n 1 1 pickup\ncleanup unix n - n - 0 cleanup\n"
            "qmgr unix n - n 300 1 qmgr\nrewrite unix - - n - - trivial-rewrite\n"
            "virtual unix - n n - - virtual\nbounce unix - - n - 0 bounce\n"
            "defer unix - - n - 0 bounce\nerror unix - - n - - error\n"
            "postlog unix-dgram n - n - 1 postlogd\n"
        )

    def _configure_dovecot(self) -> None:
        self.dovecot = self.scratch / "dovecot.conf"
        user = self._user
        self.dovecot.write_text(
            f"base_dir = {self.scratch}/run\nlog_path = {self.scratch}/dovecot.log\n"
            f"state_dir = {self.scratch}/state\nprotocols = imap\nssl = no\nlisten = 127.0.0.1\n"
            f"mail_location = maildir:{self.mail}/%n\nfirst_valid_uid = 1\n"
            "service imap-login {\n  inet_listener imap {\n    port = 0\n  }\n"
            "  inet_listener imaps {\n    port = 0\n  }\n}\n"
            f"userdb {{\n  driver = static\n  args = uid={user.pw_uid} gid={user.pw_gid} "
            f"home={self.mail}/%n allow_all_users=yes\n}}\n"
            "passdb {\n  driver = static\n  args = nopassword=y\n}\n"
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        postfix = ["postfix", "-c", str(self.postfix)]
        dovecot = ["dovecot", "-c", str(self.dovecot)]
        follow([*postfix, "start"], timeout_seconds=SECONDS)
        try:
            follow(dovecot, timeout_seconds=SECONDS)  # the server keeps the ends of the pipes
            try:
                yield
            finally:
                pid = (self.scratch / "run/master.pid").read_text().strip()
                run([*dovecot, "stop"], timeout_seconds=SECONDS)
                wait_for("the end of Dovecot", lambda: not Path(f"/proc/{pid}").exists())
        finally:
            run([*postfix, "stop"], timeout_seconds=SECONDS)

    def send(self, number: int) -> None:
        words = ["sendmail", "-C", str(self.postfix), "-f", "a@example.test", "anna@example.test"]
        run(words, input_bytes=MESSAGE % (number, number), timeout_seconds=SECONDS)

    def subjects(self) -> list[str]:
        """As Dovecot reads them for the user."""
        words = ["doveadm", "-c", str(self.dovecot), "fetch", "-u", "anna", "hdr.subject", "all"]
        try:
            lines = run(words, timeout_seconds=SECONDS).stdout.decode().splitlines()
        except ToolError:
            return []
        return sorted(line.removeprefix("hdr.subject: ") for line in lines if "hello" in line)


def test_mail_server(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = MailServer(scratch)
    secret, store = scratch / "restic.password", scratch / "restic"
    secret.write_text("correct horse\n")
    run(["restic", "init", "-r", str(store), "--password-file", str(secret)])
    monkeypatch.setenv("RESTIC_CACHE_DIR", str(scratch / "cache"))
    places: dict[str, object] = {
        "/backup/restic": store,
        "/etc/imager/restic.password": secret,
        "/srv/mail": server.mail,
        'systemctl", "stop", "postfix"': f'postfix", "-c", "{server.postfix}", "stop"',
        'systemctl", "start", "postfix"': f'postfix", "-c", "{server.postfix}", "start"',
    }
    configure("mail", scratch, places, monkeypatch)
    expected = [f"hello {number}" for number in range(3)]
    with server.running():
        for number in range(3):
            server.send(number)
        wait_for("three messages", lambda: server.subjects() == expected)
        image = capture(scratch, hooks=2)
        server.send(3)  # Postfix is running again
        wait_for("the fourth message", lambda: len(server.subjects()) == 4)
    shutil.rmtree(server.mail)
    server.make_mail_folder()
    bring_back(scratch, image)
    with server.running():
        assert server.subjects() == expected
        server.send(4)
        wait_for("the next message", lambda: server.subjects() == [*expected, "hello 4"])
