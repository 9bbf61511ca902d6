"""The data backups of an image, and bringing them back onto a restored disk of this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bootmedia.guest.afterwards import data_backups
from bootmedia.guest.choosing import Back, Choice, choose, confirm, show, show_pages
from bootmedia.guest.console import Terminal
from bootmedia.guest.restoredsystem import (
    RestoredSystem,
    mounted_system,
    repository_from_disks,
    restored_systems,
)
from bootmedia.guest.session import Session
from imager.data import bringing
from imager.data.bringing import BringPlan, bring_back, plan_bringing
from imager.data.model import DataEntry
from imager.data.settings import load_entries
from imager.manifest import Manifest
from imager.units import show_bytes


def show_data_backups(session: Session, terminal: Terminal, manifest: Manifest) -> None:
    """List them, and bring them back if the person wants that."""
    lines = list(data_backups(manifest))
    show_pages(terminal, lines or ["no data backup was taken with this image"])
    if lines and confirm(terminal, "bring the data back onto a restored disk of this machine?"):
        bring_data_back(session, terminal, manifest)


def bring_data_back(session: Session, terminal: Terminal, manifest: Manifest) -> None:
    """Raises Back when the person gives up, RefusedError when the plan is refused."""
    with session.work(f"bringing back the data of {manifest.id}"):
        session.release_disks()  # the restored system wants to have them for itself
        system = _choose_system(session, terminal)
        latest = _choose_snapshots(terminal)
        with ExitStack() as stack:
            root = stack.enter_context(mounted_system(system, _sayer(session, terminal)))
            entries = [_reachable(stack, session, entry) for entry in load_entries(root)]
            choice = bringing.Choice(latest=latest)
            plans = plan_bringing(manifest, entries, root, choice, root=root)
            _carry_out(session, terminal, plans, root)


def _choose_system(session: Session, terminal: Terminal) -> RestoredSystem:
    terminal.line("looking at the attached disks ...")
    choices = [
        Choice(f"{found.host or 'a system'} on {found.volume.device}, {_words(found)}", found)
        for found in restored_systems(session.log.add)
    ]
    if not choices:
        show(terminal, ["no attached disk has a system on a plain partition"])
        show(terminal, ["LVM, RAID and LUKS are not opened here"])
        raise Back
    return choose(terminal, "The restored system that the data belongs to:", choices)


def _words(system: RestoredSystem) -> str:
    return f"{system.volume.kind}, {show_bytes(system.volume.size)}"


def _choose_snapshots(terminal: Terminal) -> bool:
    return choose(
        terminal,
        "Which state of the data?",
        [
            Choice("the one that was taken with the image", False),
            Choice("the latest that its repository has", True),
        ],
    )


def _reachable(stack: ExitStack, session: Session, entry: DataEntry) -> DataEntry:
    """With the place of a local repository that the restored system doesn't mount itself."""
    local = entry.repository.startswith("/")
    if not local or entry.engine == "command" or _is_there(entry.root, entry.repository):
        return entry
    medium = session.medium.folder if session.medium else None
    found = stack.enter_context(repository_from_disks(entry.root, entry.repository, medium))
    if found is None:
        return entry
    session.log.add(f"the repository of {entry.name} was found on an attached disk or the medium")
    return replace(entry, repository=found)


def _is_there(root: Path, path: str) -> bool:
    folder = root / path.lstrip("/")
    return folder.is_dir() and any(folder.iterdir())


def _carry_out(session: Session, terminal: Terminal, plans: list[BringPlan], root: Path) -> None:
    for plan in plans:
        terminal.line()
        show(terminal, _describe(plan))
    if any(plan.refusals for plan in plans):
        terminal.line("refused, nothing was written")
        raise Back
    if not confirm(terminal, "bring it back now?"):
        raise Back
    terminal.line("Ctrl-C stops it: some of the files are there then; begin again to have all")
    with terminal.progress() as progress:
        for plan in plans:
            bring_back(plan, progress)
            session.log.add(f"data backup {plan.entry.name} was brought back to {root}")
    show(terminal, [f"{plan.entry.name}: brought back" for plan in plans])


def _describe(plan: BringPlan) -> list[str]:
    return [
        f"Data backup {plan.entry.name}, {plan.entry.engine}, snapshot {plan.snapshot}",
        *(f"  - {path}" for path in plan.entry.paths),
        *(f"  overwrites in {text}" for text in plan.overwrites),
        *(f"  warning: {text}" for text in plan.warnings),
        *(f"  refused: {text}" for text in plan.refusals),
    ]


def _sayer(session: Session, terminal: Terminal) -> Callable[[str], None]:
    def say(text: str) -> None:
        session.log.add(text)
        show(terminal, [text])

    return say
