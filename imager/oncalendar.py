"""Calendar expressions and time spans of systemd, read by systemd itself (systemd.time(7))."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from imager.errors import ImagerError, ToolError, UsageError
from imager.process import find_tool, run

# `systemd-analyze calendar` says local time and UTC, or UTC only where that is local
_UTC_TIME = re.compile(
    r"(?:Next elapse|Iter\. #\d+|\(in UTC\)): \w{3} (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC$", re.M
)
_MICROSECONDS = re.compile(r"s: (\d+)$", re.M)  # the line is "μs: …", or "us: …" without UTF-8
_INFINITY = (1 << 64) - 1  # USEC_INFINITY


def check_calendar(expression: str) -> None:
    """Raises UsageError for what is no calendar expression, ToolError without systemd."""
    _analyze("calendar", expression, f"{expression!r} is no calendar expression")


def times_after(expression: str, moment: datetime, count: int = 1) -> list[datetime]:
    """The next times after a moment, in UTC; fewer when there are no more.

    Raises as ``check_calendar``. The expression is in the machine's time zone.
    """
    base = f"--base-time={moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    said = _analyze(
        "calendar",
        expression,
        f"{expression!r} is no calendar expression",
        f"--iterations={count}",
        base,
    )
    found = [datetime.fromisoformat(text).replace(tzinfo=UTC) for text in _UTC_TIME.findall(said)]
    return sorted(set(found))[:count]


def span_seconds(span: str) -> float:
    """Seconds of ``30min`` or ``1h 30s``. Raises UsageError, ToolError."""
    said = _analyze("timespan", span, f"{span!r} is no time span, as 30min or 2h")
    match = _MICROSECONDS.search(said)
    if match is None or int(match[1]) >= _INFINITY:
        raise UsageError(f"{span!r} is no time span that ends")
    return int(match[1]) / 1_000_000


def _analyze(what: str, text: str, refusal: str, *options: str) -> str:
    if find_tool("systemd-analyze") is None:
        raise ToolError(
            "systemd-analyze is not installed: schedules are timers of systemd",
            hint="without systemd, run: imager schedule run JOB from cron",
        )
    if not text.strip() or not text.isprintable():
        raise UsageError(refusal)
    try:
        done = run(["systemd-analyze", what, *options, "--", text], timeout_seconds=60)
    except ImagerError as error:
        raise UsageError(refusal, hint=error.message.splitlines()[-1]) from None
    return done.stdout.decode(errors="replace")
