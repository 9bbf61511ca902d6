"""A picture of an image's disk, on a terminal or as SVG: used, zero, unused, unreadable."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from imager.blockmap import BlockMap
from imager.format import State
from imager.manifest import Disk
from imager.units import show_bytes

STATES = (State.DATA, State.ZERO, State.UNUSED, State.UNREADABLE)
NAMES = {
    State.DATA: "used",
    State.ZERO: "zero",
    State.UNUSED: "unused",
    State.UNREADABLE: "unreadable",
}

# Told apart without colours too: a terminal may have none.
_GLYPHS = {State.DATA: "█", State.ZERO: "░", State.UNUSED: "·", State.UNREADABLE: "✗"}
_ANSI = {State.DATA: "34", State.ZERO: "36", State.UNUSED: "90", State.UNREADABLE: "1;31"}
# Distinguishable with any colour vision (Okabe and Ito's palette).
_COLOURS = {
    State.DATA: "#0072b2",
    State.ZERO: "#56b4e9",
    State.UNUSED: "#d9d9d9",
    State.UNREADABLE: "#d55e00",
}

_SVG_STYLE = 'role="img" font-family="sans-serif" font-size="13"'
_SVG_COLUMNS, _SVG_ROWS, _SVG_CELL = 96, 32, 10


class DiskMap(NamedTuple):
    """``cells``: for each equal part of the disk, the share of bytes of each state (0 to 1);
    ``totals``: bytes of each state."""

    cells: list[dict[State, float]]
    totals: dict[State, int]


def make_disk_map(map_: BlockMap, disk: Disk, cells: int) -> DiskMap:
    """Cut the disk into no more than ``cells`` parts and sum up what is in each."""
    cells = max(min(cells, disk.blocks), 1)
    sums = [dict.fromkeys(STATES, 0) for _ in range(cells)]
    totals = dict.fromkeys(STATES, 0)
    for run in map_.runs():
        start = run.first * disk.block_size
        end = min((run.first + run.blocks) * disk.block_size, disk.size)
        totals[run.state] += end - start
        for cell, length in _spread(start, end, disk.size, cells):
            sums[cell][run.state] += length
    shares = [{state: n / max(sum(part.values()), 1) for state, n in part.items()} for part in sums]
    return DiskMap(shares, totals)


def _spread(start: int, end: int, size: int, cells: int) -> Iterator[tuple[int, int]]:
    """The cells that a range lies in, with the bytes in each."""
    cell = start * cells // size
    while start < end:
        border = -(-(cell + 1) * size // cells)
        stop = min(end, border)
        if stop > start:
            yield cell, stop - start
        start, cell = max(stop, start), cell + 1


def dominant_state(shares: dict[State, float]) -> State:
    """What a cell is drawn as: unreadable at any share, used before the rest."""
    if shares[State.UNREADABLE]:
        return State.UNREADABLE
    return max(STATES, key=lambda state: shares[state])


def draw_text(disk_map: DiskMap, *, columns: int, colour: bool) -> str:
    """Rows of one glyph a cell, and a legend."""
    glyphs = [
        f"\033[{_ANSI[state]}m{_GLYPHS[state]}\033[0m" if colour else _GLYPHS[state]
        for state in map(dominant_state, disk_map.cells)
    ]
    rows = ["".join(glyphs[at : at + columns]) for at in range(0, len(glyphs), columns)]
    legend = "   ".join(
        f"{_GLYPHS[state]} {NAMES[state]} {show_bytes(disk_map.totals[state])}" for state in STATES
    )
    return "\n".join([*rows, "", legend])


def draw_svg(disk_map: DiskMap, disk: Disk, title: str) -> str:
    """A picture with a legend, its partitions as bars on top, each cell with a tooltip."""
    width = _SVG_COLUMNS * _SVG_CELL
    top, bar = 60, 22
    rows = -(-len(disk_map.cells) // _SVG_COLUMNS)
    height = top + bar + 16 + rows * _SVG_CELL + 40
    box = f"-20 0 {width + 40} {height}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" {_SVG_STYLE}>',
        f"<title>{escape(title)}</title>",
        f'<rect x="-20" width="{width + 40}" height="{height}" fill="#ffffff"/>',
        f'<text y="32" font-size="18" font-weight="bold">{escape(title)}</text>',
        *_svg_partitions(disk, top, bar, width),
        *_svg_cells(disk_map, top + bar + 16),
        *_svg_legend(disk_map, height - 16),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def svg_cell_count() -> int:
    return _SVG_COLUMNS * _SVG_ROWS


def _svg_partitions(disk: Disk, y: int, height: int, width: int) -> Iterator[str]:
    for item in disk.partitions:
        x = item["offset"] * width / disk.size
        wide = max(item["size"] * width / disk.size, 1)
        kind = (item.get("filesystem") or {}).get("kind", "unknown")
        number = item.get("number")
        label = f"{number}: {kind}" if number is not None else kind
        yield (
            f"<g><title>{escape(label)}, {show_bytes(item['size'])}</title>"
            f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{height}" fill="#f0e442" '
            f'stroke="#333333" stroke-width="0.5"/>'
        )
        if wide > 9 * len(label):
            yield f'<text x="{x + 5:.1f}" y="{y + 15}">{escape(label)}</text>'
        yield "</g>"


def _svg_cells(disk_map: DiskMap, y: int) -> Iterator[str]:
    for n, shares in enumerate(disk_map.cells):
        left, upper = n % _SVG_COLUMNS * _SVG_CELL, y + n // _SVG_COLUMNS * _SVG_CELL
        state = dominant_state(shares)
        words = ", ".join(f"{NAMES[s]} {shares[s]:.0%}" for s in STATES if shares[s])
        yield (
            f'<rect x="{left}" y="{upper}" width="{_SVG_CELL - 1}" height="{_SVG_CELL - 1}" '
            f'fill="{_COLOURS[state]}"><title>{words}</title></rect>'
        )


def _svg_legend(disk_map: DiskMap, y: int) -> Iterator[str]:
    for n, state in enumerate(STATES):
        x = n * 220
        yield f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{_COLOURS[state]}"/>'
        text = f"{NAMES[state]} {show_bytes(disk_map.totals[state])}"
        yield f'<text x="{x + 18}" y="{y}">{text}</text>'
