"""imager files: ls, cat, cp, find, diff."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imager.cli.options import JsonOption, RepoOption, find_disks, open_repository
from imager.cli.output import print_json, print_table

if TYPE_CHECKING:
    from imager.files.model import Entry, Reader
    from imager.files.tree import Found
    from imager.imagefiles import Opened

app = typer.Typer(
    help="Read the files inside of an image, without root and without mounting it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

FileArgument = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE:PARTITION/PATH",
        help="A number or VG/LV behind the colon; nothing where there is only one filesystem.",
    ),
]

_LETTERS = {"f": "file", "d": "folder", "l": "link"}


@app.command("ls")
def list_files(
    place: FileArgument,
    long: Annotated[
        bool, typer.Option("--long", "-l", help="Mode, links, owner, size and time too.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """List a folder, or one entry."""
    with _opened(place, repo, quiet=json) as opened:
        reader, found = opened.reader, opened.found
        if found.entry.is_folder and not (long or json):
            for name in sorted(reader.names(found.entry)):
                print(_shown(name))
            return
        if found.entry.is_folder:
            entries = sorted(reader.entries(found.entry), key=lambda entry: entry.name)
        else:
            entries = [found.entry]
        if json:
            print_json([_to_json(reader, entry) for entry in entries])
        elif long:
            rows = [_row(reader, entry) for entry in entries]
            columns = ["MODE", "LINKS", "OWNER", "SIZE", "CHANGED", "NAME"]
            print_table(columns, rows, right="LINKS SIZE")
        else:
            for entry in entries:
                print(_shown(entry.name))


@app.command("cat")
def cat(place: FileArgument, repo: RepoOption = None) -> None:
    """Write a file's content to standard output."""
    from imager.errors import ImagerError

    with _opened(place, repo, follow=True) as opened:
        entry = opened.found.entry
        if not entry.is_file:
            raise ImagerError(f"{opened.found.path or '/'} is a {entry.kind}")
        at = 0
        for offset, content in opened.reader.pieces(entry):
            _write_zeros(offset - at)
            sys.stdout.buffer.write(content)
            at = offset + len(content)
        _write_zeros(entry.size - at)
        sys.stdout.buffer.flush()


@app.command("cp")
def copy_files(
    place: FileArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A file, or a folder.")],
    recursive: Annotated[bool, typer.Option("-r", "--recursive", help="Folders too.")] = False,
    preserve: Annotated[
        bool,
        typer.Option(
            "--preserve", "-p", help="Owner, mode, times, attributes, ACLs, hard links (root)."
        ),
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> int:
    """Copy files out of an image. Nothing is written outside of DEST, whatever links say.

    Exit code 5 when something could not be copied or kept (each is listed), 3 when it is damaged.
    """
    from imager.files.copying import copy
    from imager.units import count_of, show_bytes

    with _opened(place, repo, quiet=json) as opened:
        done = copy(
            opened.reader, opened.found, destination, recursive=recursive, preserve=preserve
        )
    if json:
        print_json(
            {
                "files": done.files,
                "folders": done.folders,
                "others": done.others,
                "content_bytes": done.content_bytes,
                "problems": [{"path": p.path, "text": p.text} for p in done.problems],
            }
        )
        return done.exit_code
    for problem in done.problems:
        print(f"imager: {_shown(problem.path)}: {problem.text}", file=sys.stderr)
    parts = [count_of(done.files, "file"), count_of(done.folders, "folder")]
    if done.others:
        parts.append(f"{done.others} others")
    print(f"{', '.join(parts)}, {show_bytes(done.content_bytes)}")
    return done.exit_code


@app.command("find")
def find(
    place: FileArgument,
    name: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Only names like it: *.conf")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", metavar="f|d|l", help="Files, folders or links.")
    ] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """List all that is below a folder."""
    from fnmatch import fnmatchcase

    from imager.errors import UsageError
    from imager.files.tree import walk

    if kind is not None and kind not in _LETTERS:
        raise UsageError(f"--type {kind}: say f, d or l")
    with _opened(place, repo, quiet=json) as opened:
        wanted = (
            found
            for found in _all(opened.reader, opened.found, walk)
            if (name is None or fnmatchcase(found.entry.name, name))
            and (kind is None or found.entry.kind == _LETTERS[kind])
        )
        if json:
            print_json([{"path": f.path, **_to_json(opened.reader, f.entry)} for f in wanted])
        else:
            for found in wanted:
                print(_shown(found.path))


@app.command("diff")
def diff_files(
    one: Annotated[str, typer.Argument(metavar="A", help="IMAGE or IMAGE/DISK.")],
    other: Annotated[str, typer.Argument(metavar="B", help="IMAGE or IMAGE/DISK.")],
    path: Annotated[str, typer.Argument(metavar="PARTITION/PATH", help="In both of them.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Trust equal sizes and times; else read all files.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """List files that were added, removed or changed between two images."""
    from imager.files.comparing import Side, compare
    from imager.units import count_of

    path = path.removeprefix(":")
    with (
        _opened(f"{one}:{path}", repo, quiet=json) as a,
        _opened(f"{other}:{path}", repo, quiet=json) as b,
    ):
        found = compare(Side(a.reader, a.found), Side(b.reader, b.found), quick=quick)
        if json:
            print_json([difference.to_json() for difference in found])
            return
        count = 0
        for difference in found:
            count += 1
            what = f" ({', '.join(difference.what)})" if difference.what else ""
            print(f"{difference.change:<8} {_shown(difference.path)}{what}")
    print(f"{count_of(count, 'difference')}")


@contextmanager
def _opened(
    place: str, repo: str | None, *, follow: bool = False, quiet: bool = False
) -> Iterator[Opened]:
    from imager.imagefiles import opened
    from imager.imagevolumes import parse_address

    address = parse_address(place)
    _, disks = find_disks(open_repository(repo), address.image)
    with opened(lambda: open_repository(repo), disks, address.rest, follow=follow) as found:
        for note in found.notes if not quiet else ():
            print(f"note: {found.volume.name}: {note}", file=sys.stderr)
        yield found


def _all(reader: Reader, start: Found, walk: Any) -> Iterator[Found]:
    yield start
    if start.entry.is_folder:
        yield from walk(reader, start)


def _write_zeros(count: int) -> None:
    block = bytes(1 << 16)
    while count > 0:
        sys.stdout.buffer.write(block[:count])
        count -= len(block)


def _to_json(reader: Reader, entry: Entry) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": _shown(entry.name),
        "kind": entry.kind,
        "mode": f"{stat.S_IMODE(entry.mode):04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "links": entry.links,
        "mtime_ns": entry.mtime_ns,
        "inode": entry.number[1],
    }
    if entry.is_link:
        document["target"] = _shown(reader.target(entry))
    return document


def _row(reader: Reader, entry: Entry) -> tuple[object, ...]:
    import os
    from datetime import UTC, datetime, timedelta

    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=entry.mtime_ns // 1000)
    size: object = entry.size
    if entry.kind.endswith("device"):
        size = f"{os.major(entry.rdev)}, {os.minor(entry.rdev)}"
    target = f" -> {_shown(reader.target(entry))}" if entry.is_link else ""
    return (
        stat.filemode(entry.mode),
        entry.links,
        f"{entry.uid}:{entry.gid}",
        size,
        f"{moment:%Y-%m-%d %H:%M:%S}",
        f"{_shown(entry.name)}{target}",
    )


def _shown(name: str) -> str:
    """Printable, also where a name is no text or has a line end in it."""
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
