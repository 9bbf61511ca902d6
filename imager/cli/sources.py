"""imager inspect, capture."""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imager.cli.options import JsonOption, ProgressOption, RepoOption
from imager.cli.output import print_json, print_table

if TYPE_CHECKING:
    from imager.blocksource import FileSource
    from imager.capture import SourceDisk
    from imager.data.model import DataEntry
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
    from imager.cli.proving import all_hold
    from imager.diskidentity import disk_identity
    from imager.fingerprint import read_fingerprint
    from imager.layout import read_layout

    with FileSource(disk, logical_sector=sector_size) as source:
        layout = read_layout(source)
        if prove:
            from imager.coverage import prove_layouts

            _find_writers([disk], "offline")
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
            metavar="auto|offline|none",
            help="auto and offline refuse a source that is mounted for writing; none does not.",
        ),
    ] = "auto",
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
    from imager.capture import DEFAULT_LEVEL, CaptureJob
    from imager.capture import capture as run
    from imager.cli.bars import open_progress
    from imager.cli.proving import all_hold, prove_disks
    from imager.data.backing import DataRun
    from imager.exclusion import leave_out
    from imager.fingerprint import read_fingerprint

    _refuse_contradictions(prove_map, all_blocks, consistency)
    paths = _source_paths(sources or [], all_disks)
    with ExitStack() as stack:
        shown = stack.enter_context(open_progress(progress))
        disks = _open_disks(paths, sector_size, stack)
        writers = _find_writers(paths, consistency)
        repository = _open_or_make(repo, init)
        if prove_map:
            disks = prove_disks(disks, shown)
        entries = _data_entries(data, disks)
        disks = leave_out(disks, exclude_partition or [], entries)
        beside = DataRun(entries, shown)
        beside.before()
        job = CaptureJob(
            disks=tuple(disks),
            name=_image_name(name, disks),
            note=note,
            level=DEFAULT_LEVEL if level is None else level,
            all_blocks=all_blocks,
            consistency="none" if writers else "offline",
            hardware=read_fingerprint(),
            warnings=tuple(_warnings(disks, repository, writers)),
            additions=beside.additions,
        )
        for text in job.warnings:
            shown.note(f"warning: {text}")
        manifest = run(job, repository, shown)
        beside.after(repository)
    _print_capture(manifest, json)
    whole = beside.whole and all_hold(disk.layout for disk in disks)
    return 5 if manifest.partial or not whole else 0


def _data_entries(asked: bool | None, disks: list[SourceDisk]) -> list[DataEntry]:
    """A file is an image of some machine, most likely not of the one whose data this is."""
    from imager.data.settings import load_entries
    from imager.errors import UsageError

    if asked is False or (asked is None and not any(disk.source.is_device for disk in disks)):
        return []
    entries = load_entries()
    if asked and not entries:
        raise UsageError("--data: imager.toml has no data backups")
    return entries


def _refuse_contradictions(prove_map: bool, all_blocks: bool, consistency: str) -> None:
    from imager.errors import UsageError

    if prove_map and all_blocks:
        raise UsageError("--prove-map and --all-blocks: with all blocks there is nothing to prove")
    if prove_map and consistency == "none":
        raise UsageError("--prove-map and --consistency none: what changes cannot be proved")


def _source_paths(sources: list[str], all_disks: bool) -> list[str]:
    from imager.diskidentity import disks
    from imager.errors import UsageError

    if bool(sources) == all_disks:
        raise UsageError("name the disks to capture, or give --all-disks", hint="see: lsblk")
    paths = disks() if all_disks else sources
    if not paths:
        raise UsageError("this machine has no disks that can be captured")
    if len({Path(path).resolve() for path in paths}) != len(paths):
        raise UsageError("a source is named twice")
    return paths


def _open_disks(paths: list[str], sector_size: int | None, stack: ExitStack) -> list[SourceDisk]:
    from imager.blocksource import FileSource
    from imager.capture import SourceDisk
    from imager.diskidentity import disk_identity
    from imager.errors import SourceError
    from imager.layout import read_layouts

    opened = [stack.enter_context(FileSource(path, logical_sector=sector_size)) for path in paths]
    for source in opened:
        if source.size == 0:
            raise SourceError(f"{source.path} is empty: there is nothing to capture")
    disks: list[SourceDisk] = []
    for source, layout in zip(opened, read_layouts(opened), strict=True):
        name = _disk_name(source, {disk.name for disk in disks})
        disks.append(SourceDisk(name, source, layout, disk_identity(source.path)))
    return disks


def _disk_name(source: FileSource, taken: set[str]) -> str:
    """``sda``, or a file's name without its ending, made unique."""
    path = Path(source.path)
    stem = _clean(path.name if source.is_device else path.stem)
    candidates = [stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 3))]
    return next(name for name in candidates if name not in taken)


def _image_name(name: str | None, disks: list[SourceDisk]) -> str:
    from imager.errors import UsageError

    if name is not None:
        if _clean(name) != name or not name:
            raise UsageError(f"--name {name}: letters, digits, dots, dashes, underscores only")
        return name
    return _clean(socket.gethostname()) if disks[0].source.is_device else disks[0].name


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text) or "disk"


def _find_writers(paths: list[str], asked: str) -> list[str]:
    """Who may be writing to the sources. Raises RefusedError unless that was asked for."""
    from imager.deviceuse import uses_of
    from imager.errors import RefusedError, UsageError

    if asked not in ("auto", "offline", "none"):
        raise UsageError(f"--consistency {asked}: it can be auto, offline or none")
    writers = [
        f"{path}: {use.device} is {use.description}"
        for path in paths
        for use in uses_of(path)
        if use.writable and use.description != "in use as swap"
    ]
    if writers and asked != "none":
        raise RefusedError(
            writers,
            hint="unmount it, or remount it read-only; --consistency none captures a disk that "
            "changes meanwhile, at your own risk",
        )
    return writers


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


def _warnings(disks: list[SourceDisk], repository: Repository, writers: list[str]) -> list[str]:
    from imager.belonging import missing_members
    from imager.cli.proving import unproved
    from imager.deviceuse import device_numbers, disk_numbers_below

    texts = missing_members(disks) + unproved(disks)
    texts += [f"captured while it changed: {text}" for text in writers]
    below = disk_numbers_below(Path(repository.store.url))
    for disk in disks:
        if disk.source.is_device and device_numbers(disk.source.path) & below:
            texts.append(f"the repository lies on {disk.source.path}: lost with it when it fails")
    return texts


def _print_disk(document: dict[str, Any], layout: DiskLayout) -> None:
    from imager.cli.proving import proof_lines
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
    for backup in backups_of(manifest):
        print(f"  {backup.words()}")
    for disk in manifest.disks:
        print(f"  {disk.name}: root {disk.root}")
        for extent in disk.unreadable:
            print(
                f"  UNREADABLE {extent.length} bytes at byte {extent.offset} of {disk.name}, "
                f"{disk.where(extent.offset)}"
            )
