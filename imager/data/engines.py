"""Which engine an entry names: ours are loaded when they are used, others are plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import cast

from imager.data.model import DataEntry, Engine
from imager.errors import ImagerError, UsageError

PLUGINS = "imager.data"
"""The entry-point group."""

OWN = {"restic": "Restic", "borg": "Borg", "command": "Command"}


def open_engine(entry: DataEntry) -> Engine:
    """Raises UsageError for an engine that is not known, ImagerError for a plug-in that fails."""
    if entry.engine in OWN:
        module = import_module(f"imager.data.{entry.engine}")
        return cast(Engine, getattr(module, OWN[entry.engine])(entry))
    found = list(entry_points(group=PLUGINS, name=entry.engine))
    if not found:
        known = sorted({*OWN, *(point.name for point in entry_points(group=PLUGINS))})
        raise UsageError(
            f"data backup {entry.name}: there is no engine {entry.engine}",
            hint=f"it can be {', '.join(known)}",
        )
    try:
        make = cast(Callable[[DataEntry], Engine], found[0].load())
        return make(entry)
    except ImagerError:
        raise
    except Exception as error:
        raise ImagerError(f"the plug-in for {entry.engine} failed: {error!r}") from error
