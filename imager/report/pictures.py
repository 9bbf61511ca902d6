"""Pictures of a report: images on a time line, what is on a disk. Colours are the page's."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from html import escape

from imager.diskmap import NAMES, STATES, DiskMap, dominant_state
from imager.format import State
from imager.report.collect import MAP_COLUMNS
from imager.report.model import DiskDetail, ImageFacts, Server
from imager.units import count_of, show_bytes

_WIDTH, _HEIGHT, _RADIUS = 240, 22, 4
_CELL = 10


def timeline(server: Server, first: datetime, last: datetime) -> str:
    """Every image as a dot between two moments; those that would lie on each other are one."""
    span = max((last - first).total_seconds(), 1)
    dots: dict[int, ImageFacts] = {}
    for image in server.images:
        along = min(max((image.created - first).total_seconds() / span, 0), 1)
        x = round(_RADIUS + along * (_WIDTH - 2 * _RADIUS))
        # What needs attention is not hidden below what doesn't, nor the rare below the many.
        if x not in dots or _rank(image) >= _rank(dots[x]):
            dots[x] = image
    newest, oldest = server.newest.created, server.images[0].created
    words = f"{count_of(len(server.images), 'image')}, {oldest:%Y-%m-%d} to {newest:%Y-%m-%d}"
    return (
        f'<svg class="line" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{words}">'
        f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT // 2}" y2="{_HEIGHT // 2}"/>'
        + "".join(
            f'<circle cx="{x}" cy="{_HEIGHT // 2}" r="{_RADIUS}" class="{_style(image)}">'
            f"<title>{image.created:%Y-%m-%d %H:%M} {escape(image.note)}</title></circle>"
            for x, image in dots.items()
        )
        + "</svg>"
    )


def _rank(image: ImageFacts) -> int:
    return 2 if image.partial else int(bool(image.proved))


def _style(image: ImageFacts) -> str:
    return ("", "proved", "partial")[_rank(image)]


def disk_picture(detail: DiskDetail) -> str:
    """Partitions as bars, and below them what each part of the disk holds, row by row."""
    cells = detail.map.cells
    rows = -(-len(cells) // MAP_COLUMNS)
    places: dict[State, list[str]] = {state: [] for state in STATES}
    for n, shares in enumerate(cells):
        row, column = divmod(n, MAP_COLUMNS)
        places[dominant_state(shares)].append(f"M{column * _CELL} {row * _CELL}h9v9h-9z")
    paths = "".join(
        f'<path class="{NAMES[state]}" d="{"".join(found)}"/>' for state, found in places.items()
    )
    words = ", ".join(f"{NAMES[state]} {show_bytes(detail.map.totals[state])}" for state in STATES)
    return (
        f'<div class="parts" aria-hidden="true">{"".join(_partitions(detail))}</div>'
        f'<svg class="map" viewBox="0 0 {MAP_COLUMNS * _CELL} {rows * _CELL}" role="img" '
        f'aria-label="Map of the disk: {words}">{paths}</svg>\n'
    )


def _partitions(detail: DiskDetail) -> Iterator[str]:
    disk = detail.disk
    for item in disk.partitions:
        start, size = item.get("offset"), item.get("size")
        if not isinstance(start, int) or not isinstance(size, int) or not disk.size:
            continue
        filesystem = item.get("filesystem")
        kind = filesystem.get("kind") if isinstance(filesystem, dict) else None
        label = escape(f"{item.get('number') or ''} {kind or 'unknown'}".strip())
        yield (
            f'<span style="left:{start / disk.size:.4%};width:{size / disk.size:.4%}" '
            f'title="{label}, {show_bytes(size)}">{label}</span>'
        )


def legend(disk_map: DiskMap) -> str:
    items = "".join(
        f'<li><i class="{name}"></i>{name} {show_bytes(disk_map.totals[state])}</li>'
        for state, name in ((state, NAMES[state]) for state in STATES)
    )
    return f'<ul class="legend">{items}</ul>\n'
