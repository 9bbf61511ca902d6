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
    lines = [line for path in disks() for line in _disk_lines(session, path)]
    show_pages(terminal, lines or ["no disk was found: see the log for drivers"])


def _disk_lines(session: Session, path: str) -> Iterator[str]:
    yield disk_words(disk_identity(path))
    try:
        if reason := session.reserved(path):
            yield f"  {reason}"
        yield from (f"  {use.device} is {use.description}" for use in uses_of(path))
        with FileSource(path) as source:
            layout = read_layout(source)
    except (ImagerError, OSError) as error:  # pulled out meanwhile, or broken
        yield f"  cannot be read: {error}"
        return
    yield f"  partition table: {layout.table.scheme}"
    yield from (f"  {_volume_words(volume)}" for volume in layout.volumes)


def _volume_words(volume: Volume) -> str:
    inside = volume.filesystem
    where = "whole disk" if volume.number is None else str(volume.number)
    label = f' "{inside.label}"' if inside.label else ""
    used = f"{show_bytes(volume.allocation.used.total)} of {show_bytes(volume.size)} used"
    return f"{where:>3s}  {inside.kind}{label}, {used}"
