"""imager list, show, map, diff."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imager.cli.options import (
    ImageArgument,
    JsonOption,
    RepoOption,
    find_disk,
    find_disks,
    open_repository,
)
from imager.cli.output import print_json, print_table

if TYPE_CHECKING:
    from imager.listing import Summary
    from imager.manifest import Disk, Manifest
    from imager.proofs import Proof


def list_images(
    name: Annotated[str | None, typer.Option(help="Only images of this name.")] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> int:
    """List the images, oldest first. Exit code 3 when a manifest is damaged."""
    from imager.errors import IntegrityError
    from imager.listing import summaries
    from imager.proofs import latest_proofs
    from imager.units import show_bytes

    repository = open_repository(repo)
    damaged: list[IntegrityError] = []
    found = summaries(repository, damaged.append, full=json)
    images = [image for image in found if name in (None, image.name)]
    for error in damaged:
        print(f"imager: {error.message}", file=sys.stderr)
    code = IntegrityError.exit_code if damaged else 0
    proofs = latest_proofs(repository)
    if json:
        print_json([{**image.to_json(), **_proof_of(proofs.get(image.id))} for image in images])
        return code
    rows = [
        (
            image.id,
            image.name,
            image.created,
            show_bytes(image.disk_bytes),
            show_bytes(image.used_bytes),
            show_bytes(image.stored_bytes),
            " ".join([*_marks(image), *_proof_marks(proofs.get(image.id)), image.note]).rstrip(),
        )
        for image in images
    ]
    print_table(
        ["IMAGE", "NAME", "CREATED", "SIZE", "USED", "ADDED", "NOTE"], rows, right="SIZE USED ADDED"
    )
    return code


def show(image: ImageArgument, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Show all that is known of an image: disks, partitions, hardware, statistics."""
    from imager.cli.hardware import print_hardware
    from imager.fingerprint import Fingerprint
    from imager.proofs import proofs_of

    repository = open_repository(repo)
    manifest, disks = find_disks(repository, image)
    proofs = list(proofs_of(repository, manifest.id))
    if json:
        told = {"proofs": [proof.to_json() for proof in proofs]} if proofs else {}
        print_json({**manifest.document, **told})
        return
    _show_manifest(manifest)
    for proof in proofs:
        print(f"{'proof':<12} {proof.time}: {proof.words}")
    for disk in disks:
        _show_disk(disk)
    print_hardware(Fingerprint.from_json(manifest.document.get("hardware") or {}))


def draw_map(
    image: ImageArgument,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture to this file.")
    ] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Draw the disk: used, zero, unused and unreadable blocks."""
    import shutil

    from imager.diskmap import NAMES, draw_svg, draw_text, make_disk_map, svg_cell_count

    repository = open_repository(repo)
    manifest, disk = find_disk(repository, image)
    columns = max(min(shutil.get_terminal_size().columns, 120), 20)
    cells = svg_cell_count() if svg else columns * 16
    picture = make_disk_map(repository.block_map(disk), disk, cells)
    if svg:
        _write_picture(svg, draw_svg(picture, disk, f"{manifest.name} {disk.name}"))
    if json:
        print_json({NAMES[state]: count for state, count in picture.totals.items()})
    elif svg:
        print(f"written to {svg}")
    else:
        print(draw_text(picture, columns=columns, colour=sys.stdout.isatty()))


def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="IMAGE or IMAGE/DISK.")],
    other: Annotated[str, typer.Argument(metavar="B", help="IMAGE or IMAGE/DISK.")],
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """List the ranges that differ between two images, and the partitions they lie in."""
    from imager.diff import diff as run
    from imager.units import show_bytes

    repository = open_repository(repo)
    difference = run(repository, find_disk(repository, one)[1], find_disk(repository, other)[1])
    if json:
        print_json(difference.to_json())
        return
    rows = [(c.offset, show_bytes(c.length), c.where) for c in difference.changes]
    print_table(["OFFSET", "LENGTH", "WHERE"], rows, right="OFFSET LENGTH")
    print(f"{show_bytes(difference.changed_bytes)} in {len(rows)} ranges differ")


def _write_picture(path: Path, picture: str) -> None:
    from imager.errors import ImagerError

    try:
        path.write_text(picture)
    except OSError as error:
        raise ImagerError(f"cannot write {path}: {error.strerror}") from None


def _marks(image: Summary) -> list[str]:
    """What makes an image less than one could expect."""
    in_use, lacks_data = image.consistency == "none", not image.data_whole
    return ["PARTIAL"] * image.partial + ["IN-USE"] * in_use + ["DATA-FAILED"] * lacks_data


def _proof_marks(proof: Proof | None) -> list[str]:
    """What came of the last boot."""
    return [] if proof is None else ["PROVED" if proof.proved else "BOOT-FAILED"]


def _proof_of(proof: Proof | None) -> dict[str, Any]:
    return {} if proof is None else {"proof": proof.to_json()}


def _show_manifest(manifest: Manifest) -> None:
    from imager.consistency import consistency_words
    from imager.data.model import backups_of
    from imager.units import show_bytes

    document, counts = manifest.document, manifest.statistics
    lines = {
        "image": manifest.id,
        "name": manifest.name,
        "note": manifest.note,
        "host": manifest.host,
        "created": manifest.created,
        "previous": document.get("previous") or "none",
        "consistency": consistency_words(manifest),
        "tool": document.get("tool"),
        "used": show_bytes(counts.get("used_bytes", 0)),
        "added": (
            f"{show_bytes(counts.get('stored_bytes', 0))} in {counts.get('new_blocks', 0)} new "
            f"blocks; {counts.get('known_blocks', 0)} were stored already"
        ),
        "took": f"{counts.get('milliseconds', 0) / 1000:.1f} s",
    }
    for key, value in lines.items():
        if value:
            print(f"{key:<12} {value}")
    for text in document.get("warnings", []):
        print(f"warning      {text}")
    for backup in backups_of(manifest):
        print(f"{'data':<12} {backup.words()}")
    if manifest.partial:
        print("PARTIAL      some sectors could not be read, see below")


def _show_disk(disk: Disk) -> None:
    from imager.units import show_bytes

    identity = disk.identity
    words = [str(identity[key]) for key in ("model", "serial") if identity.get(key)]
    print(f"\ndisk {disk.name}: {show_bytes(disk.size)} {' '.join(words)}".rstrip())
    print(f"  root digest {disk.root}")
    table = disk.table
    print(f"  partition table {table.scheme} {table.disk_id or ''}".rstrip())
    rows = []
    for item in disk.partitions:
        filesystem = item.get("filesystem") or {}
        rows.append(
            (
                item.get("number") or "-",
                show_bytes(item.get("size", 0)),
                show_bytes(item.get("used_bytes", 0)),
                item.get("certainty", ""),
                filesystem.get("kind", "unknown"),
                filesystem.get("label") or "",
                filesystem.get("uuid") or "",
            )
        )
    print_table(["#", "SIZE", "USED", "MAP", "TYPE", "LABEL", "UUID"], rows, right="SIZE USED")
    for extent in disk.unreadable:
        print(
            f"  unreadable: {extent.length} bytes at byte {extent.offset}, "
            f"{disk.where(extent.offset)}"
        )
