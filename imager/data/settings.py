"""``[[data]]`` of imager.toml."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from imager.config import CONFIG_FILE
from imager.data.engines import OWN
from imager.data.model import DataEntry, Password
from imager.errors import UsageError
from imager.exclusion import check_names
from imager.hooks import check_owner
from imager.retention import Rules

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_COMMANDS = ("backup", "restore", "list", "forget")
_TEXTS = ("name", "engine", "repository", "when", "password-file", "password-environment")
_LISTS = ("paths", "excludes", "exclude-partitions", "password-command")
_KNOWN = {*_TEXTS, *_LISTS, *_COMMANDS, "retention", "timeout", "required"}


def load_entries(root: Path = Path("/")) -> list[DataEntry]:
    """Of this system's configuration, or of the one that is mounted at ``root``; none without a
    configuration. Raises UsageError."""
    path = _file(root)
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}") from None
    entries = read_entries(table, str(path), root)
    if entries:
        check_owner(path)
    return entries


def has_configuration(root: Path) -> bool:
    return _file(root).is_file()


def _file(root: Path) -> Path:
    if root == Path("/"):
        return Path(os.environ.get("IMAGER_CONFIG", CONFIG_FILE))
    return root / str(CONFIG_FILE).lstrip("/")


def read_entries(table: Mapping[str, Any], where: str, root: Path = Path("/")) -> list[DataEntry]:
    """The entries of a configuration. Raises UsageError, which names ``where``."""
    items = table.get("data", [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UsageError(f"{where}: data backups are written as [[data]]")
    entries = [_entry(item, f"{where}, data backup {n}", root) for n, item in enumerate(items, 1)]
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise UsageError(f"{where}: two data backups have one name")
    return entries


def _entry(item: dict[str, Any], where: str, root: Path) -> DataEntry:
    where = f"{where} ({item['name']})" if isinstance(item.get("name"), str) else where
    if "password" in item:
        raise UsageError(
            f"{where}: a password does not belong into a configuration file",
            hint="name where it is: password-file, password-command or password-environment",
        )
    texts = {key: _text(item, key, where) for key in _TEXTS}
    lists = {key: _texts(item, key, where) for key in (*_LISTS, *_COMMANDS)}
    name, engine = texts["name"] or "", texts["engine"] or ""
    if not _NAME.match(name):
        raise UsageError(f"{where}: it needs a name of letters, digits, dots and dashes")
    if not engine:
        raise UsageError(f"{where}: it needs an engine", hint=f"it can be {', '.join(OWN)}")
    when = texts["when"] or "before"
    if when not in ("before", "after"):
        raise UsageError(f'{where}: when can be "before" or "after" the image')
    entry = DataEntry(
        name=name,
        engine=engine,
        repository=texts["repository"] or "",
        paths=lists["paths"],
        excludes=lists["excludes"],
        password=_password(texts, lists, where),
        retention=_retention(item.get("retention"), where),
        when=when,
        timeout=_seconds(item.get("timeout"), where),
        required=_flag(item, "required", where),
        exclude_partitions=lists["exclude-partitions"],
        commands={key: lists[key] for key in _COMMANDS if lists[key]},
        options={key: value for key, value in item.items() if key not in _KNOWN},
        root=root,
    )
    _check(entry, where)
    return entry


def _check(entry: DataEntry, where: str) -> None:
    if entry.engine in OWN and entry.options:
        raise UsageError(f"{where}: what is {', '.join(entry.options)}?")
    if entry.engine in ("restic", "borg") and not (entry.repository and entry.paths):
        raise UsageError(f"{where}: {entry.engine} needs a repository and paths")
    if entry.engine == "command" and "backup" not in entry.commands:
        raise UsageError(f"{where}: the engine command needs backup, and restore to bring it back")
    check_names(entry.exclude_partitions, where)
    if relative := [path for path in entry.paths if not path.startswith("/")]:
        raise UsageError(f"{where}: {relative[0]} is not a path from the root")


def _text(item: dict[str, Any], key: str, where: str) -> str | None:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{where}: {key} must be a text")
    return value


def _texts(item: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = item.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UsageError(f"{where}: {key} must be a list of texts")
    return tuple(value)


def _password(
    texts: Mapping[str, str | None], lists: Mapping[str, tuple[str, ...]], where: str
) -> Password:
    found = Password(
        texts["password-file"], lists["password-command"], texts["password-environment"]
    )
    if sum(map(bool, (found.file, found.command, found.variable))) > 1:
        raise UsageError(f"{where}: the password can come from one place only")
    return found


def _retention(value: object, where: str) -> Rules | None:
    if value is None:
        return None
    known = {field.name for field in fields(Rules)}
    if (
        not isinstance(value, dict)
        or not set(value) <= known
        or not all(type(count) is int for count in value.values())
    ):
        raise UsageError(f"{where}: retention is written like {{ last = 7, daily = 14 }}")
    try:
        return Rules(**value)
    except UsageError as error:
        raise UsageError(f"{where}: retention: {error.message}") from None


def _seconds(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UsageError(f"{where}: timeout must be a number of seconds")
    return float(value)


def _flag(item: dict[str, Any], key: str, where: str) -> bool:
    value = item.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f"{where}: {key} must be true or false")
    return value
