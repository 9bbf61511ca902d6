"""The images that can be restored, from everywhere they may be."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from bootmedia.guest.choosing import Choice, choose, show
from bootmedia.guest.console import Terminal
from bootmedia.guest.session import Found, Origin, Session
from imager.errors import ImagerError
from imager.manifest import Manifest
from imager.units import count_of, show_bytes

_HOUR, _DAY = 3600, 86400


def choose_image(session: Session, terminal: Terminal) -> Found:
    """Raises Back when none is chosen, IntegrityError when the one that is chosen has changed
    since the medium was made."""
    while True:
        choices: list[Choice[Found | None]] = [
            Choice(_words(found), found) for found in _images(session, terminal)
        ]
        search = Choice[Found | None]("look for repositories on the attached disks", None, key="s")
        title = "Images, newest first:" if choices else "No image is at hand."
        chosen = choose(terminal, title, [*choices, search])
        if chosen is not None:
            session.check_pinned(chosen.manifest)
            return chosen
        _search(session, terminal)


def age(seconds: float) -> str:
    """For people: hours, then days."""
    if seconds < 0:
        return "in the future, by this machine's clock"
    if seconds < 2 * _DAY:
        return f"{count_of(int(seconds) // _HOUR, 'hour')} ago"
    return f"{int(seconds) // _DAY} days ago"


def _images(session: Session, terminal: Terminal) -> list[Found]:
    """Newest first. What could not be read is said."""
    found = [image for origin in session.origins() for image in _of(session, terminal, origin)]
    return sorted(found, key=lambda image: image.manifest.id, reverse=True)


def _of(session: Session, terminal: Terminal, origin: Origin) -> Iterator[Found]:
    def say(error: ImagerError) -> None:
        session.log.add(f"{origin.url}: {error.message}")
        show(terminal, [f"{origin.url} ({origin.title}): {error.message}"])

    try:
        repository = session.repository(origin)
        for manifest in repository.manifests(say):
            yield Found(origin, repository, manifest)
    except ImagerError as error:
        say(error)


def _search(session: Session, terminal: Terminal) -> None:
    terminal.line("looking at the attached disks ...")
    with session.work("looking for repositories"):
        new = session.search_disks()
    for origin in new:
        show(terminal, [f"a repository {origin.title}: {origin.url}"])
    if not new:
        terminal.line("there is no further repository on them")


def _words(found: Found) -> str:
    manifest = found.manifest
    marks = ["INCOMPLETE"] if manifest.partial else []
    disks = ", ".join(f"{disk.name} {show_bytes(disk.size)}" for disk in manifest.disks)
    title = " ".join([manifest.name, _when(manifest), *marks, manifest.note])
    return f"{title}\n{disks}; {found.origin.title}; {manifest.id}"


def _when(manifest: Manifest) -> str:
    """Time of the capture and its age."""
    try:
        created = datetime.strptime(manifest.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return manifest.created
    return f"{created:%Y-%m-%d %H:%M} UTC ({age((datetime.now(UTC) - created).total_seconds())})"
