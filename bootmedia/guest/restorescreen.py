"""Restore an image: which one, to which disks, and how; then what it means, and the word to type.

Nothing is written before the name of each target was typed.
"""

from __future__ import annotations

from pathlib import Path

from bootmedia.guest.afterwards import data_backups
from bootmedia.guest.choosing import Back, Choice, choose, confirm, show
from bootmedia.guest.console import Terminal
from bootmedia.guest.datascreen import bring_data_back
from bootmedia.guest.diskwords import disk_words
from bootmedia.guest.imagechoice import choose_image
from bootmedia.guest.restoring import Prepared, carry_out, describe, prepare
from bootmedia.guest.session import Found, Session
from bootmedia.guest.targets import Candidate, candidates
from bootmedia.guest.volumes import volumes_from
from imager.errors import ImagerError
from imager.manifest import Disk
from imager.plan import RestoreOptions
from imager.units import show_bytes

ANYWAY = "anyway"


def restore_image(session: Session, terminal: Terminal) -> str | None:
    """Returns "reboot" when the machine is to restart. Raises Back when the person gives up."""
    found = choose_image(session, terminal)
    targets = _choose_targets(session, terminal, found)
    prepared = _prepare(session, terminal, found, targets)
    _refuse(terminal, prepared)
    anyway = _accept_verdict(terminal, prepared)
    for item in prepared:
        _have_typed(terminal, item)
    with session.work(f"restore {found.manifest.id}"), volumes_from(session, terminal):
        for item in prepared:
            _carry_out(session, terminal, item, anyway)
    _offer_data(session, terminal, found)
    return "reboot" if confirm(terminal, "restart now?") else None


def _offer_data(session: Session, terminal: Terminal, found: Found) -> None:
    """What goes wrong there does not take the restore back."""
    if not any(data_backups(found.manifest)):
        return
    if not confirm(terminal, "bring its data back now, from the data backup?"):
        return
    try:
        bring_data_back(session, terminal, found.manifest)
    except Back:
        terminal.line("the data was not brought back: the menu has it too")
    except ImagerError as error:
        session.log.add(error.message)
        show(terminal, ["", f"error: the data was not brought back: {error.message}"])


def _choose_targets(
    session: Session, terminal: Terminal, found: Found
) -> list[tuple[Disk, Candidate]]:
    """A target for each disk of the image, but for those that are left out."""
    targets: list[tuple[Disk, Candidate]] = []
    disks = found.manifest.disks
    for disk in disks:
        taken = {candidate.path: of.name for of, candidate in targets}
        choices: list[Choice[Candidate | None]] = [
            Choice(
                disk_words(candidate.identity),
                candidate,
                _refusal(candidate, taken),
            )
            for candidate in candidates(session)
        ]
        if len(disks) > 1:
            choices.append(Choice("leave this disk of the image out", None, key="l"))
        title = f"Target for {disk.name} of the image, {show_bytes(disk.size)}:"
        chosen = choose(terminal, title, choices)
        if chosen is not None:
            targets.append((disk, chosen))
    if not targets:
        raise Back
    return targets


def _refusal(candidate: Candidate, taken: dict[str, str]) -> str | None:
    if candidate.path in taken:
        return f"chosen for {taken[candidate.path]}"
    return candidate.reason


def _ask_options(terminal: Terminal) -> RestoreOptions:
    grow = confirm(terminal, "grow the last partition to fill a larger disk?")
    delta = confirm(terminal, "compare first, and write only what differs?")
    read_back = confirm(terminal, "read all of it again afterwards, and compare?")
    return RestoreOptions(grow=grow, delta=delta, read_back=read_back)


def _prepare(
    session: Session, terminal: Terminal, found: Found, targets: list[tuple[Disk, Candidate]]
) -> list[Prepared]:
    """Find out and show what the restore would do. No terminal is kept from work while the person
    thinks about it."""
    options = _ask_options(terminal)
    terminal.line("looking at the image and the disks ...")
    with session.work(f"planning to restore {found.manifest.id}"), volumes_from(session, terminal):
        prepared = [
            prepare(session, found, disk, candidate.path, options) for disk, candidate in targets
        ]
    for item in prepared:
        terminal.line()
        show(terminal, describe(item))
    return prepared


def _refuse(terminal: Terminal, prepared: list[Prepared]) -> None:
    if any(item.refusals for item in prepared):
        terminal.line("refused, nothing was written")
        raise Back


def _accept_verdict(terminal: Terminal, prepared: list[Prepared]) -> bool:
    """Whether it is to be restored although it won't boot here."""
    if not any(item.comparison.verdict == "will not boot" for item in prepared):
        return False
    if terminal.ask(f"It will not boot in this machine. To go on, type {ANYWAY}: ") != ANYWAY:
        terminal.line("nothing was written")
        raise Back
    return True


def _have_typed(terminal: Terminal, prepared: Prepared) -> None:
    """Raises Back unless the target's name is typed exactly."""
    target = prepared.plan.target
    name = Path(target).name
    show(terminal, [f"All that is on {target} will be overwritten."])
    if terminal.ask(f"To restore, type the name of the target ({name}): ") not in (name, target):
        terminal.line("that is another name: nothing was written")
        raise Back


def _carry_out(session: Session, terminal: Terminal, prepared: Prepared, anyway: bool) -> None:
    terminal.line("Ctrl-C stops it: the target is marked as unfinished then, and can be gone on")
    terminal.line("with later.")
    with terminal.progress() as progress:
        lines = carry_out(session, prepared, progress, despite_hardware=anyway)
    show(terminal, lines)
