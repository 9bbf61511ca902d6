"""Settings: a flag beats the environment, which beats the configuration file."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from imager.errors import UsageError

CONFIG_FILE = Path("/etc/imager/imager.toml")
INSTALLED_REPOSITORY = Path("/var/lib/imager/images")


def repository_url(flag: str | None) -> str:
    """Where the repository is: ``--repo``, ``IMAGER_REPO``, ``repo`` in imager.toml, the default.

    Raises UsageError when the configuration file can't be understood.
    """
    return flag or os.environ.get("IMAGER_REPO") or _from_file() or str(default_repository())


def default_repository() -> Path:
    """``images/`` in a checkout, else the system's folder."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / "images"
    return INSTALLED_REPOSITORY


def table(name: str) -> dict[str, Any]:
    """A table of imager.toml, ``[name]``; empty without one. Raises UsageError."""
    found = _settings().get(name, {})
    if not isinstance(found, dict):
        raise UsageError(f"{_config_file()}: [{name}] must be a table")
    return found


def _from_file() -> str | None:
    repo = _settings().get("repo")
    if repo is not None and not isinstance(repo, str):
        raise UsageError(
            f"{_config_file()}: repo must be a text, the path or URL of the repository"
        )
    return repo


def _settings() -> dict[str, Any]:
    path = _config_file()
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}") from None


def _config_file() -> Path:
    return Path(os.environ.get("IMAGER_CONFIG", CONFIG_FILE))
