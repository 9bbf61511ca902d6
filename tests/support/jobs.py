"""A machine of its own, as far as jobs by the calendar go."""

from __future__ import annotations

from pathlib import Path

import pytest


def own_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs, records, locks, units and imager.toml below ``folder``."""
    for name in ("CONFIG", "STATE", "RUN", "UNIT"):
        monkeypatch.setenv(f"IMAGER_{name}_DIR", str(folder / name.lower()))
    monkeypatch.setenv("IMAGER_CONFIG", str(folder / "imager.toml"))
    monkeypatch.setenv("IMAGER_REPO", str(folder / "no-repository"))
