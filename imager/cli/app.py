"""The commands and their help. Engines are imported when a command runs, so that help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from imager import __version__
from imager.cli import (
    booting,
    data,
    files,
    guarding,
    images,
    media,
    mounting,
    moving,
    removing,
    repo,
    reporting,
    restoring,
    scheduling,
    serving,
    sources,
    tracking,
    verifying,
)

_HELP = """Image disks below the filesystem, and bring whole servers back.

A repository holds the images; every image is a full one, and blocks that it shares with others
are stored once. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 damaged data, 4 refused and
nothing written, 5 done with holes, 130 interrupted (run it again to go on)."""

app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"imager {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


app.command("inspect")(sources.inspect)
app.command("capture")(sources.capture)
app.command("list")(images.list_images)
app.command("show")(images.show)
app.command("map")(images.draw_map)
app.command("diff")(images.diff)
app.command("verify")(verifying.verify)
app.command("plan")(restoring.plan)
app.command("restore")(restoring.restore)
app.command("rollback")(guarding.rollback)
app.command("guard")(guarding.guard)
app.command("mount")(mounting.mount)
app.command("umount")(mounting.umount)
app.command("serve")(serving.serve)
app.command("export")(moving.export)
app.command("import")(moving.import_file)
app.command("prove")(booting.prove)
app.command("boot")(booting.boot)
app.command("commit")(booting.commit)
app.command("rm")(removing.remove)
app.command("pin")(removing.pin)
app.command("unpin")(removing.unpin)
app.command("prune")(removing.prune)
app.command("gc")(removing.gc)
app.command("report")(reporting.report)
app.command("status")(scheduling.status)
app.add_typer(scheduling.app, name="schedule")
app.add_typer(tracking.app, name="track")
app.add_typer(files.app, name="files")
app.add_typer(repo.app, name="repo")
app.add_typer(media.app, name="media")
app.add_typer(data.app, name="data")
