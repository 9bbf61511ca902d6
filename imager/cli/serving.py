"""imager serve."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imager.cli.options import JsonOption, RepoOption, find_disks, open_repository
from imager.cli.output import print_json

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from imager.manifest import Disk, Manifest
    from imager.repository import Repository
    from imager.serve.address import Address
    from imager.serve.export import Export
    from imager.serve.transmission import OnError


def serve(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Images, or IMAGE/DISK.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every image of the repository.")] = False,
    socket: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Listen at a Unix socket.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Listen there; 127.0.0.1:10809 when nothing is said."
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="The server's certificate: clients must use TLS."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Its key, if it is in another file.")
    ] = None,
    tls_clients: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Let in who has a certificate signed by one of these."),
    ] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Serve images over NBD until Ctrl-C: each disk, partition and volume is a read-only export.

    Other machines can connect only with TLS and a certificate of their own: --listen HOST,
    --tls-certificate and --tls-clients.
    """
    from imager.pipeline import share_freed_memory
    from imager.serve import ImageServer
    from imager.serve.catalog import image_exports

    tls = _encryption(tls_certificate, tls_key, tls_clients)
    address = _address(socket, listen)
    chosen = _chosen(open_repository(repo), images or [], every)
    share_freed_memory()
    with (
        image_exports(lambda: open_repository(repo), chosen) as exports,
        ImageServer(exports, address, tls=tls, on_error=_to_standard_error()) as server,
    ):
        stopped = _on_signals()
        _show(exports, server.address, tls is not None, json)
        stopped.wait()


def _address(path: Path | None, listen: str | None) -> Address:
    from imager.errors import UsageError
    from imager.serve.address import parse_listen

    if path is not None and listen is not None:
        raise UsageError("--socket and --listen are two places: name one")
    return path.absolute() if path is not None else parse_listen(listen or "127.0.0.1")


def _encryption(
    certificate: Path | None, key: Path | None, clients: Path | None
) -> ssl.SSLContext | None:
    from imager.errors import UsageError
    from imager.serve.certificates import server_context

    if certificate is not None:
        return server_context(certificate, key, clients)
    if key is not None or clients is not None:
        raise UsageError("--tls-key and --tls-clients need --tls-certificate")
    return None


def _chosen(
    repository: Repository, images: list[str], every: bool
) -> list[tuple[Manifest, list[Disk]]]:
    from imager.errors import UsageError

    if every == bool(images):
        raise UsageError("name one image or more, or all of them with --all")
    if every:
        found = [(manifest, list(manifest.disks)) for manifest in repository.manifests()]
        if not found:
            raise UsageError(f"{repository.store.url} has no images")
        return found[::-1]
    return [find_disks(repository, text) for text in dict.fromkeys(images)]


def _on_signals() -> threading.Event:
    """Ctrl-C is how it ends, and SIGTERM is as good."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    return stopped


def _show(exports: Sequence[Export], address: Address, encrypted: bool, json: bool) -> None:
    from imager.serve.address import uri

    found = [(export, uri(address, export.name, tls=encrypted)) for export in exports]
    if json:
        print_json(
            {
                "exports": [
                    {
                        "name": export.name,
                        "size": export.size,
                        "description": export.description,
                        "uri": where,
                    }
                    for export, where in found
                ]
            }
        )
    else:
        for export, where in found:
            print(f"{where}  {export.description}")
        print("end with Ctrl-C")
    sys.stdout.flush()  # who starts it in the background waits for that


def _to_standard_error() -> OnError:
    """Each damaged place once, however often it is read."""
    known: set[str] = set()

    def tell(name: str, error: Exception) -> None:
        text = str(error)
        if text not in known and len(known) < 1000:
            known.add(text)
            print(f"imager serve: {name}: {text}", file=sys.stderr, flush=True)

    return tell
