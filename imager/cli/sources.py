"""imager inspect, capture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imager.cli.options import JsonOption, ProgressOption, RepoOption
from imager.cli.output import print_json, print_table

if TYPE_CHECKING:
    from imager.layout import DiskLayout
    from imager.manifest import Manifest
    from imager.repository import Repository

AllDisksOption = Annotated[
    bool, typer.Option("--all-disks", help="Every disk of this machine, as one image.")
]
SectorOption = Annotated[
    int | None,
    typer.Option(
        "--sector-size", metavar="BYTES", help="Of an image file of a disk with other than 512."
    ),
]


def inspect(
    disk: Annotated[str, typer.Argument(metavar="DISK", help="A disk, a partition or a file.")],
    sector_size: SectorOption = None,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Check and read the filesystems without their unused bytes."),
    ] = False,
    json: JsonOption = False,
) -> int:
    """Show a disk's partitions and filesystems, the hardware, and what a capture would read."""
    from imager.blocksource import FileSource
    from imager.cli.hardware import print_hardware
    from imager.diskidentity import disk_identity
    from imager.fingerprint import read_fingerprint
    from imager.layout import read_layout
    from imager.mapproof import all_hold

    with FileSource(disk, logical_sector=sector_size) as source:
        layout = read_layout(source)
        if prove:
            from imager.consistency import Situation, refuse_writers
            from imager.coverage import prove_layouts

            refuse_writers(Situation.of([disk]))
            (layout,) = prove_layouts([(source, layout)])
        identity, hardware = disk_identity(disk), read_fingerprint()
        document: dict[str, Any] = {
            "path": disk,
            "size": source.size,
            "logical_sector": source.logical_sector,
            "physical_sector": source.physical_sector,
            "identity": identity.to_json(),
            "table": layout.table.to_json(),
            "partitions": [volume.to_json() for volume in layout.volumes],
            "used_bytes": layout.used().total,
            "hardware": hardware.to_json(),
        }
    if json:
        print_json(document)
    else:
        _print_disk(document, layout)
        if source.is_device:
            print_hardware(hardware)
    return 0 if all_hold([layout]) else 5


def capture(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="Disks, partitions or raw image files."),
    ] = None,
    all_disks: AllDisksOption = False,
    name: Annotated[
        str | None,
        typer.Option(
            help="Of the machine; images of one name are a lineage. Default: host or file."
        ),
    ] = None,
    note: Annotated[str, typer.Option(help="A text to find the image by.")] = "",
    level: Annotated[
        int | None, typer.Option(metavar="1-19", help="zstd level; higher is smaller and slower.")
    ] = None,
    all_blocks: Annotated[
        bool, typer.Option("--all-blocks", help="Capture free space too.")
    ] = False,
    prove_map: Annotated[
        bool,
        typer.Option("--prove-map", help="Prove what is unused first; at a failure capture all."),
    ] = False,
    consistency: Annotated[
        str,
        typer.Option(
            metavar="auto|offline|snapshot|track|freeze|none",
            help="How a disk that is in use is captured as of one moment; auto takes the best.",
        ),
    ] = "auto",
    freeze_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Filesystems are frozen for so long at most; then there is no image. Default: 60.",
        ),
    ] = None,
    hooks: Annotated[
        bool | None,
        typer.Option(
            "--hooks/--no-hooks",
            help="Run the hooks of /etc/imager around it. Default: for disks only.",
        ),
    ] = None,
    init: Annotated[
        bool, typer.Option("--init", help="Make the repository if there is none.")
    ] = False,
    data: Annotated[
        bool | None,
        typer.Option(
            "--data/--no-data",
            help="Run the data backups of imager.toml beside it. Default: for disks only.",
        ),
    ] = None,
    exclude_partition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N", help="Leave this partition out (sda:N with several disks); several times."
        ),
    ] = None,
    sector_size: SectorOption = None,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Store disks as an image. Interrupted, run it again: what is stored is not stored twice."""
    from imager.capture import DEFAULT_LEVEL
    from imager.cli.bars import open_progress
    from imager.freeze import LIMIT_SECONDS
    from imager.imaging import ImagingJob, run

    job = ImagingJob(
        paths=tuple(_source_paths(sources or [], all_disks)),
        name=name,
        note=note,
        level=DEFAULT_LEVEL if level is None else level,
        all_blocks=all_blocks,
        prove_map=prove_map,
        consistency=consistency,
        data=data,
        exclude_partitions=tuple(exclude_partition or ()),
        sector_size=sector_size,
        hooks=hooks,
        freeze_limit=LIMIT_SECONDS if freeze_limit is None else freeze_limit,
    )
    job.check()
    with open_progress(progress) as shown:
        done = run(job, lambda: _open_or_make(repo, init), shown)
    _print_capture(done.manifest, json)
    return 0 if done.whole else 5


def _source_paths(sources: list[str], all_disks: bool) -> list[str]:
    from imager.diskidentity import disks
    from imager.errors import UsageError

    if bool(sources) == all_disks:
        raise UsageError("name the disks to capture, or give --all-disks", hint="see: lsblk")
    paths = disks() if all_disks else sources
    if not paths:
        raise UsageError("this machine has no disks that can be captured")
    return paths


def _open_or_make(flag: str | None, init: bool) -> Repository:
    """Open the repository; make it where nothing is, or where the default one belongs.

    An existing empty folder is not taken for a new repository by itself: it may be the mount
    point of a backup disk that isn't mounted.
    """
    from imager.config import default_repository, repository_url
    from imager.repository import Repository

    url = repository_url(flag)
    path = Path(url)
    is_missing = "://" not in url and not (path / "repository.json").exists()
    if is_missing and (init or not path.exists() or path == default_repository()):
        return Repository.create(url)
    return Repository.open(url)


def _print_disk(document: dict[str, Any], layout: DiskLayout) -> None:
    from imager.mapproof import proof_lines
    from imager.units import show_bytes

    identity, table = document["identity"], layout.table
    words = [str(identity[key]) for key in ("model", "serial", "wwn") if identity.get(key)]
    print(f"{document['path']}: {show_bytes(document['size'])}, {document['size']} bytes", end="")
    print(f", sectors of {document['logical_sector']} {' '.join(words)}".rstrip())
    print(f"partition table: {table.scheme} {table.disk_id or ''}".rstrip())
    for text in table.notes:
        print(f"  note: {text}")
    rows = []
    for volume in layout.volumes:
        part, inside = volume.partition, volume.filesystem
        rows.append(
            (
                volume.number if part else "-",
                volume.offset,
                show_bytes(volume.size),
                show_bytes(volume.allocation.used.total),
                volume.allocation.certainty,
                inside.kind,
                inside.label or "",
                inside.uuid or "",
                (part.type_name or part.type) if part else "",
                (part.name or "") if part else "",
            )
        )
    header = ["#", "OFFSET", "SIZE", "USED", "MAP", "FS", "LABEL", "UUID", "TYPE", "NAME"]
    print_table(header, rows, right="OFFSET SIZE USED")
    for volume in layout.volumes:
        reasons = [*volume.filesystem.notes, volume.allocation.reason]
        for text in filter(None, reasons):
            print(f"  {volume.number or 'the disk'}: {text}")
    for text in [*proof_lines(layout, holding=True), *proof_lines(layout, holding=False)]:
        print(f"  {text}")
    print(f"a capture reads {show_bytes(document['used_bytes'])}")


def _print_capture(manifest: Manifest, json: bool) -> None:
    from imager.consistency import consistency_words
    from imager.data.model import backups_of
    from imager.units import show_bytes

    if json:
        print_json({"image": manifest.id, **manifest.document})
        return
    counts = manifest.statistics
    seconds = max(counts["milliseconds"] / 1000, 0.001)
    print(f"image {manifest.id} of {manifest.name}")
    print(
        f"  {show_bytes(counts['read_bytes'])} read in {seconds:.1f} s "
        f"({show_bytes(int(counts['read_bytes'] / seconds))}/s), "
        f"{show_bytes(counts['stored_bytes'])} added; "
        f"{counts['new_blocks']} blocks new, {counts['known_blocks']} known, "
        f"{counts['zero_blocks']} zero, {counts['unused_blocks']} unused"
    )
    print(f"  consistency: {consistency_words(manifest)}")
    for backup in backups_of(manifest):
        print(f"  data {backup.words()}")
    for disk in manifest.disks:
        print(f"  {disk.name}: root {disk.root}")
        for extent in disk.unreadable:
            print(
                f"  UNREADABLE {extent.length} bytes at byte {extent.offset} of {disk.name}, "
                f"{disk.where(extent.offset)}"
            )
