"""Sizes for people."""

from __future__ import annotations

import re
from functools import lru_cache

from imager.errors import UsageError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:iB|B)?\Z", re.IGNORECASE)


@lru_cache(1 << 12)  # a long list says the same sizes again and again
def show_bytes(count: int) -> str:
    """``1.5 GiB``: three digits or so, in binary units."""
    value = float(count)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.{0 if value >= 99.5 else 1}f} {unit}"


def count_of(number: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_age(seconds: int) -> str:
    """``45 s``, ``12 min``, ``30 h``, ``9 days``."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < limit:
            return f"{seconds // size} {unit}"
    return f"{seconds // 86400} days"


def parse_size(text: str) -> int:
    """Bytes of ``262144``, ``256K`` or ``1MiB`` (all units binary). Raises UsageError."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise UsageError(f"not a size: {text}", hint="write it like 262144, 256K or 1M")
    return int(float(match[1]) * 1024 ** " KMGTP".index(match[2].upper() or " "))
