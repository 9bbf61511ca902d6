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
    columns = [[str(cell) for cell in column] for column in zip(header, *rows, strict=True)]
    cells = [
        f"{{:{'>' if name in right.split() else '<'}{max(map(len, column))}}}"
        for name, column in zip(header, columns, strict=True)
    ]
    line = "  ".join(cells).format
    print("\n".join(line(*row).rstrip() for row in zip(*columns, strict=True)))


def _encode(value: object) -> Any:
    if isinstance(value, Extents):
        return [list(extent) for extent in value]
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
