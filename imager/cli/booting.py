"""imager prove, boot, commit: an image as a virtual machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imager.cli.options import (
    ImageArgument,
    JsonOption,
    ProgressOption,
    RepoOption,
    find_image,
    open_repository,
)
from imager.cli.output import print_json

if TYPE_CHECKING:
    from imager.guestcommand import LogIn
    from imager.proofs import Proof
    from imager.qemu import NetworkKind
    from imager.repository import Repository

NOT_TRIED = 5
_TAIL_LINES = 12

FirmwareOption = Annotated[
    str | None,
    typer.Option(metavar="bios|uefi|secureboot", help="Else what the image was made for."),
]
MemoryOption = Annotated[str | None, typer.Option(metavar="SIZE", help="Of the machine.  [1G]")]
CpusOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the machine.  [2]")]
AccelOption = Annotated[
    str, typer.Option("--accel", metavar="auto|kvm|tcg", help="KVM where it works, else emulated.")
]
NetworkOption = Annotated[
    str,
    typer.Option(
        metavar="none|isolated|user",
        help="No cable; a network that leads nowhere; or out through this host.",
    ),
]


def prove(
    image: ImageArgument,
    sign: Annotated[
        str,
        typer.Option(
            metavar="SIGN",
            help="What shows that it is up: login, target=NAME, port=N or command=WORDS.",
        ),
    ] = "login",
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="Time for the boot.  [600]")
    ] = None,
    filesystems: Annotated[
        bool,
        typer.Option("--filesystems", help="Don't boot: check every filesystem, read every file."),
    ] = False,
    coverage: Annotated[
        bool,
        typer.Option("--coverage", help="The same, with errors in place of unused blocks."),
    ] = False,
    user: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who logs in to run a command.")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With the user's password.")
    ] = None,
    firmware: FirmwareOption = None,
    memory: MemoryOption = None,
    cpus: CpusOption = None,
    accel: AccelOption = "auto",
    network: NetworkOption = "none",
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the last screen here, as PNG.")
    ] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Boot an image in a virtual machine and see it come up; the image is not changed.

    What came of it is kept beside the image. Exit code 1 when it does not boot, 5 when that could
    not be tried.
    """
    from imager.bootsigns import parse_sign
    from imager.cli.bars import open_progress
    from imager.prove import TIMEOUT_SECONDS, ProveJob
    from imager.prove import prove as run

    job = ProveJob(
        sign=parse_sign(sign),
        timeout_seconds=timeout or TIMEOUT_SECONDS,
        acceleration=_acceleration(accel),
        firmware=_firmware(firmware),
        memory=_memory(memory),
        cpus=cpus,
        network=_network(network),
        login=_login(user, password_file),
    )
    repository = open_repository(repo)
    manifest = find_image(repository, image)
    with open_progress(progress) as shown:
        if filesystems or coverage:
            from imager.provefiles import prove_filesystems

            proof = prove_filesystems(repository, manifest, shown, coverage=coverage)
        else:
            proof = run(repository, manifest, shown, job)
    _show_proof(repository, proof, picture, json)
    return {"proved": 0, "failed": 1}.get(proof.verdict, NOT_TRIED)


def boot(
    image: ImageArgument,
    overlay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what it writes here, to go on or to commit it."),
    ] = None,
    console: Annotated[
        bool,
        typer.Option("--console", help="Its serial line on this terminal; Ctrl-] cuts it off."),
    ] = False,
    display: Annotated[
        str, typer.Option(metavar="none|window|vnc:N", help="Its screen; VNC on 127.0.0.1.")
    ] = "none",
    forward: Annotated[
        list[str] | None,
        typer.Option(metavar="HERE:THERE", help="A port of 127.0.0.1 to a port of the machine."),
    ] = None,
    firmware: FirmwareOption = None,
    memory: MemoryOption = None,
    cpus: CpusOption = None,
    accel: AccelOption = "auto",
    network: NetworkOption = "none",
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Run an image as a virtual machine; what it writes goes to an overlay, never to the image.

    Runs until the machine switches itself off; Ctrl-C cuts it off.
    """
    from imager.boot import BootJob, attend_machine, booted
    from imager.cli.bars import open_progress
    from imager.cli.terminal import connected

    forwards = _forwards(forward or [])
    job = BootJob(
        overlay=overlay,
        acceleration=_acceleration(accel),
        firmware=_firmware(firmware),
        memory=_memory(memory),
        cpus=cpus,
        network="isolated" if forwards and network == "none" else _network(network),
        forwards=forwards,
        display=_display(display),
    )
    repository = open_repository(repo)
    manifest = find_image(repository, image)
    with (
        open_progress(progress) as shown,
        booted(repository, manifest, shown, job) as machine,
        connected(machine, console),
    ):
        end = attend_machine(machine, shown, overlay=overlay)
    if json:
        print_json({"image": manifest.id, "end": end, "overlay": overlay and str(overlay)})
    else:
        print(f"{end}; what it wrote is {f'in {overlay}' if overlay else 'thrown away'}")


def commit(
    overlay: Annotated[Path, typer.Argument(metavar="OVERLAY", help="Of imager boot --overlay.")],
    name: Annotated[str | None, typer.Option(help="Of the image; else that of its base.")] = None,
    note: Annotated[str, typer.Option(help="Why, for those who come later.")] = "",
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Make a new image of what a virtual machine changed; the machine must be off."""
    from imager.cli.bars import open_progress
    from imager.commit import commit as run
    from imager.units import show_bytes

    repository = open_repository(repo)
    with open_progress(progress) as shown:
        manifest = run(overlay, repository, shown, name=name, note=note)
    if json:
        print_json({"image": manifest.id, **manifest.document})
        return
    counts = manifest.statistics
    print(f"image {manifest.id} of {manifest.name}")
    print(
        f"  {show_bytes(counts['read_bytes'])} read, {show_bytes(counts['stored_bytes'])} added; "
        f"{counts['new_blocks']} blocks new"
    )


def _show_proof(repository: Repository, proof: Proof, picture: Path | None, json: bool) -> None:
    from imager.proofs import evidence_names, read_evidence

    evidence = read_evidence(repository, proof) if proof.id else None
    if evidence is not None and evidence.picture and picture:
        _write(picture, evidence.picture)
    if json:
        names = [f"{repository.store.url}/{name}" for name in evidence_names(proof)]
        print_json({**proof.to_json(), "evidence": names})
        return
    if not proof.proved and evidence is not None and proof.level == "boot":
        for line in [line for line in evidence.console.splitlines() if line][-_TAIL_LINES:]:
            print(f"  | {line[:160]}")
    print(f"image {proof.image}: {proof.words}")
    for name in evidence_names(proof):
        print(f"  {repository.store.url}/{name}")


def _write(path: Path, content: bytes) -> None:
    from imager.errors import ImagerError

    try:
        path.write_bytes(content)
    except OSError as error:
        raise ImagerError(f"cannot write {path}: {error.strerror}") from None


# --- options ------------------------------------------------------------------------------------


def _firmware(text: str | None) -> str | None:
    from imager.errors import UsageError
    from imager.firmware import FIRMWARES

    if text is not None and text not in FIRMWARES:
        raise UsageError(f"--firmware {text}: it can be {', '.join(FIRMWARES)}")
    return text


def _acceleration(text: str) -> str:
    from imager.acceleration import ACCELERATIONS
    from imager.errors import UsageError

    if text not in ACCELERATIONS:
        raise UsageError(f"--accel {text}: it can be {', '.join(ACCELERATIONS)}")
    return text


_LEAST_MEMORY = 64 << 20


def _memory(text: str | None) -> int | None:
    from imager.errors import UsageError
    from imager.units import parse_size

    size = None if text is None else parse_size(text)
    if size is not None and size < _LEAST_MEMORY:
        raise UsageError(f"--memory {text}: a machine needs 64 MiB at least")
    return size


def _network(text: str) -> NetworkKind:
    from imager.errors import UsageError
    from imager.qemu import NETWORKS

    for known in NETWORKS:
        if text == known:
            return known
    raise UsageError(f"--network {text}: it can be {', '.join(NETWORKS)}")


def _login(user: str | None, password_file: Path | None) -> LogIn | None:
    from imager.errors import ImagerError, UsageError
    from imager.guestcommand import LogIn

    if (user is None) != (password_file is None):
        raise UsageError("--user and --password-file belong together")
    if user is None or password_file is None:
        return None
    try:
        return LogIn(user, password_file.read_text().removesuffix("\n"))
    except OSError as error:
        raise ImagerError(f"cannot read {password_file}: {error.strerror}") from None


_DISPLAYS = {"none": "none", "window": "gtk"}


def _display(text: str) -> str:
    """QEMU's words for it."""
    from imager.errors import UsageError

    kind, _, number = text.partition(":")
    if kind == "vnc" and number.isdecimal() and int(number) < 10000:
        return f"vnc=127.0.0.1:{number}"
    if text not in _DISPLAYS:
        raise UsageError(f"--display {text}: it can be none, window or vnc:N")
    return _DISPLAYS[text]


def _forwards(texts: list[str]) -> tuple[tuple[int, int], ...]:
    from imager.errors import UsageError

    found = []
    for text in texts:
        here, _, there = text.partition(":")
        if not all(part.isdecimal() and 0 < int(part) < 1 << 16 for part in (here, there)):
            raise UsageError(f"--forward {text}: write it like 8022:22")
        found.append((int(here), int(there)))
    return tuple(found)
