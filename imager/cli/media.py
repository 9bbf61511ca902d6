"""imager media build, check, write. The only part that knows both imager and bootmedia."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imager.cli.options import JsonOption, ProgressOption, RepoOption, open_repository
from imager.cli.output import print_json

if TYPE_CHECKING:
    from bootmedia.build import BuildOptions, Built
    from bootmedia.carried import CarriedImages
    from bootmedia.check import Attempt, Mode
    from bootmedia.job import NetworkSetup, PinnedImage, TargetRule, Unattended
    from bootmedia.medium import Medium
    from bootmedia.write import WritePlan
    from imager.manifest import Manifest
    from imager.repository import Repository

_FORMATS = ("iso", "pxe")
_MODULES = ("all", "host")
_ENDINGS = ("reboot", "poweroff")
_RULES = ("serial=", "wwn=", "model=", "/dev/")

app = typer.Typer(
    help="Rescue media: build one, try it, put it onto a stick.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("build")
def build(
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="The ISO, or the folder with pxe.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE", help="Carry this image; several times.")
    ] = None,
    fetch: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A repository that the rescue system shall offer."),
    ] = None,
    format: Annotated[str, typer.Option(metavar="iso|pxe", help="What to make.")] = "iso",
    kernel: Annotated[
        str | None,
        typer.Option(metavar="VERSION|FILE.deb", help="Another kernel than the running one."),
    ] = None,
    modules_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A root with boot/vmlinuz-* and lib/modules/*."),
    ] = None,
    modules: Annotated[
        str,
        typer.Option(metavar="all|host", help="Drivers for any machine, or for this one only."),
    ] = "all",
    volume_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Split what is larger: OUT-1.iso, OUT-2.iso and so on."),
    ] = None,
    unattended: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IMAGE[/DISK]=RULE",
            help="Restore without being asked. RULE: only, serial=, wwn=, model= or /dev/…",
        ),
    ] = None,
    grow: Annotated[
        bool, typer.Option("--grow", help="Unattended: grow the last filesystem.")
    ] = False,
    then: Annotated[
        str, typer.Option(metavar="reboot|poweroff", help="After an unattended restore.")
    ] = "reboot",
    countdown: Annotated[
        int, typer.Option(metavar="SECONDS", min=0, help="Before an unattended restore.")
    ] = 10,
    report_url: Annotated[
        str | None, typer.Option(metavar="URL", help="POST the unattended result to this.")
    ] = None,
    network: Annotated[
        str,
        typer.Option(
            metavar="dhcp|none|ADDRESS/PREFIX[,GATEWAY[,DNS...]]", help="In the rescue system."
        ),
    ] = "dhcp",
    ssh_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Public keys that may log in: starts an SSH server."),
    ] = None,
    data: Annotated[
        bool,
        typer.Option("--data", help="Carry the programs that bring back the data of imager.toml."),
    ] = False,
    kernel_args: Annotated[
        str, typer.Option(metavar="TEXT", help="More words for the kernel's command line.")
    ] = "",
    no_fill_fallback: Annotated[
        bool,
        typer.Option("--no-fill-fallback", help="Do not add EFI/BOOT to a disk that lacks it."),
    ] = False,
    no_boot_entry: Annotated[
        bool, typer.Option("--no-boot-entry", help="Do not write a UEFI boot entry.")
    ] = False,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For temporary files; else TMPDIR.")
    ] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Make a rescue medium of this machine's kernel, drivers and imager. Needs no network."""
    from imager.cli.bars import open_progress
    from imager.errors import UsageError
    from imager.fingerprint import read_fingerprint
    from imager.units import parse_size

    _expect("--format", format, _FORMATS)
    _expect("--modules", modules, _MODULES)
    _expect("--then", then, _ENDINGS)
    if unattended is None and (grow or report_url):
        raise UsageError("--grow and --report-url are for --unattended")
    package, version = _kernel_choice(kernel)
    split_at = None if volume_size is None else parse_size(volume_size)
    keys, connection = _ssh_keys(ssh_key), parse_network(network)
    repository = open_repository(repo) if image or unattended else None
    manifests = _distinct([repository.find(text) for text in image or []] if repository else [])
    plan = None
    named: list[Manifest] = []
    if unattended and repository:
        plan, manifest = _unattended(
            [_rule(text) for text in unattended],
            repository.find,
            grow=grow,
            countdown=countdown,
            then=then,
            report_url=report_url,
        )
        for disk in {disk.name for disk in manifest.disks} - {rule.disk for rule in plan.targets}:
            print(f"note: no --unattended for disk {disk}: it is not restored", file=sys.stderr)
        if manifest.id not in {carried.id for carried in manifests}:
            named.append(manifest)
        if named and not fetch:
            raise UsageError(
                f"the medium could not reach {manifest.id} to restore it unattended",
                hint=f"carry it: --image {manifest.id}; or say from where: --fetch URL",
            )
    from bootmedia.build import BuildOptions
    from bootmedia.build import build as run

    options = BuildOptions(
        out=out or Path("imager-rescue.iso" if format == "iso" else "imager-rescue"),
        format=format,
        created=_created(),
        kernel=version,
        kernel_package=package,
        modules_dir=modules_dir,
        modules="host" if modules == "host" else "all",
        volume_size=split_at,
        repositories=tuple(fetch or ()),
        unattended=plan,
        pinned=tuple(map(pinned, named)),
        network=connection,
        ssh_keys=keys,
        data_engines=_data_engines() if data else (),
        kernel_args=kernel_args,
        fill_fallback=not no_fill_fallback,
        boot_entry=not no_boot_entry,
        work=work,
    )
    with ExitStack() as stack:
        shown = stack.enter_context(open_progress(progress))
        carried = _carried(repository, manifests, work, stack) if repository else None
        built = run(options, read_fingerprint(), carried, shown)
    if json:
        print_json(built.to_json())
    else:
        _print_built(options, built)


@app.command("check")
def check(
    iso: Annotated[Path, typer.Argument(metavar="ISO", help="The medium; of several the first.")],
    accel: Annotated[
        str, typer.Option(metavar="auto|kvm|tcg", help="How QEMU runs the machine.")
    ] = "auto",
    mode: Annotated[
        list[str] | None,
        typer.Option(metavar="FIRMWARE-BUS", help="Only this: bios-cd, uefi-usb, secureboot-cd…"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of the emulated machine.")
    ] = None,
    no_boot: Annotated[
        bool, typer.Option("--no-boot", help="Only look for what is out of date or missing.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="SECONDS", min=1, help="Time for each boot.")
    ] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> int:
    """Boot a medium in QEMU in each way that machines do, and say what it lacks."""
    from bootmedia.check import BOOT_SECONDS, MEMORY, check_boots
    from bootmedia.write import read_medium
    from imager.cli.bars import open_progress
    from imager.units import parse_size

    medium = read_medium(iso)
    warnings = _fitness(iso, medium, repo)
    attempts: list[Attempt] = []
    if not no_boot:
        with open_progress(progress) as shown:
            attempts = check_boots(
                iso,
                shown,
                modes=_modes(mode),
                signed=medium.secure_boot,
                accel=accel,
                memory=parse_size(memory) if memory else MEMORY,
                limit_seconds=limit or BOOT_SECONDS,
            )
    if json:
        print_json(
            {
                "medium": medium.id,
                "kernel": medium.kernel,
                "boots": [attempt.to_json() for attempt in attempts],
                "warnings": warnings,
            }
        )
    else:
        _print_check(attempts, warnings)
    failed = any(attempt.outcome == "fails" for attempt in attempts)
    worked = no_boot or any(attempt.outcome == "works" for attempt in attempts)
    return 0 if worked and not failed else 1


@app.command("write")
def write(
    iso: Annotated[Path, typer.Argument(metavar="ISO", help="What `imager media build` made.")],
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="The stick, like /dev/sdb.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask for the device's name to be typed.")
    ] = False,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Put a medium onto a stick, overwriting it, and read it back."""
    from bootmedia.write import plan_write, write_medium
    from imager.cli.asking import confirm_by_name
    from imager.cli.bars import open_progress
    from imager.errors import RefusedError

    plan = plan_write(str(iso), device)
    if plan.refusals:
        raise RefusedError(list(plan.refusals))
    if not json:
        _print_write_plan(plan)
    if not yes:
        confirm_by_name(device)
    with open_progress(progress) as shown:
        write_medium(plan, shown)
    if json:
        print_json(plan.to_json())
    else:
        print(f"{device}: written, and read back the same")


# --- what the options mean ---


def parse_network(text: str) -> NetworkSetup:
    """``dhcp``, ``none``, or ``192.0.2.7/24,192.0.2.1,192.0.2.53``. Raises UsageError."""
    import ipaddress

    from bootmedia.job import NetworkSetup
    from imager.errors import UsageError

    if text in ("dhcp", "none"):
        return NetworkSetup(mode=text)
    address, *others = text.split(",")
    try:
        if "/" not in address:
            raise ValueError("the length of the prefix is missing")
        own = ipaddress.ip_interface(address)
        hosts = [str(ipaddress.ip_address(other)) for other in others]
    except ValueError as error:
        raise UsageError(
            f"--network {text}: {error}", hint="write it like 192.0.2.7/24,192.0.2.1,192.0.2.53"
        ) from None
    gateway = hosts[0] if hosts else None
    return NetworkSetup(mode="static", address=str(own), gateway=gateway, dns=tuple(hosts[1:]))


def _rule(text: str) -> tuple[str, str, str]:
    """``IMAGE[/DISK]=RULE`` as its three parts; the disk may be empty."""
    from bootmedia.job import ONLY_DISK
    from imager.errors import UsageError

    what, _, rule = text.partition("=")
    image, _, disk = what.partition("/")
    named = any(rule.startswith(start) and rule != start for start in _RULES)
    if not image or not (rule == ONLY_DISK or named):
        raise UsageError(
            f"--unattended {text}: which image goes to which disk?",
            hint="for example web1@latest=only or web1@latest/sda=serial=S3Z9NB0K",
        )
    return image, disk, rule


def _unattended(
    rules: list[tuple[str, str, str]], find: Any, **how: Any
) -> tuple[Unattended, Manifest]:
    """One image, and one rule for each of its disks that is to be restored."""
    from bootmedia.job import TargetRule, Unattended
    from imager.errors import UsageError

    manifests = {manifest.id: manifest for manifest in (find(image) for image, *_ in rules)}
    if len(manifests) != 1:
        raise UsageError("--unattended names several images: only one can be restored")
    (manifest,) = manifests.values()
    targets: list[TargetRule] = []
    for _, disk, rule in rules:
        names = [item.name for item in manifest.disks if not disk or item.name == disk]
        if len(names) != 1:
            known = ", ".join(item.name for item in manifest.disks)
            raise UsageError(f"--unattended: which disk of {manifest.id}?", hint=f"it has: {known}")
        targets.append(TargetRule(names[0], rule))
    if len({item.disk for item in targets}) != len(targets):
        raise UsageError("--unattended names a disk twice")
    return Unattended(image=manifest.id, targets=tuple(targets), **how), manifest


def _distinct(manifests: list[Manifest]) -> list[Manifest]:
    return list({manifest.id: manifest for manifest in manifests}.values())


def _carried(
    repository: Repository, manifests: list[Manifest], work: Path | None, stack: ExitStack
) -> CarriedImages | None:
    """The images' objects, as files: where they are, or fetched until the stack is closed."""
    from bootmedia.carried import CarriedImages, StoredObject
    from imager import carry

    if not manifests:
        return None
    prefix = "imager-carried-"
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=work)))

    def source(item: StoredObject) -> Path:
        return carry.source_file(repository.store, item, scratch)

    pins = tuple(map(pinned, manifests))
    return CarriedImages(pins, tuple(carry.objects_of(repository, manifests)), source)


def pinned(manifest: Manifest) -> PinnedImage:
    from bootmedia.job import PinnedDisk, PinnedImage

    disks = tuple(PinnedDisk(disk.name, disk.root) for disk in manifest.disks)
    return PinnedImage(manifest.id, manifest.name, disks)


def _kernel_choice(text: str | None) -> tuple[Path | None, str | None]:
    """A Debian package or a version."""
    if text is None or not text.endswith(".deb"):
        return None, text
    return Path(text), None


def _created() -> int:
    """Seconds since 1970 (reproducible-builds.org, SOURCE_DATE_EPOCH)."""
    import time

    from imager.errors import UsageError

    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        return int(time.time())
    if not text.isdecimal():
        raise UsageError(f"SOURCE_DATE_EPOCH={text}: seconds since 1970 were expected")
    return int(text)


def _ssh_keys(file: Path | None) -> tuple[str, ...]:
    from imager.errors import UsageError

    if file is None:
        return ()
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise UsageError(f"--ssh-key {file} can't be read: {error}") from None
    if "PRIVATE KEY" in text:
        raise UsageError(
            f"{file} is a private key: it must not go onto a medium", hint=f"give {file}.pub"
        )
    keys = [line.strip() for line in text.splitlines()]
    keys = [line for line in keys if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"{file} has no public keys")
    return tuple(keys)


def _data_engines() -> tuple[str, ...]:
    """Those of imager.toml, without commands: these are the restored system's own."""
    from imager.data.settings import load_entries
    from imager.errors import UsageError

    entries = load_entries()
    if not entries:
        raise UsageError("--data: imager.toml has no data backups")
    return tuple(sorted({entry.engine for entry in entries} - {"command"}))


def _modes(names: list[str] | None) -> tuple[Mode, ...]:
    from bootmedia.check import MODES
    from imager.errors import UsageError

    known = {f"{mode.firmware}-{mode.bus}": mode for mode in MODES}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise UsageError(f"--mode {unknown[0]}: it can be {', '.join(known)}")
    return tuple(mode for name, mode in known.items() if not names or name in names)


def _expect(option: str, value: str, known: tuple[str, ...]) -> None:
    from imager.errors import UsageError

    if value not in known:
        raise UsageError(f"{option} {value}: it can be {' or '.join(known)}")


def _fitness(iso: Path, medium: Medium, repo: str | None) -> list[str]:
    """What is out of date or missing. A repository that can't be reached knows nothing newer."""
    from bootmedia.fitness import read_module_index, warnings_about
    from imager.errors import ImagerError
    from imager.fingerprint import read_fingerprint

    def newest(name: str) -> str | None:
        try:
            latest = open_repository(repo).latest(name)
        except ImagerError:
            if repo is not None:
                raise
            return None
        return latest.id if latest else None

    index, host_kernel = read_module_index(iso), os.uname().release
    return list(warnings_about(medium, index, read_fingerprint(), host_kernel, newest))


# --- what is printed ---


def _print_built(options: BuildOptions, built: Built) -> None:
    from imager.units import show_bytes

    for path in built.paths:
        print(f"{path}")
    print(f"  size          {show_bytes(built.size)}, {show_bytes(built.overhead)} beside images")
    print(f"  kernel        {built.kernel}, {options.modules} drivers")
    print(f"  secure boot   {'yes' if built.secure_boot else 'no'}")
    print(f"  least memory  {show_bytes(built.least_memory)}")
    for image in built.medium.images:
        print(f"  image         {image.id} {image.name or ''}".rstrip())
    for text in built.warnings:
        print(f"  warning: {text}")
    if options.format == "iso":
        print(f"try it: imager media check {built.paths[0]}")


def _print_check(attempts: list[Attempt], warnings: list[str]) -> None:
    from imager.cli.output import print_table

    if attempts:
        rows = [
            (
                attempt.mode,
                attempt.outcome,
                f"{attempt.milliseconds / 1000:.0f} s" if attempt.milliseconds else "",
                attempt.reason,
            )
            for attempt in attempts
        ]
        print_table(["BOOT", "OUTCOME", "TIME", "REASON"], rows, right="TIME")
    for attempt in attempts:
        for line in attempt.console:
            print(f"  {attempt.mode}: {line}")
    for text in warnings:
        print(f"warning: {text}")


def _print_write_plan(plan: WritePlan) -> None:
    from imager.units import show_bytes

    identity = plan.identity
    words = [text for text in (identity.model, identity.serial, identity.transport) if text]
    print(f"write {plan.iso} ({show_bytes(plan.size)}) to {plan.target}")
    print(f"  device: {show_bytes(plan.target_size)} {' '.join(words)}".rstrip())
    for text in plan.overwrites:
        print(f"  overwrites {text}")
