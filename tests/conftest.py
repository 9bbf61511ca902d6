"""For all tests: nobody's own settings count, and a repository to work in."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from imager.repository import Repository


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("IMAGER_REPO", raising=False)
    monkeypatch.setenv("IMAGER_CONFIG", str(tmp_path / "no-such-imager.toml"))


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The folder of a new repository with small blocks."""
    folder = tmp_path / "repo"
    Repository.create(str(folder), block_size=64 << 10)
    return folder


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Of the processes that run tests beside each other, one waits here for a test marked
    ``alone``: outermost, so that the wait is none of the test's time."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    # Each worker has a folder of its own in the run's.
    folder = item.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
    is_alone = item.get_closest_marker("alone") is not None
    # Whoever waits to be alone holds the queue, so that it is not overtaken for ever.
    with ExitStack() as door:
        with _locked(folder / "queue", exclusive=True):
            door.enter_context(_locked(folder / "door", exclusive=is_alone))
        return (yield)


@contextmanager
def _locked(path: Path, *, exclusive: bool) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # for those too who inherited the file by a fork
