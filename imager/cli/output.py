"""What commands print: one JSON document, or text with aligned columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from imager.extents import Extents


def print_json(document: object) -> None:
    print(json.dumps(document, ensure_ascii=False, indent=1, default=_encode))


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, right: str = ""
) -> None:
    """Columns as wide as they must be; ``right`` names the columns to align to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[n]) for line in [list(header), *texts]) for n in range(len(header))]
    numeric = [name in right.split() for name in header]
    for line in [list(header), *texts]:
        cells = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, numeric, strict=True)
        )
        print("  ".join(cells).rstrip())


def _encode(value: object) -> Any:
    if isinstance(value, Extents):
        return [list(extent) for extent in value]
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
