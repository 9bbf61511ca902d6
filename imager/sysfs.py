"""Reading single values from sysfs and procfs: what is missing or unreadable is None."""

from __future__ import annotations

import re
from pathlib import Path

# Attributes are at most one page; procfs files that are read here stay far below this.
_MAX_BYTES = 1 << 20


def read_bytes(file: Path) -> bytes | None:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_BYTES)
    except OSError:  # absent, for root only, or a device that does not answer
        return None


def read_text(file: Path) -> str | None:
    """The stripped text, or None when there is none."""
    raw = read_bytes(file)
    return None if raw is None else raw.decode(errors="replace").strip("\0 \t\r\n") or None


def read_number(file: Path) -> int | None:
    """A decimal or 0x number that is not negative."""
    text = read_text(file) or ""
    if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", text):
        return int(text, 16)
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) else None


def read_flag(file: Path) -> bool | None:
    number = read_number(file)
    return None if number is None else bool(number)


def entries(folder: Path) -> list[Path]:
    """What a folder has, by name in natural order; nothing when there is no such folder."""
    try:
        return sorted(folder.iterdir(), key=lambda entry: natural_key(entry.name))
    except OSError:
        return []


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts nvme2n1 before nvme10n1."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
