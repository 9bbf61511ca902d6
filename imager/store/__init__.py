"""Stores: where a repository's files lie. One tiny interface, one place that picks by URL."""

from __future__ import annotations

from pathlib import Path

from imager.errors import UsageError
from imager.store.base import ObjectWriter, ReadStore, WriteStore

__all__ = ["ObjectWriter", "ReadStore", "WriteStore", "open_store"]


def open_store(url: str) -> WriteStore:
    """The store behind a URL or a path. Raises UsageError for a scheme that is not known."""
    scheme, colon, rest = url.partition("://")
    if not colon:
        scheme, rest = "file", url
    if scheme == "file":
        from imager.store.local import LocalStore

        return LocalStore(Path(rest))
    if scheme in ("http", "https"):
        from imager.store.http import HttpStore

        return HttpStore(url)
    raise UsageError(
        f"cannot open {url}: {scheme}:// repositories are not known to this version",
        hint="name a local folder, or an http:// or https:// address to read from",
    )
