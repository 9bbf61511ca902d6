"""imager track: what is written to a disk is noted between images."""

from __future__ import annotations

from typing import Annotated

import typer

from imager.cli.options import JsonOption
from imager.cli.output import print_json

app = typer.Typer(
    help="Note what is written to a disk, so that the next capture reads only that.",
    no_args_is_help=True,
)

DiskArgument = Annotated[str, typer.Argument(metavar="DISK", help="A disk or partition.")]


@app.command()
def start(
    disk: DiskArgument,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Be the service, until SIGTERM.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Track a disk from now on, by a service of systemd."""
    from imager.trackservice import serve
    from imager.trackunit import install_track_unit, track_unit

    if foreground:
        serve(disk, _tell_systemd)
        return 0
    _check(disk)
    runs = install_track_unit(disk)
    if json:
        print_json({"disk": disk, "unit": track_unit(disk), "runs": runs})
    elif runs:
        print(f"{disk} is tracked: the next capture reads all of it, those after it what changed")
    else:
        print(f"{track_unit(disk)} is written; no systemd runs here that would start it")
    return 0


@app.command()
def status(disk: DiskArgument, json: JsonOption = False) -> int:
    """Say what a capture would read now. Exit code 1 when the disk is not tracked."""
    from imager.trackrecord import TrackClient
    from imager.units import show_bytes

    with TrackClient(disk) as client:
        found = client.ask("status")
    if json:
        print_json(found)
    elif found["since"]:
        print(
            f"{disk}: {show_bytes(found['written_bytes'])} written since the image {found['since']}"
        )
    else:
        print(f"{disk}: the next capture reads all of it: {found['reason']}")
    return 1 if found["off"] else 0


@app.command()
def stop(disk: DiskArgument, json: JsonOption = False) -> int:
    """Track a disk no longer."""
    from imager.errors import ImagerError
    from imager.trackrecord import TrackClient
    from imager.trackservice import forget
    from imager.trackunit import remove_track_unit

    was_there = remove_track_unit(disk)
    try:
        with TrackClient(disk) as client:
            client.ask("stop")
            client.wait()
    except ImagerError:
        if not was_there:
            raise
    forget(disk)
    if json:
        print_json({"disk": disk})
    else:
        print(f"{disk} is tracked no longer")
    return 0


def _check(disk: str) -> None:
    """Raises ImagerError where the service could not track it."""
    from imager.blocksource import FileSource
    from imager.blocktrace import disk_of, tracefs

    with FileSource(disk):
        disk_of(disk)
    tracefs()


def _tell_systemd() -> None:
    """sd_notify(3): whoever waits for the start may capture from now on."""
    import os
    import socket

    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
            door.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            door.sendall(b"READY=1")
