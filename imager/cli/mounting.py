"""imager mount, umount."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imager.cli.options import ImageArgument, JsonOption, RepoOption, find_disks, open_repository
from imager.cli.output import print_json

if TYPE_CHECKING:
    from imager.errors import ImagerError
    from imager.mounting import Served, ServerCommand

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="An empty folder.")]


def mount(
    image: ImageArgument,
    folder: FolderArgument,
    filesystem: Annotated[
        str | None,
        typer.Option(
            metavar="PARTITION",
            help="Mount a filesystem instead of giving out files: a partition's number, or VG/LV.",
        ),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until Ctrl-C, and unmount then.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
    serve_to: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Show an image's disks, partitions and logical volumes as read-only files in DIR.

    With --filesystem, a filesystem itself: the kernel mounts it read-only, and what it writes to
    replay a journal stays in memory. It lasts until `imager umount DIR`.
    """
    if serve_to is not None:
        _serve(image, folder, filesystem, repo, serve_to)
        return
    from imager.mounting import mount_disks, mount_filesystem
    from imager.unmounting import unmount

    find_disks(open_repository(repo), image)
    folder = folder.absolute()
    command = _server_command(image, filesystem, repo)
    served = (mount_filesystem if filesystem is not None else mount_disks)(command, folder)
    if json:
        print_json({"folder": str(folder), "server": served.server.pid, "files": served.files})
    else:
        _show(served, folder, filesystem, foreground)
    sys.stdout.flush()
    if foreground:
        try:
            served.server.wait()
        except KeyboardInterrupt:
            unmount(folder)


def umount(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where an image is mounted.")],
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Out of sight now; the rest when nobody uses it.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Unmount what `imager mount` mounted: loop device, server and memory go too.

    While it is in use, says by whom. Also clears what killed servers left.
    """
    from imager.unmounting import unmount

    unmount(folder, lazy=lazy)
    if json:
        print_json({"unmounted": str(folder)})


def _show(served: Served, folder: Path, filesystem: str | None, foreground: bool) -> None:
    from imager.units import show_bytes

    if filesystem is not None:
        (file,) = served.files
        print(f"{file['name']} ({file['kind']}) is mounted read-only at {folder}")
    else:
        for file in served.files:
            print(f"{folder / file['name']}  {show_bytes(file['size'])}")
    print("end with Ctrl-C" if foreground else f"unmount: imager umount {folder}")


def _server_command(image: str, filesystem: str | None, repo: str | None) -> ServerCommand:
    from imager.config import repository_url

    url = repository_url(repo)
    where = url if "://" in url else str(Path(url).absolute())

    def command(folder: Path, answer: int) -> list[str]:
        chosen = [] if filesystem is None else [f"--filesystem={filesystem}"]
        words = [sys.executable, "-m", "imager", "mount", *chosen, f"--repo={where}"]
        return [*words, f"--serve-to={answer}", "--", image, str(folder)]

    return command


def _serve(
    image: str, folder: Path, filesystem: str | None, repo: str | None, descriptor: int
) -> None:
    """The server's process: nobody sees what it prints, so errors go back to who started it."""
    from imager.errors import ImagerError
    from imager.imagevolumes import open_disks
    from imager.mounting import CACHE_BYTES, Leader, serve_disks, serve_volume

    leader = Leader(descriptor)
    try:
        _, disks = find_disks(open_repository(repo), image)
        with open_disks(lambda: open_repository(repo), disks, cache_bytes=CACHE_BYTES) as opened:
            if filesystem is None:
                serve_disks(opened, folder, leader, _to_system_log())
            else:
                serve_volume(opened, filesystem, folder, leader, _to_system_log())
    except ImagerError as error:
        if leader.has_answer:
            raise
        leader.answer(error=error.message, hint=error.hint, exit_code=error.exit_code)
    except OSError as error:
        if leader.has_answer:
            raise
        leader.answer(error=str(error), hint=None, exit_code=1)


def _to_system_log() -> Callable[[str, ImagerError], None]:
    """Each damaged place once, however often it is read."""
    import syslog

    known: set[str] = set()

    def log(name: str, error: ImagerError) -> None:
        if error.message not in known and len(known) < 1000:
            known.add(error.message)
            syslog.syslog(syslog.LOG_ERR, f"imager mount, {name}: {error.message}")

    return log
