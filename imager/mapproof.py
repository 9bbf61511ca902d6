"""The coverage proof of the disks of a capture, and its results as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imager.capture import SourceDisk
    from imager.layout import DiskLayout, Volume
    from imager.progress import Progress


def prove_disks(disks: Sequence[SourceDisk], shown: Progress) -> list[SourceDisk]:
    """The disks with their maps proved, or given up where that failed."""
    from imager.coverage import prove_layouts

    shown.note("proving the maps")
    layouts = prove_layouts([(disk.source, disk.layout) for disk in disks])
    proved = [replace(disk, layout=layout) for disk, layout in zip(disks, layouts, strict=True)]
    for disk in proved:
        for text in proof_lines(disk.layout, holding=True):
            shown.note(f"{disk.name}: {text}")
    return proved


def all_hold(layouts: Iterable[DiskLayout]) -> bool:
    """Whether no proof failed or could not be made; true where none was asked for."""
    return not any(proof_lines(layout, holding=False) for layout in layouts)


def unproved(disks: Iterable[SourceDisk]) -> list[str]:
    """Warnings for the image."""
    return [
        f"{disk.name}: {text}" for disk in disks for text in proof_lines(disk.layout, holding=False)
    ]


def proof_lines(layout: DiskLayout, *, holding: bool) -> list[str]:
    """A line for each volume whose proof holds, or does not."""
    return [
        f"{_place(volume)}: {_VERDICTS[volume.proof.verdict]}: {volume.proof.text}"
        for volume in layout.volumes
        if volume.proof is not None and volume.proof.holds == holding
    ]


_VERDICTS = {
    "proved": "map proved",
    "nothing to prove": "nothing to prove",
    "not proved": "map NOT PROVED",
    "failed": "PROOF FAILED, all of it counts as used",
}


def _place(volume: Volume) -> str:
    return f"partition {volume.number}" if volume.number else "the disk"
