"""Verify an image: every block of it against its digest."""

from __future__ import annotations

from bootmedia.guest.choosing import show_pages
from bootmedia.guest.console import Terminal
from bootmedia.guest.imagechoice import choose_image
from bootmedia.guest.session import Session
from bootmedia.guest.volumes import volumes_from
from imager.units import count_of, show_bytes
from imager.verify import verify


def verify_image(session: Session, terminal: Terminal) -> None:
    """Damage is shown, and in the log."""
    found = choose_image(session, terminal)
    task = f"verify {found.manifest.id}"
    with (
        session.work(task),
        volumes_from(session, terminal),
        terminal.progress() as progress,
    ):
        result = verify(found.repository, [found.manifest.id], progress)
    damage = [str(fault) for fault in result.faults] or result.pack_faults
    lines = [f"DAMAGED: {text}" for text in damage]
    lines.append(
        f"{count_of(result.packs, 'pack')}, {show_bytes(result.content_bytes)} of blocks: "
        f"{count_of(len(damage), 'damaged place') if damage else 'all sound'}"
    )
    session.log.add("\n".join(lines))
    show_pages(terminal, lines)
