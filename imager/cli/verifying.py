"""imager verify."""

from __future__ import annotations

from typing import Annotated

import typer

from imager.cli.options import JsonOption, ProgressOption, RepoOption, find_image, open_repository
from imager.cli.output import print_json


def verify(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE]...", help="All images by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only existence, sizes, tables and maps.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Prove that images are whole: every block, map, pack and table against its digest.

    All damage is listed, with image, disk, offset, partition and pack. Exit code 3 if there is any.
    """
    from imager.cli.bars import open_progress
    from imager.errors import IntegrityError
    from imager.units import count_of, show_bytes
    from imager.verify import verify as run

    repository = open_repository(repo)
    ids = [find_image(repository, text).id for text in images or []]
    with open_progress(progress) as shown:
        result = run(repository, ids, shown, quick=quick)
    if json:
        print_json({**result.to_json(), "sound": result.is_sound})
        return 0 if result.is_sound else IntegrityError.exit_code
    for fault in result.faults:
        print(f"DAMAGED {fault}")
    if not result.faults:
        for text in result.pack_faults:
            print(f"DAMAGED, in no image: {text}")
    checked = "structure only" if quick else f"{show_bytes(result.content_bytes)} of blocks"
    counted = f"{count_of(result.images, 'image')}, {count_of(result.packs, 'pack')}, {checked}"
    damage = count_of(len(result.faults) or len(result.pack_faults), "damaged place")
    print(f"{counted}: {'all sound' if result.is_sound else damage}")
    return 0 if result.is_sound else IntegrityError.exit_code
