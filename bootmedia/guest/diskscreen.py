"""The disks of this machine: what each is known by, its partitions, and who uses it."""

from __future__ import annotations

from collections.abc import Iterator

from bootmedia.guest.choosing import show_pages
from bootmedia.guest.console import Terminal
from bootmedia.guest.diskwords import disk_words
from bootmedia.guest.session import Session
from imager.blocksource import FileSource
from imager.deviceuse import uses_of
from imager.diskidentity import disk_identity, disks
from imager.errors import ImagerError
from imager.layout import Volume, read_layout
from imager.units import show_bytes


def show_disks(session: Session, terminal: Terminal) -> None:
    lines: list[str] = []
    for path in disks():
        lines.append(disk_words(disk_identity(path)))
        if reason := session.reserved(path):
            lines.append(f"  {reason}")
        lines += [f"  {use.device} is {use.description}" for use in uses_of(path)]
        lines += _inside(path)
    show_pages(terminal, lines or ["no disk was found: see the log for drivers"])


def _inside(path: str) -> Iterator[str]:
    try:
        with FileSource(path) as source:
            layout = read_layout(source)
    except ImagerError as error:
        yield f"  cannot be read: {error.message}"
        return
    yield f"  partition table: {layout.table.scheme}"
    for volume in layout.volumes:
        yield f"  {_volume_words(volume)}"


def _volume_words(volume: Volume) -> str:
    inside = volume.filesystem
    where = "whole disk" if volume.number is None else str(volume.number)
    label = f' "{inside.label}"' if inside.label else ""
    used = f"{show_bytes(volume.allocation.used.total)} of {show_bytes(volume.size)} used"
    return f"{where:>3s}  {inside.kind}{label}, {used}"
