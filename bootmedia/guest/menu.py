"""The menu of the rescue system, on one terminal. Whatever goes wrong leads back to it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bootmedia.guest import system
from bootmedia.guest.capturing import capture_disks
from bootmedia.guest.choosing import Back, Choice, choose, show, show_pages
from bootmedia.guest.console import Terminal, TerminalLost
from bootmedia.guest.datascreen import show_data_backups
from bootmedia.guest.diskscreen import show_disks
from bootmedia.guest.imagechoice import age, choose_image
from bootmedia.guest.network import Network
from bootmedia.guest.networkscreen import set_up_network
from bootmedia.guest.restorescreen import restore_image
from bootmedia.guest.session import Session
from bootmedia.guest.verifyscreen import verify_image
from imager.errors import ImagerError
from imager.fingerprint import is_secure_boot_on
from imager.units import show_bytes


@dataclass(frozen=True)
class Desk:
    """What a screen works with."""

    session: Session
    terminal: Terminal
    network: Network


class Screen(NamedTuple):
    """``open`` returns how the machine is to end: "reboot" or "poweroff"; None: it goes on."""

    key: str
    title: str
    open: Callable[[Desk], str | None]


def run(session: Session, terminal: Terminal, network: Network) -> str:
    """Returns "reboot" or "poweroff". Raises TerminalLost."""
    desk = Desk(session, terminal, network)
    _step(desk, _show_menu)
    _announce(session)
    while (end := _step(desk, _choose_screen)) is None:
        pass
    return end


def _step(desk: Desk, open_screen: Callable[[Desk], str | None]) -> str | None:
    """One screen; errors are shown, and the log has all of them."""
    session, terminal = desk.session, desk.terminal
    try:
        return open_screen(desk)
    except TerminalLost:
        raise
    except (Back, KeyboardInterrupt):
        terminal.line()
    except ImagerError as error:
        session.log.add(f"{error.message}{f' ({error.hint})' if error.hint else ''}")
        show(terminal, ["", f"error: {error.message}"])
        if error.hint:
            show(terminal, [f"hint: {error.hint}"])
    except Exception as error:
        session.log.add_error(error)
        show(terminal, ["", f"unexpected {type(error).__name__}: details are in the log"])
    return None


# --- the menu -----------------------------------------------------------------------------------


def _show_menu(desk: Desk) -> None:
    desk.terminal.line()
    show(desk.terminal, _head(desk))
    desk.terminal.line()
    for screen in SCREENS:
        desk.terminal.line(f"  {screen.key}  {screen.title}")


def _choose_screen(desk: Desk) -> str | None:
    """The menu is shown again when that is asked for only: what a screen has said stays in view."""
    answer = desk.terminal.ask("menu, 1 to 9 (Enter: show it)? ")
    screen = next((screen for screen in SCREENS if screen.key == answer), None)
    if screen is None:
        _show_menu(desk)
    elif (end := screen.open(desk)) is not None:
        with desk.session.work("ending the session"):  # refused while another is at work
            return end
    return None


def _head(desk: Desk) -> Iterator[str]:
    """What this is, and what it found."""
    job = desk.session.job
    medium = desk.session.medium
    where = f" on {medium.device}" if medium and medium.device else ""
    yield f"imager {job.tool_version} rescue system, kernel {os.uname().release}"
    yield f"medium {job.medium_id}{where}, made {age(time.time() - job.created)}"
    if job.images:
        carried = ", ".join(f"{image.name or ''} {image.id}".strip() for image in job.images)
        yield f"images: {carried}"
    for url in job.repositories:
        yield f"repository: {url}"
    yield f"memory: {show_bytes(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))}"
    cards = desk.network.cards()
    for card in cards:
        yield f"network: {card.words()}"
    if not cards:
        yield "network: no card with a driver"


_to_announce = threading.Lock()
"""Taken by the first terminal."""


def _announce(session: Session) -> None:
    """Once in a boot, whichever terminal is first."""
    if _to_announce.acquire(blocking=False):
        job = session.job
        system.announce(
            f"imager-rescue: ready version={job.tool_version} kernel={os.uname().release} "
            f"medium={job.medium_id}{' secure boot=on' if is_secure_boot_on() else ''}"
        )


# --- screens ------------------------------------------------------------------------------------


def _restore(desk: Desk) -> str | None:
    return restore_image(desk.session, desk.terminal)


def _verify(desk: Desk) -> None:
    verify_image(desk.session, desk.terminal)


def _disks(desk: Desk) -> None:
    show_disks(desk.session, desk.terminal)


def _network(desk: Desk) -> None:
    set_up_network(desk.terminal, desk.network)


def _capture(desk: Desk) -> None:
    capture_disks(desk.session, desk.terminal)


def _data_backups(desk: Desk) -> None:
    found = choose_image(desk.session, desk.terminal)
    show_data_backups(desk.session, desk.terminal, found.manifest)


def _log(desk: Desk) -> None:
    lines = desk.session.log.lines() or ["nothing has happened yet"]
    show_pages(desk.terminal, lines, last_first=True)


def _shell(desk: Desk) -> None:
    desk.terminal.line("exit leads back to the menu")
    desk.terminal.shell()


def _end(desk: Desk) -> str:
    return choose(
        desk.terminal,
        "End:",
        [Choice("restart the machine", "reboot"), Choice("switch it off", "poweroff")],
    )


SCREENS = (
    Screen("1", "restore an image", _restore),
    Screen("2", "verify an image", _verify),
    Screen("3", "disks of this machine", _disks),
    Screen("4", "network", _network),
    Screen("5", "capture this machine's disks", _capture),
    Screen("6", "data backups of an image", _data_backups),
    Screen("7", "log", _log),
    Screen("8", "shell", _shell),
    Screen("9", "restart or switch off", _end),
)
