"""Building a rescue medium: kernel, layers, loaders, carried images, job, and the ISO or folder.

Nothing is written outside of the work folder and the place of the result, which appears there
whole, when it is verified, or not at all. The same input gives the same bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any, Protocol

from bootmedia.closure import python_layer
from bootmedia.cpio import File, LayerInfo, Tree, write_layer
from bootmedia.efi import SecureBootState, SignedLoaders, esp_image, find_signed_loaders
from bootmedia.grub import Menu, bios_image, hybrid_boot_sector
from bootmedia.iso import BootImages, IsoFile, IsoInfo, IsoPlan, write_iso
from bootmedia.job import JOB_PATH, Job, NetworkSetup, PinnedImage, Unattended
from bootmedia.kernel import Kernel, find_kernel
from bootmedia.medium import (
    IMAGES_FOLDER,
    RECORD_PATH,
    Medium,
    MediumFile,
    marker_path,
    medium_id,
)
from bootmedia.modules import Selection, modules_layer
from bootmedia.netboot import CONSOLES, write_netboot
from imager import __version__
from imager.errors import RefusedError, UsageError
from imager.fingerprint import Fingerprint
from imager.progress import Progress

LAYERS = ("python", "modules", "job")
"""In the order in which they are unpacked."""

# What the kernel takes for itself; found by trying, with all drivers and with those of a host.
_KERNEL_MEMORY = 64 << 20
_MEMORY_STEP = 16 << 20
_PAGE = 4096
# Boot images, the job, and the ISO's own structures, for some thousand files.
_BOOT_LOADERS = 8 << 20


@dataclass(frozen=True)
class BuildOptions:
    """``created`` in seconds since 1970, ``volume_size`` in bytes of one ISO; ``format`` is "iso"
    or "pxe"."""

    out: Path
    created: int
    format: str = "iso"
    kernel: str | None = None
    kernel_package: Path | None = None
    modules_dir: Path | None = None
    modules: Selection = "all"
    volume_size: int | None = None
    repositories: tuple[str, ...] = ()
    unattended: Unattended | None = None
    pinned: tuple[PinnedImage, ...] = ()
    """Images that the medium names and does not carry."""
    network: NetworkSetup = field(default_factory=NetworkSetup)
    ssh_keys: tuple[str, ...] = ()
    data_engines: tuple[str, ...] = ()
    """Of data backups that the rescue system is to bring back."""
    kernel_args: str = ""
    fill_fallback: bool = True
    boot_entry: bool = True
    work: Path | None = None


@dataclass(frozen=True)
class Built:
    """What was made. ``size`` and ``overhead`` (all but the carried images) in bytes, of all
    volumes; ``least_memory`` in bytes."""

    paths: tuple[Path, ...]
    size: int
    overhead: int
    kernel: str
    secure_boot: bool
    least_memory: int
    warnings: tuple[str, ...]
    medium: Medium

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "paths": [str(path) for path in self.paths],
            "medium": self.medium.to_json(),
        }


class Carried(Protocol):
    """Images that go onto the medium."""

    @property
    def images(self) -> tuple[PinnedImage, ...]: ...

    def volumes(self, capacity: int | None) -> list[tuple[IsoFile, ...]]:
        """The repository's files on each volume, each with at most ``capacity`` bytes (None: all
        on one). Raises UsageError when one file alone is larger."""


def build(
    options: BuildOptions, hardware: Fingerprint, carried: Carried | None, progress: Progress
) -> Built:
    """Make the medium. ``hardware``: the machine whose drivers ``modules="host"`` takes.

    Raises ImagerError when something that it takes is missing here, UsageError for options that
    contradict each other, RefusedError when the result would overwrite what is no medium, and
    IntegrityError when the ISO does not hold what was written.
    """
    _check(options, carried)
    with _work_folder(options.work) as work:
        kernel = find_kernel(
            options.kernel, options.modules_dir, options.kernel_package, scratch=work
        )
        system = _make_system(options, kernel, hardware, work, progress)
        job = _make_job(options, system, carried)
        if options.format == "pxe":
            return _make_folder(options, system, job, work)
        volumes = _split(options, system, carried)
        job = replace(job, volumes=len(volumes))
        return _make_isos(options, system, job, volumes, progress)


# --- the rescue system --------------------------------------------------------------------------


@dataclass(frozen=True)
class _System:
    """What every medium of a build has. ``least_memory`` and sizes in bytes."""

    kernel: Kernel
    loaders: SignedLoaders
    layers: dict[str, Path]
    digests: dict[str, str]
    least_memory: int
    warnings: tuple[str, ...]

    @property
    def secure_boot(self) -> SecureBootState:
        return self.loaders.secure_boot(kernel_signed=self.kernel.signed)

    @property
    def arguments(self) -> str:
        """For the kernel's command line; the first script of the rescue system knows the memory
        from there, since the job may be what is missing."""
        return f"imager.memory={self.least_memory >> 20}"


def _make_system(
    options: BuildOptions, kernel: Kernel, hardware: Fingerprint, work: Path, progress: Progress
) -> _System:
    progress.note("collecting Python, imager and tools")
    python = python_layer(ssh=bool(options.ssh_keys), data=options.data_engines)
    progress.note(f"collecting drivers of kernel {kernel.version}")
    modules = modules_layer(kernel, options.modules, hardware, scratch=work)
    trees = {"python": python.tree, "modules": modules.tree}
    layers = {name: work / f"{name}.img" for name in LAYERS}
    written = {
        name: write_layer(tree, layers[name], sentinel=name, epoch=options.created)
        for name, tree in trees.items()
    }
    files = len(python.tree) + len(modules.tree)
    return _System(
        kernel=kernel,
        loaders=find_signed_loaders(),
        layers=layers,
        digests={name: info.sha256 for name, info in written.items()},
        least_memory=_least_memory(list(written.values()), files),
        warnings=(*python.warnings, *modules.warnings),
    )


def _least_memory(layers: list[LayerInfo], files: int) -> int:
    """The kernel unpacks into a tmpfs of half the memory that it and the packed layers leave; a
    file takes whole pages there, half a page more than its size on average."""
    packed = sum(layer.size for layer in layers)
    unpacked = sum(layer.unpacked_size for layer in layers) + files * _PAGE // 2
    needed = _KERNEL_MEMORY + packed + 2 * unpacked
    return -(-needed // _MEMORY_STEP) * _MEMORY_STEP


def _make_job(options: BuildOptions, system: _System, carried: Carried | None) -> Job:
    """What the rescue system is to do; its layer is written when the number of volumes is known.

    A medium for the network has no volumes.
    """
    job = Job(
        medium_id="",
        created=options.created,
        tool_version=__version__,
        kernel=system.kernel.version,
        least_memory=system.least_memory,
        layers=LAYERS,
        volumes=0,
        images=(*(carried.images if carried else ()), *options.pinned),
        repositories=options.repositories,
        unattended=options.unattended,
        network=options.network,
        ssh_keys=options.ssh_keys,
        fill_fallback=options.fill_fallback,
        boot_entry=options.boot_entry,
    )
    parts = [job.to_bytes(), options.kernel_args.encode()]
    digests = [system.digests[name].encode() for name in sorted(system.digests)]
    return replace(job, medium_id=medium_id([*parts, *digests]))


def _write_job(options: BuildOptions, system: _System, job: Job) -> None:
    tree = Tree()
    tree.add(File(JOB_PATH, 0o600, job.to_bytes()))
    write_layer(tree, system.layers["job"], sentinel="job", epoch=options.created)


def _medium(options: BuildOptions, system: _System, job: Job) -> Medium:
    return Medium(
        id=job.medium_id,
        created=options.created,
        tool_version=__version__,
        kernel=system.kernel.version,
        modules=options.modules,
        least_memory=system.least_memory,
        secure_boot=system.secure_boot.boots,
        volumes=job.volumes,
        images=job.images,
        files=tuple(_boot_files(system)),
    )


def _boot_files(system: _System) -> Iterator[MediumFile]:
    for path, source in _boot_sources(system).items():
        with source.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        yield MediumFile(path, source.stat().st_size, digest)


def _boot_sources(system: _System) -> dict[str, Path]:
    layers = {f"boot/{path.name}": path for path in system.layers.values()}
    return {"boot/vmlinuz": system.kernel.image, **layers}


# --- ISOs ---------------------------------------------------------------------------------------


def _split(
    options: BuildOptions, system: _System, carried: Carried | None
) -> list[tuple[IsoFile, ...]]:
    if carried is None:
        return [()]
    if options.volume_size is None:
        return carried.volumes(None)
    sources = [system.kernel.image, *(system.layers[name] for name in system.digests)]
    boot = sum(path.stat().st_size for path in sources) + _BOOT_LOADERS
    if options.volume_size <= boot:
        raise UsageError(f"the rescue system alone needs {boot} bytes of a volume")
    return carried.volumes(options.volume_size - boot)


def _make_isos(
    options: BuildOptions,
    system: _System,
    job: Job,
    volumes: list[tuple[IsoFile, ...]],
    progress: Progress,
) -> Built:
    _write_job(options, system, job)
    medium = _medium(options, system, job)
    boot = _boot_images(options, system, job)
    paths = [_volume_path(options.out, n, len(volumes)) for n in range(1, len(volumes) + 1)]
    written: list[IsoInfo] = []
    for number, (path, files) in enumerate(zip(paths, volumes, strict=True), 1):
        volume = replace(medium, volume=number)
        plan = IsoPlan(
            volume_id=f"IMAGER_{number}" if len(volumes) > 1 else "IMAGER",
            medium_id=job.medium_id,
            files=(*_medium_files(options, system, volume), *files),
            boot=boot,
            created=options.created,
        )
        written.append(write_iso(plan, path, progress))
    size = sum(iso.size for iso in written)
    images = sum(
        file.size
        for iso in written
        for file in iso.files
        if file.path.startswith(f"{IMAGES_FOLDER}/")
    )
    return _built(tuple(paths), size, size - images, system, medium)


def _boot_images(options: BuildOptions, system: _System, job: Job) -> BootImages:
    return BootImages(
        bios=bios_image(job.medium_id),
        efi=esp_image(system.loaders, job.medium_id, options.created),
        hybrid=hybrid_boot_sector(),
    )


def _medium_files(options: BuildOptions, system: _System, medium: Medium) -> Iterator[IsoFile]:
    arguments = f"{system.arguments} {options.kernel_args}".strip()
    menu = Menu(medium.id, title=f"imager {__version__}", arguments=arguments)
    yield IsoFile("boot/grub/grub.cfg", menu.text().encode())
    for path, source in _boot_sources(system).items():
        yield IsoFile(path, source)
    yield IsoFile(RECORD_PATH, medium.to_bytes())
    yield IsoFile(marker_path(medium.id), b"")


def _volume_path(out: Path, number: int, count: int) -> Path:
    return out if count == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")


# --- the folder for the network -----------------------------------------------------------------


def _make_folder(options: BuildOptions, system: _System, job: Job, work: Path) -> Built:
    _write_job(options, system, job)
    medium = _medium(options, system, job)
    folder = work / "netboot"
    folder.mkdir()
    write_netboot(
        folder,
        kernel=system.kernel.image,
        layers={path.name: path for path in system.layers.values()},
        arguments=f"{CONSOLES} quiet {system.arguments} {options.kernel_args}".rstrip(),
        least_memory=system.least_memory,
        loaders=system.loaders.for_network() if system.secure_boot.boots else {},
    )
    record = folder / RECORD_PATH
    record.parent.mkdir()
    record.write_bytes(medium.to_bytes())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if options.out.exists():
        shutil.rmtree(options.out)
    shutil.move(folder, options.out)
    return _built((options.out,), size, size, system, medium)


# --- around it ----------------------------------------------------------------------------------


def _check(options: BuildOptions, carried: Carried | None) -> None:
    out = options.out
    if options.format == "pxe":
        if carried is not None and not options.repositories:
            raise UsageError(
                "a folder for the network carries no images",
                hint="say from where the rescue system gets them: --fetch URL",
            )
        if options.volume_size is not None:
            raise UsageError("only ISOs are split into volumes")
        if out.exists() and not (out / RECORD_PATH).is_file() and not _is_empty_folder(out):
            raise RefusedError([f"{out} is there already, and was not made by imager media build"])
    elif out.exists() and not out.is_file():
        hint = f"build a file, then: imager media write FILE {out}"
        raise RefusedError([f"{out} is not a file"], hint=hint)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.absolute().parent}")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def _work_folder(parent: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="imager-media-", dir=parent) as name:
        yield Path(name)


def _built(
    paths: tuple[Path, ...], size: int, overhead: int, system: _System, medium: Medium
) -> Built:
    state = system.secure_boot
    return Built(
        paths=paths,
        size=size,
        overhead=overhead,
        kernel=system.kernel.version,
        secure_boot=state.boots,
        least_memory=system.least_memory,
        warnings=(*system.warnings, *([] if state.boots else [str(state)])),
        medium=medium,
    )
