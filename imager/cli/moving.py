"""imager export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imager.cli.options import (
    ImageArgument,
    JsonOption,
    ProgressOption,
    RepoOption,
    find_disk,
    open_repository,
)
from imager.cli.output import print_json


def export(
    image: ImageArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file.")],
    form: Annotated[
        str, typer.Option("--format", metavar="raw|qcow2|vmdk|vhdx|vdi", help="Of the file.")
    ] = "raw",
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the file with the image at the end.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file of that name.")] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Write a disk of an image to a file, for virtual machines and other programs."""
    from imager.cli.bars import open_progress
    from imager.export import ExportJob
    from imager.export import export as run
    from imager.units import show_bytes

    manifest, disk = find_disk(open_repository(repo), image)
    job = ExportJob(manifest, disk, file, form, force, verify)
    with open_progress(progress) as shown:
        run(job, lambda: open_repository(repo), shown)
    status = file.stat()
    stored = status.st_blocks * 512
    holes = [[extent.offset, extent.length] for extent in disk.unreadable]
    if json:
        print_json(
            {
                "image": manifest.id,
                "disk": disk.name,
                "file": str(file),
                "format": form,
                "file_bytes": status.st_size,
                "stored_bytes": stored,
                "verified": verify,
                "unreadable": holes,
            }
        )
    else:
        same = ", the same as the image" if verify else ""
        print(f"{file}: {show_bytes(disk.size)} as {form}, {show_bytes(stored)} on disk{same}")
        for offset, length in holes:
            print(f"UNREADABLE when it was imaged, zeros here: {length} bytes at byte {offset}")
    return 5 if holes else 0


def import_file(
    file: Annotated[
        Path, typer.Argument(metavar="FILE|FOLDER", help="A disk's file, or Clonezilla's folder.")
    ],
    name: Annotated[str, typer.Option(help="Of the machine.")],
    note: Annotated[str, typer.Option(help="A text to find the image by.")] = "",
    level: Annotated[
        int | None, typer.Option(metavar="1-19", help="zstd level; higher is smaller and slower.")
    ] = None,
    sector_size: Annotated[
        int | None,
        typer.Option(
            "--sector-size", metavar="BYTES", help="Of an image file of a disk with other than 512."
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For what is unpacked; default TMPDIR, else /var/tmp."),
    ] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Make an image of what another program stored.

    A raw copy (dd), qcow2, VMDK, VHDX, VHD, VDI, a partclone image, or a folder of Clonezilla. A
    file may be compressed with gzip, xz, zstd, bzip2 or lz4. Prove the image afterwards.
    """
    from imager.capture import DEFAULT_LEVEL
    from imager.cli.bars import open_progress
    from imager.importing import ImportJob, import_image

    repository = open_repository(repo)
    job = ImportJob(
        path=file,
        name=name,
        note=note,
        level=DEFAULT_LEVEL if level is None else level,
        sector_size=sector_size,
        scratch=scratch,
    )
    with open_progress(progress) as shown:
        manifest = import_image(job, repository, shown)
    if json:
        print_json({"image": manifest.id, **manifest.document})
    else:
        print(f"image {manifest.id} of {manifest.name}, from {file}")
        for disk in manifest.disks:
            print(f"  {disk.name}: root {disk.root}")
    return 5 if manifest.partial else 0
