"""imager report."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imager.cli.options import JsonOption, RepoOption, find_image, open_repository
from imager.cli.output import print_json

if TYPE_CHECKING:
    from imager.manifest import Manifest
    from imager.repository import Repository


def report(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the page is written.")],
    name: Annotated[str | None, typer.Option(help="Only the images of this name.")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Look closer at what changed between these two images."),
    ] = None,
    max_age: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS", min=0, help="Call a server overdue whose newest image is older."
        ),
    ] = None,
    closer: Annotated[
        int, typer.Option(metavar="N", min=0, help="Draw the disks of this many servers.")
    ] = 20,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> int:
    """Write one HTML page about the repository: servers, images, age, proofs, sizes, changes.

    The page needs nothing else and loads nothing. Exit code 3 when something stored is damaged.
    """
    from datetime import UTC, datetime

    from imager.errors import IntegrityError
    from imager.jobs import replace_file
    from imager.proofs import latest_proofs
    from imager.report.collect import collect
    from imager.report.page import render
    from imager.units import count_of

    repository = open_repository(repo)
    limit = None if max_age is None else timedelta(days=max_age)
    found = collect(
        repository,
        now=datetime.now(UTC),
        name=name,
        compare=_pair(repository, compare),
        proofs={
            image_id: (proof.proved, proof.reason or proof.cause)
            for image_id, proof in latest_proofs(repository).items()
        },
        max_age=lambda its_name: limit,
        closer=closer,
    )
    replace_file(file, render(found).encode())  # a reader may have the old one open
    images = sum(len(server.images) for server in found.servers)
    overdue = [server.name for server in found.servers if server.is_overdue(found.made)]
    unproved = [server.name for server in found.servers if server.proved is None]
    if json:
        print_json(
            {
                "file": str(file),
                "servers": len(found.servers),
                "images": images,
                "overdue": overdue,
                "unproved": unproved,
                "damaged": list(found.damaged),
            }
        )
    else:
        print(f"{file}: {count_of(len(found.servers), 'server')}, {count_of(images, 'image')}")
        print(f"  {len(overdue)} overdue, {len(unproved)} without a proven image")
        for text in found.damaged:
            print(f"  DAMAGED {text}")
    return IntegrityError.exit_code if found.damaged else 0


def _pair(
    repository: Repository, texts: tuple[str, str] | None
) -> tuple[Manifest, Manifest] | None:
    if texts is None:
        return None
    return find_image(repository, texts[0]), find_image(repository, texts[1])
