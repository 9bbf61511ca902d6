"""imager repo: make and describe a repository."""

from __future__ import annotations

from typing import Annotated

import typer

from imager.cli.options import JsonOption, RepoOption, open_repository
from imager.cli.output import print_json

app = typer.Typer(help="Make and describe a repository.", no_args_is_help=True)


@app.command()
def init(
    repo: RepoOption = None,
    block_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Unit of sharing, 64K to 4M: smaller shares more, larger packs tighter.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a repository in a folder."""
    from imager.config import repository_url
    from imager.repository import DEFAULT_BLOCK_SIZE, Repository
    from imager.units import parse_size

    size = parse_size(block_size) if block_size else DEFAULT_BLOCK_SIZE
    repository = Repository.create(repository_url(repo), block_size=size)
    _describe(repository.store.url, repository.id, repository.block_size, json)


@app.command()
def stats(repo: RepoOption = None, json: JsonOption = False) -> None:
    """Count images, packs and bytes."""
    from imager.units import count_of, show_bytes

    repository = open_repository(repo)
    images = len(repository.image_ids())
    sizes = [repository.store.size(name) for name in repository.store.names("packs")]
    document = {
        "repository": repository.store.url,
        "id": repository.id,
        "block_size": repository.block_size,
        "images": images,
        "packs": len(sizes),
        "stored_bytes": sum(sizes),
    }
    if json:
        print_json(document)
        return
    print(f"{repository.store.url}: {count_of(images, 'image')}")
    print(
        f"{count_of(len(sizes), 'pack')}, {show_bytes(sum(sizes))}; "
        f"blocks of {show_bytes(repository.block_size)}"
    )


def _describe(url: str, repository_id: str, block_size: int, json: bool) -> None:
    from imager.units import show_bytes

    if json:
        print_json({"repository": url, "id": repository_id, "block_size": block_size})
    else:
        print(f"{url} is a repository now, with blocks of {show_bytes(block_size)}")
