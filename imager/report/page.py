"""The report as one HTML page that needs nothing else: no network, no other file.

Everything that comes from a repository is escaped, and the page's own policy lets it load nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from html import escape
from importlib.resources import files

from imager.data.model import DataBackup
from imager.report.model import DiskDetail, ImageFacts, Report, Server
from imager.report.pictures import disk_picture, legend, timeline
from imager.units import count_of, show_bytes

_KEPT_ROWS = 30
"""Images of a server that are listed; older ones are counted."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_COLUMNS = (
    "Server",
    "Newest image",
    "Age",
    "State",
    "Proven",
    "Images",
    "Over time",
    "Used",
    "Added",
)


def render(report: Report) -> str:
    """The page, in UTF-8 when it is written."""
    resources = files("imager.report")
    style = resources.joinpath("page.css").read_text("utf-8")
    script = resources.joinpath("page.js").read_text("utf-8")
    return "".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>Images in {escape(report.repository)}</title>\n<style>\n{style}</style>\n",
            '</head>\n<body>\n<a class="skip" href="#content">To the servers</a>\n',
            *_header(report),
            '<main id="content">\n',
            *_damage(report),
            *_servers(report),
            *_closer(report),
            "</main>\n<footer>Made by imager.</footer>\n",
            f"<script>\n{script}</script>\n</body>\n</html>\n",
        )
    )


def _header(report: Report) -> Iterator[str]:
    servers = report.servers
    tiles = [
        (str(len(servers)), "servers", ""),
        (str(sum(len(server.images) for server in servers)), "images", ""),
        (show_bytes(sum(server.added for server in servers)), "added by them", ""),
        _count_tile(sum(server.is_overdue(report.made) for server in servers), "overdue"),
        _count_tile(sum(server.proved is None for server in servers), "without a proven image"),
        _count_tile(sum(server.newest.partial for server in servers), "newest with holes"),
    ]
    yield "<header>\n<h1>Server images</h1>\n"
    yield f'<p class="quiet">Repository <code>{escape(report.repository)}</code>, '
    yield f'{_when(report.made)}. <button id="theme" type="button">Light or dark</button></p>\n'
    yield '<ul class="tiles">\n'
    for number, words, style in tiles:
        yield f'<li><b class="{style}">{escape(number)}</b>{escape(words)}</li>\n'
    yield "</ul>\n</header>\n"


def _count_tile(count: int, words: str) -> tuple[str, str, str]:
    return str(count), words, "bad" if count else "good"


def _damage(report: Report) -> Iterator[str]:
    if report.damaged:
        yield '<h2 id="damage">Damage</h2>\n<ul>\n'
        for text in report.damaged:
            yield f'<li class="bad">{escape(text)}</li>\n'
        yield "</ul>\n<p>Run <code>imager verify</code>.</p>\n"


def _servers(report: Report) -> Iterator[str]:
    yield "<h2>Servers</h2>\n"
    if not report.servers:
        yield "<p>There are no images yet: <code>imager capture DISK</code>.</p>\n"
        return
    yield (
        '<div class="bar"><label>Find<input id="filter" type="search" autocomplete="off"></label>\n'
        '<label>Show<select id="state"><option value="">all</option>'
        '<option value="overdue">overdue</option><option value="unproved">not proven</option>'
        '<option value="partial">with holes</option></select></label>\n'
        '<p id="shown" class="quiet" role="status"></p></div>\n'
        '<table id="servers" class="cards"><thead><tr>'
    )
    for column in _COLUMNS:
        number = ' class="number"' if column in ("Images", "Used", "Added") else ""
        yield f'<th scope="col"{number}>'
        yield column if column == "Over time" else f'<button type="button">{column}</button>'
        yield "</th>"
    yield "</tr></thead>\n<tbody>\n"
    first = min(server.images[0].created for server in report.servers)
    for server in report.servers:
        yield from _server(server, first, report)
    yield "</tbody></table>\n"


def _server(server: Server, first: datetime, report: Report) -> Iterator[str]:
    newest = server.newest
    overdue = server.is_overdue(report.made)
    states = {
        "overdue": overdue,
        "unproved": server.proved is None,
        "partial": newest.partial,
    }
    words = " ".join((server.name, *server.hosts, newest.id, newest.note)).lower()
    held = " ".join(word for word, holds in states.items() if holds)
    name = escape(server.name)
    if server.name in report.details:
        name = f'<a href="#server-{name}">{name}</a>'
    others = [host for host in server.hosts if host != server.name]
    age = report.made - newest.created
    yield f'<tr data-text="{escape(words)}" data-state="{held}">'
    yield f'<th scope="row" data-key="{escape(server.name)}">{name}'
    yield f' <span class="quiet">{escape(", ".join(others))}</span></th>' if others else "</th>"
    yield _cell("Newest image", newest.id, f"<code>{escape(newest.id)}</code>")
    allowed = f", allowed {_span(server.max_age)}" if overdue and server.max_age else ""
    style = "bad" if overdue else ""
    yield _cell("Age", age.total_seconds(), f'<span class="{style}">{_span(age)}{allowed}</span>')
    yield _cell("State", newest.consistency, _state(newest))
    yield _cell("Proven", server.proved.id if server.proved else "", _proved(server))
    yield _cell("Images", len(server.images), str(len(server.images)), "number")
    yield _cell("Over time", "", timeline(server, first, report.made))
    yield _cell("Used", newest.used, show_bytes(newest.used), "number")
    yield _cell("Added", server.added, show_bytes(server.added), "number")
    yield "</tr>\n"


def _cell(label: str, key: object, content: str, style: str = "") -> str:
    return f'<td class="{style}" data-label="{label}" data-key="{escape(str(key))}">{content}</td>'


def _state(image: ImageFacts) -> str:
    marks = [escape(image.consistency)]
    if image.partial:
        marks.append('<span class="bad">holes</span>')
    if image.pinned:
        marks.append("pinned")
    return ", ".join(marks)


def _proved(server: Server) -> str:
    """Of the newest image, else of the newest that was proved."""
    newest, proved = server.newest, server.proved
    if newest.proved is False:
        return f'<span class="bad">failed: {escape(newest.proof_words)}</span>'
    if proved is None:
        return '<span class="warn">never</span>'
    if proved is newest:
        return '<span class="good">yes</span>'
    return f"an older one: <code>{escape(proved.id)}</code>"


def _closer(report: Report) -> Iterator[str]:
    if not report.details:
        return
    yield "<h2>A closer look</h2>\n"
    if report.left_out:
        yield f'<p class="quiet">Not shown: {count_of(report.left_out, "server")}. '
        yield "See <code>imager report --name SERVER</code>.</p>\n"
    for server in report.servers:
        if server.name in report.details:
            opened = " open" if len(report.details) == 1 else ""
            yield f'<details id="server-{escape(server.name)}"{opened}>'
            yield f"<summary>{escape(server.name)}</summary>\n"
            for detail in report.details[server.name]:
                yield from _disk(detail)
            yield from _data(report.data.get(server.name, ()), report.made)
            yield from _images(server)
            yield "</details>\n"


def _disk(detail: DiskDetail) -> Iterator[str]:
    disk = detail.disk
    words = [str(disk.identity[key]) for key in ("model", "serial") if disk.identity.get(key)]
    yield f"<h3>Disk {escape(disk.name)}, {show_bytes(disk.size)} {escape(' '.join(words))}</h3>\n"
    yield disk_picture(detail)
    yield legend(detail.map)
    if detail.since is None:
        return
    if not detail.changed:
        yield f"<p>Nothing changed since <code>{escape(detail.since)}</code>.</p>\n"
        return
    yield f'<table class="narrow"><caption>Changed since <code>{escape(detail.since)}</code>'
    yield '</caption><thead><tr><th scope="col">Where</th>'
    yield '<th scope="col" class="number">Changed</th></tr></thead><tbody>\n'
    for item in detail.changed:
        yield f'<tr><td>{escape(item.where)}</td><td class="number">'
        yield f"{show_bytes(item.length)}</td></tr>\n"
    yield "</tbody></table>\n"


def _data(backups: Sequence[DataBackup], now: datetime) -> Iterator[str]:
    """What was backed up beside the newest image, so that the age of each half is seen."""
    if not backups:
        return
    yield '<table class="narrow"><caption>Data backups of the newest image</caption><thead><tr>'
    yield "".join(f'<th scope="col">{title}</th>' for title in ("Data", "By", "Age", "State"))
    yield "</tr></thead><tbody>\n"
    for backup in backups:
        state = '<span class="good">whole</span>'
        if not backup.whole:
            words = backup.error or "; ".join(backup.warnings)
            state = f'<span class="bad">{escape(words)}</span>'
        yield f"<tr><td>{escape(backup.name)}</td><td>{escape(backup.engine)}</td>"
        yield f"<td>{_data_age(backup, now)}</td><td>{state}</td></tr>\n"
    yield "</tbody></table>\n"


def _data_age(backup: DataBackup, now: datetime) -> str:
    try:
        return _span(now - datetime.fromisoformat(backup.finished))
    except (ValueError, TypeError):
        return "unknown"


def _images(server: Server) -> Iterator[str]:
    columns = ("Image", "Made", "State", "Proven", "Note", "Used", "Added", "Took")
    yield '<h3>Images</h3>\n<div class="scroll"><table class="cards"><thead><tr>'
    yield "".join(f'<th scope="col">{column}</th>' for column in columns)
    yield "</tr></thead><tbody>\n"
    for image in reversed(server.images[-_KEPT_ROWS:]):
        words = {True: "yes", False: f"failed: {image.proof_words}", None: "not tried"}
        style = {True: "good", False: "bad", None: "quiet"}[image.proved]
        cells: Iterable[str] = (
            f"<code>{escape(image.id)}</code>",
            _when(image.created),
            _state(image),
            f'<span class="{style}">{escape(words[image.proved])}</span>',
            escape(image.note),
            show_bytes(image.used),
            show_bytes(image.added),
            f"{image.milliseconds / 1000:.1f} s",
        )
        yield "<tr>"
        for column, content in zip(columns, cells, strict=True):
            yield f'<td data-label="{column}">{content}</td>'
        yield "</tr>\n"
    yield "</tbody></table></div>\n"
    if (older := len(server.images) - _KEPT_ROWS) > 0:
        yield f'<p class="quiet">and {count_of(older, "older image")}</p>\n'


def _when(time: datetime) -> str:
    return f'<time datetime="{time:%Y-%m-%dT%H:%M:%SZ}">{time:%Y-%m-%d %H:%M} UTC</time>'


def _span(span: timedelta) -> str:
    """``5 minutes``, ``2 days``: the largest unit that gives at least two of them."""
    seconds = max(span.total_seconds(), 0)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return count_of(int(seconds // length), unit)
    return count_of(int(seconds), "second")
