"""Remote rescue: an SSH server (dropbear) that takes the medium's keys and no passwords."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imager.errors import ImagerError
from imager.process import find_tool, run

_HOST_KEYS = Path("/etc/dropbear")
_AUTHORIZED = Path("/root/.ssh/authorized_keys")


def start(keys: Sequence[str]) -> None:
    """Listen on port 22 in the background; the host key is new at every boot.

    Raises ImagerError when the server does not start.
    """
    if find_tool("dropbear") is None:
        raise ImagerError("this medium was built without an SSH server")
    for folder in (_HOST_KEYS, _AUTHORIZED.parent):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _AUTHORIZED.write_text("".join(f"{key}\n" for key in keys))
    _AUTHORIZED.chmod(0o600)
    # -R: make host keys when the first client comes; -s: no passwords
    run(["dropbear", "-R", "-s"])
