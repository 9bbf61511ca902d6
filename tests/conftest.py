"""For all tests: nobody's own settings count, and a repository to work in."""

from __future__ import annotations

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
