"""Telling people and machines how a job's run ended: ``[notify]`` in imager.toml.

A message that cannot be sent is a text for the log, and never the failure of an image.
"""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any
from urllib.parse import urlsplit

from imager.errors import ImagerError, UsageError
from imager.jobrecord import GOOD, JobRun
from imager.process import run as run_program

ON = ("failure", "always", "change")
_KEYS = {"on", "command", "mail", "webhook", "timeout"}


@dataclass(frozen=True)
class Notify:
    """Whom to tell, and when: ``failure`` whatever is not good, ``change`` another result than the
    run before. ``timeout`` in seconds, for each way."""

    on: str = "failure"
    command: tuple[str, ...] = ()
    mail: str = ""
    webhook: str = ""
    timeout: int = 60

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Notify:
        """Raises UsageError for what is not understood."""
        if unknown := sorted(table.keys() - _KEYS):
            raise UsageError(f"[notify]: unknown settings: {', '.join(unknown)}")
        command = table.get("command", [])
        words = [command] if isinstance(command, str) else command
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UsageError('[notify]: command must be a list of texts: ["/usr/local/bin/tell"]')
        texts = {key: table.get(key, "") for key in ("mail", "webhook")}
        if wrong := [key for key, text in texts.items() if not isinstance(text, str)]:
            raise UsageError(f"[notify]: {wrong[0]} must be a text")
        timeout = table.get("timeout", 60)
        if type(timeout) is not int or timeout <= 0:
            raise UsageError("[notify]: timeout must be a number of seconds")
        if table.get("on", "failure") not in ON:
            raise UsageError(f"[notify]: on must be one of {', '.join(ON)}")
        if texts["webhook"] and urlsplit(texts["webhook"]).scheme not in ("http", "https"):
            raise UsageError("[notify]: webhook must be an http or https address")
        if not texts["mail"].isprintable():
            raise UsageError("[notify]: mail must be one address")
        return cls(table.get("on", "failure"), tuple(words), **texts, timeout=timeout)

    def is_due(self, run: JobRun, before: JobRun | None) -> bool:
        if self.on == "change":
            return run.result != (before.result if before else GOOD)
        return self.on == "always" or run.result != GOOD


def tell(settings: Notify, job: str, run: JobRun, before: JobRun | None) -> list[str]:
    """Send what is due; what went wrong with that."""
    if not settings.is_due(run, before):
        return []
    return [problem for way in _ways(settings, job, run, before) for problem in _try(*way)]


Way = tuple[str, Callable[[], object]]


def _ways(settings: Notify, job: str, run: JobRun, before: JobRun | None) -> Iterator[Way]:
    variables = environment(job, run, before)
    seconds = settings.timeout
    if settings.command:
        command = list(settings.command)
        yield (
            command[0],
            lambda: run_program(command, environment=variables, timeout_seconds=seconds),
        )
    if settings.mail:
        message = _mail(settings.mail, job, run)
        sendmail = ["sendmail", "-i", "--", settings.mail]
        yield (
            f"mail to {settings.mail}",
            lambda: run_program(sendmail, input_bytes=message, timeout_seconds=seconds),
        )
    if settings.webhook:
        document = {"job": job, "before": before.result if before else None, **run.to_json()}
        yield "webhook", lambda: _post(settings.webhook, document, seconds)


def _try(name: str, send: Callable[[], object]) -> Iterator[str]:
    try:
        send()
    except ImagerError as error:
        yield f"notification by {name} failed: {error.message}"
    except OSError as error:
        yield f"notification by {name} failed: {error.strerror or error}"


def environment(job: str, run: JobRun, before: JobRun | None) -> dict[str, str]:
    """What a command is told; see docs/schedule.md."""
    values = {
        "JOB": job,
        "RESULT": run.result,
        "RESULT_BEFORE": before.result if before else "",
        "EXIT_CODE": run.exit_code,
        "IMAGE": run.image,
        "NAME": run.lineage,
        "HOST": run.host,
        "REPOSITORY": run.repository,
        "STARTED": run.started,
        "FINISHED": run.finished,
        "SECONDS": f"{run.seconds:.3f}",
        "STORED_BYTES": run.stored_bytes,
        "ERROR": run.error.replace("\0", ""),
    }
    return {f"IMAGER_{key}": "" if value is None else str(value) for key, value in values.items()}


def _mail(to: str, job: str, run: JobRun) -> bytes:
    message = EmailMessage()
    message["To"] = to
    message["Subject"] = f"imager: job {job} on {socket.gethostname()}: {run.result}"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no answers from vacation programs
    told = environment(job, run, None)
    lines = [f"{key.removeprefix('IMAGER_').lower()}: {value}" for key, value in told.items()]
    message.set_content("\n".join([*lines, ""]))
    return message.as_bytes()


def _post(url: str, document: dict[str, Any], seconds: int) -> None:
    request = urllib.request.Request(
        url, json.dumps(document).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    host = urlsplit(url).hostname or "the server"  # the address itself may hold a secret
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        error.close()
        raise ImagerError(f"{host} answered {error.code}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ImagerError(f"{host}: {reason}") from None
