"""Jobs: images that are taken by the calendar, each a file ``jobs/NAME.toml``."""

from __future__ import annotations

import json
import os
import re
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from imager.errors import FormatError, ImagerError, ObjectMissing, UsageError
from imager.jsonrecord import JsonRecord
from imager.oncalendar import check_calendar, span_seconds
from imager.retention import Rules
from imager.store.local import sync_folder

# It becomes part of a unit's name, and of the names of files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")

GC_CHOICES = ("weekly", "always", "never")
IO_CHOICES = ("idle", "best-effort")


@dataclass(frozen=True)
class Keep(JsonRecord):
    """How many images stay when the job has taken one; none given: all of them."""

    last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None

    @property
    def rules(self) -> Rules | None:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return Rules(**given) if any(count is not None for count in given.values()) else None


@dataclass(frozen=True)
class Job(JsonRecord):
    """What is captured, when, and what is kept. Time spans are systemd's: ``30min``.

    ``environment_file`` has secrets (a password of a data backup, say) as lines ``NAME=VALUE``;
    the job itself never has.
    """

    name: str
    calendar: str
    sources: tuple[str, ...] = ()
    all_disks: bool = False
    image: str = ""
    note: str = ""
    repo: str = ""
    random_delay: str = "0"
    keep: Keep = field(default_factory=Keep)
    gc: str = "weekly"
    consistency: str = "auto"
    exclude_partitions: tuple[str, ...] = ()
    nice: int = 10
    io: str = "idle"
    cpu_weight: int = 20
    timeout: str = "1d"
    environment_file: str = ""

    def check(self) -> None:
        """Raises UsageError for what can't be, ToolError where there is no systemd."""
        check_name(self.name)
        for item in fields(self):
            for text in _texts(getattr(self, item.name)):
                if not text.isprintable():
                    raise UsageError(f"job {self.name}: {item.name} has a line break or the like")
        if bool(self.sources) == self.all_disks:
            raise UsageError(
                f"job {self.name}: name the disks to capture, or give --all-disks",
                hint="see: lsblk",
            )
        if relative := [path for path in self.sources if not path.startswith("/")]:
            raise UsageError(f"job {self.name}: {relative[0]} is no absolute path")
        for path in filter(None, (self.environment_file, self.repo)):
            if "://" not in path and not path.startswith("/"):
                raise UsageError(f"job {self.name}: {path} is no absolute path")
        _check_choice("--gc", self.gc, GC_CHOICES)
        _check_choice("--io", self.io, IO_CHOICES)
        if self.nice > 19 or not 1 <= self.cpu_weight <= 10000:
            raise UsageError("--nice goes from 0 to 19, --cpu-weight from 1 to 10000")
        _ = self.keep.rules
        check_calendar(self.calendar)
        span_seconds(self.random_delay)
        span_seconds(self.timeout)


def check_name(name: str) -> str:
    if not _NAME.match(name):
        raise UsageError(
            f"{name!r} is no name of a job: letters, digits, dots, dashes and underscores"
        )
    return name


def config_folder() -> Path:
    """Where jobs are kept: ``IMAGER_CONFIG_DIR``, else /etc/imager."""
    return Path(os.environ.get("IMAGER_CONFIG_DIR", "/etc/imager"))


def job_file(name: str) -> Path:
    return config_folder() / "jobs" / f"{check_name(name)}.toml"


def job_names() -> list[str]:
    with suppress(FileNotFoundError):
        files = sorted((config_folder() / "jobs").glob("*.toml"))
        return [file.stem for file in files if _NAME.match(file.stem)]
    return []


def load_job(name: str) -> Job:
    """Raises ObjectMissing, FormatError."""
    file = job_file(name)
    try:
        values = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ObjectMissing(f"there is no job {name}", hint="see: imager schedule list") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} cannot be read: {error}") from None
    known = {item.name for item in fields(Job)}
    if unknown := sorted(values.keys() - known):
        raise FormatError(f"{file}: unknown settings: {', '.join(unknown)}")
    try:
        return Job.from_json({**values, "name": name})
    except FormatError as error:
        raise FormatError(f"{file}: {error.message}") from None


def save_job(job: Job) -> Path:
    """Write its file, replacing the one before."""
    file = job_file(job.name)
    replace_file(file, _to_toml(job).encode(), mode=0o600)
    return file


def remove_job(name: str) -> None:
    with suppress(FileNotFoundError):
        job_file(name).unlink()


def replace_file(file: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Whole and durable, or as it was before. Raises ImagerError."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as sink:
            os.fchmod(fd, mode)  # whatever the umask is
            sink.write(content)
            sink.flush()
            os.fsync(fd)
        new.replace(file)
        sync_folder(file.parent)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise ImagerError(f"{file} cannot be written: {error.strerror}") from None


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value}: it can be {', '.join(choices)}")


def _texts(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else []


def _to_toml(job: Job) -> str:
    """What differs from the defaults, and what a person looks for. JSON's texts, numbers and lists
    of texts are TOML's as well, but for DEL, which ``check`` refuses."""
    plain: dict[str, Any] = job.to_json()
    keep: dict[str, int | None] = plain.pop("keep")
    default = Job(job.name, job.calendar).to_json()
    lines = [
        f"{key} = {_toml_value(value)}"
        for key, value in plain.items()
        if key != "name" and (key == "calendar" or value != default[key])
    ]
    rules = [f"{key} = {count}" for key, count in keep.items() if count is not None]
    return "\n".join([*lines, *(["", "[keep]", *rules] if rules else []), ""])


def _toml_value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
