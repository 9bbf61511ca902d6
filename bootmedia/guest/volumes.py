"""A medium of several volumes: have the person at a terminal put in the one that is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from time import sleep

from bootmedia.guest.choosing import show
from bootmedia.guest.console import Terminal
from bootmedia.guest.medium import Medium, eject, find_medium
from bootmedia.guest.session import Session
from imager.errors import ImagerError, ObjectMissing

# A drive takes some seconds to know a new disc.
_SECONDS = 15.0

# Other threads may be reading the last of it.
_EJECT_TRIES, _EJECT_AGAIN_SECONDS = 6, 0.5


@contextmanager
def volumes_from(session: Session, terminal: Terminal) -> Iterator[None]:
    """For the time of the block, it is this terminal that is asked for volumes. Only the terminal
    that is at work may do so: see ``Session.work``."""
    before = session.ask_for_volume
    session.ask_for_volume = partial(have_put_in, session, terminal)
    try:
        yield
    finally:
        session.ask_for_volume = before


def have_put_in(session: Session, terminal: Terminal, number: int) -> Path:
    """Where the volume is mounted; it is the session's medium from now on.

    Raises KeyboardInterrupt when the person gives up.
    """
    medium = _find(session, number, seconds=0)
    if medium is None:
        _eject_disc(session, terminal)
    while medium is None:
        terminal.line()
        terminal.ask(f"Put in volume {number} of the medium, then press Enter (Ctrl-C: give up) ")
        medium = _find(session, number, seconds=_SECONDS)
        if medium is None:
            show(terminal, [f"volume {number} was not found on any disk or drive"])
    session.medium = medium
    session.log.add(f"volume {number} of the medium is {medium.device}")
    return medium.folder


def _find(session: Session, number: int, seconds: float) -> Medium | None:
    with suppress(ObjectMissing):
        return find_medium(session.job.medium_id, seconds, volume=number)
    return None


def _eject_disc(session: Session, terminal: Terminal) -> None:
    """A machine often has one drive."""
    old = session.medium
    if old is None:
        return
    for attempt in range(_EJECT_TRIES):
        try:
            eject(old)
            return
        except ImagerError as error:
            if attempt + 1 == _EJECT_TRIES:
                session.log.add(f"the disc could not be ejected: {error.message}")
                show(terminal, ["", f"the disc could not be ejected: {error.message}"])
            sleep(_EJECT_AGAIN_SECONDS)
