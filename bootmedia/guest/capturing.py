"""Capture this machine's disks, offline, into a repository on another attached disk."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from shutil import disk_usage

from bootmedia.guest.attached import Volume, find_repositories, mounted, volumes
from bootmedia.guest.choosing import Back, Choice, choose, confirm, show
from bootmedia.guest.console import Terminal
from bootmedia.guest.diskwords import disk_words
from bootmedia.guest.session import Session
from imager.belonging import missing_members
from imager.blocksource import FileSource
from imager.capture import CaptureJob, SourceDisk, capture
from imager.deviceuse import device_numbers, uses_of
from imager.diskidentity import disk_identity, disks
from imager.errors import RefusedError, UsageError
from imager.fingerprint import read_fingerprint
from imager.layout import read_layouts
from imager.manifest import Manifest
from imager.repository import Repository
from imager.units import count_of, show_bytes

NEW_REPOSITORY = "imager"
"""The folder of a repository that is made on a disk without one."""

_NEVER_WRITTEN = frozenset({"iso9660", "udf"})

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def capture_disks(session: Session, terminal: Terminal) -> None:
    """Raises Back when the person gives up, ImagerError when it fails: what is stored already is
    found again by the next capture."""
    with session.work("releasing the disks that were looked into"):
        session.release_disks()
    volume = _choose_volume(session, terminal)
    sources = _choose_sources(session, terminal, volume)
    name, note = _ask_name(terminal)
    with session.work("capture"), mounted(volume, writable=True) as folder:
        repository = _choose_repository(terminal, folder)
        manifest = _capture(session, terminal, sources, repository, name, note)
    show(terminal, _result(manifest))


def _choose_volume(session: Session, terminal: Terminal) -> Volume:
    choices = [
        Choice(_volume_words(volume), volume, session.reserved(volume.device))
        for volume in volumes()
        if volume.kind not in _NEVER_WRITTEN
    ]
    if not choices:
        raise UsageError(
            "there is no filesystem to write the image to",
            hint="attach a disk with one that has room for what is used on the captured disks",
        )
    return choose(terminal, "Write the image to:", choices)


def _choose_sources(session: Session, terminal: Terminal, volume: Volume) -> list[str]:
    """Device nodes: one disk, or all that may be captured."""
    found = [(path, _refusal(session, path, volume)) for path in disks()]
    free = [path for path, refused in found if refused is None]
    choices = [Choice(disk_words(disk_identity(path)), [path], refused) for path, refused in found]
    if len(free) > 1:
        choices.append(Choice(f"all of them, as one image: {' '.join(free)}", free, key="a"))
    return choose(terminal, "Disk to capture:", choices)


def _refusal(session: Session, path: str, volume: Volume) -> str | None:
    """A disk that is only read may be in use, but not be written to meanwhile."""
    try:
        if device_numbers(path) & device_numbers(volume.device):
            return "the image is written to it"
        return session.reserved(path) or next(iter(_writers(path)), None)
    except OSError as error:  # pulled out meanwhile
        return f"cannot be read: {error.strerror}"


def _writers(path: str) -> list[str]:
    return [f"{use.device} is {use.description}" for use in uses_of(path) if use.writable]


def _choose_repository(terminal: Terminal, folder: Path) -> Repository:
    """One that is there, or a new one."""
    found, new = list(find_repositories(folder)), folder / NEW_REPOSITORY
    make = f"a new repository in /{NEW_REPOSITORY}"
    if not found and not confirm(terminal, f"make {make}?"):
        raise Back
    choices = [Choice(f"the repository in /{path.relative_to(folder)}", path) for path in found]
    if new not in found:
        choices.append(Choice(make, new))
    path = choose(terminal, "Repository on it:", choices) if found else new
    return Repository.open(str(path)) if path in found else Repository.create(str(path))


def _ask_name(terminal: Terminal) -> tuple[str, str]:
    """Name and note of the image."""
    name = terminal.ask("name of the machine, as the image's name: ")
    if not name:
        raise Back
    if not _NAME.fullmatch(name):
        raise UsageError(f"the name {name}: letters, digits, dots, dashes, underscores only")
    return name, terminal.ask("a note to find it by (Enter: none): ")


def _capture(
    session: Session,
    terminal: Terminal,
    sources: list[str],
    repository: Repository,
    name: str,
    note: str,
) -> Manifest:
    with ExitStack() as stack:
        opened = _open_disks(sources, stack)
        warnings = tuple(missing_members(opened))
        show(terminal, [f"warning: {text}" for text in warnings])
        job = CaptureJob(tuple(opened), name, note, hardware=read_fingerprint(), warnings=warnings)
        used = sum(disk.layout.used().total for disk in opened)
        free = show_bytes(disk_usage(repository.store.url).free)
        show(terminal, [f"{show_bytes(used)} will be read of {' '.join(sources)}; {free} are free"])
        if not confirm(terminal, "begin now?"):
            raise Back
        progress = stack.enter_context(terminal.progress())
        manifest = capture(job, repository, progress)
    session.log.add(f"captured {manifest.id} into {repository.store.url}")
    return manifest


def _open_disks(paths: list[str], stack: ExitStack) -> list[SourceDisk]:
    if writers := [text for path in paths for text in _writers(path)]:
        raise RefusedError(writers, hint="unmount it in a shell")
    sources = [stack.enter_context(FileSource(path)) for path in paths]
    return [
        SourceDisk(Path(source.path).name, source, layout, disk_identity(source.path))
        for source, layout in zip(sources, read_layouts(sources), strict=True)
    ]


def _volume_words(volume: Volume) -> str:
    label = f' "{volume.label}"' if volume.label else ""
    return f"{volume.device} {volume.kind}{label} {show_bytes(volume.size)}"


def _result(manifest: Manifest) -> list[str]:
    counts = manifest.statistics
    text = (
        f"image {manifest.id} of {manifest.name}: {show_bytes(counts['read_bytes'])} read, "
        f"{show_bytes(counts['stored_bytes'])} added"
    )
    return [text] + [
        f"UNREADABLE: {count_of(len(disk.unreadable), 'range')} of {disk.name} "
        f"({show_bytes(disk.unreadable.total)})"
        for disk in manifest.disks
        if disk.unreadable
    ]
