"""What a disk holds, in words for someone who is about to overwrite it."""

from __future__ import annotations

from collections.abc import Iterator

from imager.allocation import identify
from imager.blocksource import BlockSource, PartSource
from imager.partitions import read_partition_table


def what_is_on(source: BlockSource) -> Iterator[str]:
    """Partitions and what is in them, or the filesystem of a disk without; nothing for what is not
    known."""
    table = read_partition_table(source)
    for part in table.partitions:
        inside = identify(PartSource(source, part.offset, part.size))
        kind = part.type_name if inside.kind == "unknown" else inside.kind
        words = [f"partition {part.number}:", kind, part.name or inside.label]
        yield " ".join(filter(None, words))
    if not table.partitions and (inside := identify(source)).kind != "unknown":
        yield f"{inside.kind} {inside.label or ''}".rstrip()
