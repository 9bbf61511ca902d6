"""``imager mount``: disks of an image as files, or one of its filesystems, until it is unmounted.

A server, a process of its own, gives the files out (``fuseserver``). It tells this one that it is
ready, or why not. Nothing is written down anywhere: the mount's source has the server's
process id, and with a filesystem the loop device below leads to the server's folder, so that
``unmounting`` finds all of it also when processes were killed.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from imager.coverage.view import SparseView
from imager.errors import ImagerError, UsageError
from imager.extents import Extents
from imager.fuseserver import OnError, ServedFile, serve_files
from imager.imagevolumes import ImageVolume, OpenDisk, disk_volumes, find_volume, image_volumes
from imager.kernelmount import mount_read_only
from imager.mounttable import mount_at
from imager.process import LeftRunning, leave_running

SOURCE_PREFIX = "imager-"
"""Of the mount's source, before the server's process id."""

# All disks together; what is read again comes out of the kernel's pages anyway.
CACHE_BYTES = 128 << 20

_RUN_FOLDER = Path("/run/imager")


class Served(NamedTuple):
    """What a server said when it was ready."""

    server: LeftRunning
    connection: socket.socket
    """To it, until it goes its own way."""
    files: list[dict[str, Any]]
    """``name``, ``size``; of a filesystem ``kind``, ``uuid`` and ``sector`` size too."""


ServerCommand = Callable[[Path, int], list[str]]
"""The command line of a server for a folder, which answers on an open socket."""


def mount_disks(command: ServerCommand, folder: Path) -> Served:
    """Files in ``folder``; the server runs on. Raises UsageError, ImagerError."""
    _check_folder(folder)
    served = _start(command, folder)
    served.connection.close()
    return served


def mount_filesystem(command: ServerCommand, folder: Path) -> Served:
    """A filesystem at ``folder``, mounted read-only by the kernel; the server runs on.

    Raises UsageError, ImagerError: not root, or the kernel doesn't know the kind.
    """
    _check_folder(folder)
    if os.geteuid() != 0:
        raise ImagerError(
            "only root can mount a filesystem",
            hint="imager files reads it without; without --filesystem it is mounted as a file",
        )
    _RUN_FOLDER.mkdir(mode=0o755, exist_ok=True)
    below = Path(tempfile.mkdtemp(prefix="mount-", dir=_RUN_FOLDER))
    try:
        served = _start(command, below)
    except BaseException:
        with suppress(OSError):
            below.rmdir()
        raise
    (file,) = served.files
    with served.connection:  # after that the server ends when nobody has the file open
        path = below / file["name"]
        mount_read_only(path, file["kind"], file["uuid"], file["sector"], folder)
    return served


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", hint=f"make it: mkdir {folder}")
    if mount_at(folder) is not None:
        raise UsageError(f"something is mounted at {folder} already")
    if any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty")


def _start(command: ServerCommand, folder: Path) -> Served:
    own, other = socket.socketpair()
    with other:
        try:
            server = leave_running(command(folder, other.fileno()), inherit=[other.fileno()])
        except BaseException:
            own.close()
            raise
    with own.makefile("rb") as answers:
        said = answers.readline()
    if not said:
        own.close()
        raise ImagerError("the server of the mount ended before it was ready")
    answer = json.loads(said)
    if "error" in answer:
        own.close()
        server.wait()
        error = ImagerError(answer["error"], hint=answer.get("hint"))
        error.exit_code = answer["exit_code"]
        raise error
    return Served(server, own, answer["files"])


# --- in the server ---


class Leader:
    """Who started this server: waits for one answer, and is followed as long as it lives."""

    def __init__(self, descriptor: int) -> None:
        self.connection = socket.socket(fileno=descriptor)
        self.has_answer = False

    def answer(self, **document: object) -> None:
        self.has_answer = True
        with suppress(OSError):  # it was killed
            self.connection.sendall(json.dumps(document).encode() + b"\n")


def serve_disks(disks: Sequence[OpenDisk], folder: Path, leader: Leader, on_error: OnError) -> None:
    """Each disk, partition and logical volume as a file, until it is unmounted."""
    places: dict[str, ServedFile] = {}
    for disk, source in disks:
        places[disk.name] = ServedFile(disk.name, source.size, source.pread)
    for volume in [*disk_volumes(disks), *image_volumes(disks)]:
        places.setdefault(volume.file_name, _file(volume))
    files = sorted(places.values(), key=lambda file: file.name)
    told = [{"name": file.name, "size": file.size} for file in files]
    serve_files(
        folder,
        files,
        source=f"{SOURCE_PREFIX}{os.getpid()}",
        on_ready=lambda: leader.answer(files=told),
        on_error=on_error,
    )


def serve_volume(
    disks: Sequence[OpenDisk],
    where: str,
    folder: Path,
    leader: Leader,
    on_error: OnError,
) -> None:
    """One volume as a file that takes writes into memory, until nobody has it open any more."""
    volume, _ = find_volume(image_volumes(disks), where)
    if volume.reason is not None:
        raise ImagerError(f"{volume.name} can't be mounted: {volume.reason}")
    view = SparseView(volume.source, Extents.whole(volume.source.size), Extents(), b"")
    file = ServedFile(volume.file_name, view.size, view.read, view.write)
    told = {
        "name": file.name,
        "size": file.size,
        "kind": volume.filesystem.kind,
        "uuid": volume.filesystem.uuid,
        "sector": volume.source.logical_sector,
    }
    try:
        serve_files(
            folder,
            [file],
            source=f"{SOURCE_PREFIX}{os.getpid()}",
            on_ready=lambda: leader.answer(files=[told]),
            on_error=on_error,
            in_pages=False,
            leader=leader.connection,
        )
    finally:
        with suppress(OSError):
            folder.rmdir()


def _file(volume: ImageVolume) -> ServedFile:
    return ServedFile(volume.file_name, volume.source.size, volume.source.pread)
