"""Settings: a flag beats the environment, which beats the configuration file."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

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


def _from_file() -> str | None:
    path = Path(os.environ.get("IMAGER_CONFIG", CONFIG_FILE))
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}") from None
    repo = values.get("repo")
    if repo is not None and not isinstance(repo, str):
        raise UsageError(f"{path}: repo must be a text, the path or URL of the repository")
    return repo
