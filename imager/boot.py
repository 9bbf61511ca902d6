"""Boot: an image runs as a virtual machine, a stand-in for its server.

The machine reads the image as it asks for it, and writes to overlays that are thrown away, or kept
to go on later and to be committed as a new image.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from imager.acceleration import choose_acceleration
from imager.errors import ImagerError, UsageError
from imager.firmware import firmware_missing
from imager.imagedrives import image_drives
from imager.machine import Machine, MachineJob, running_machine
from imager.manifest import Manifest
from imager.overlay import make_overlay, overlay_file, read_overlay
from imager.progress import Progress
from imager.proofs import latest_proof
from imager.prove import describe, machine_for
from imager.qemu import Hardware, NetworkKind
from imager.qmp import Event
from imager.repository import Repository

# Room on the host's disk that lets a machine go on that had stopped for want of it.
_ENOUGH_BYTES = 256 << 20
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class BootJob:
    """Everything that one run is told. Without ``firmware``, ``memory`` (bytes) and ``cpus``,
    they are chosen; without ``overlay``, what the machine writes is thrown away."""

    overlay: Path | None = None
    acceleration: str = "auto"
    firmware: str | None = None
    memory: int | None = None
    cpus: int | None = None
    network: NetworkKind = "none"
    forwards: tuple[tuple[int, int], ...] = ()
    display: str = "none"


@contextmanager
def booted(
    repository: Repository, manifest: Manifest, progress: Progress, job: BootJob
) -> Iterator[Machine]:
    """The running machine; it is cut off at the end of the block if it still runs.

    Raises ImagerError: UsageError for an overlay of another image, ToolError when QEMU does not
    start it.
    """
    hardware = _hardware(repository, manifest, job)
    missing = firmware_missing(hardware.firmware)
    if missing:
        raise ImagerError(missing)
    acceleration = choose_acceleration(job.acceleration)
    overlays = _overlays(repository, manifest, job.overlay)

    def note_error(disk: str, error: Exception) -> None:
        progress.note(f"THE IMAGE COULD NOT BE READ, disk {disk}: {error}")

    with image_drives(repository, manifest, overlays, note_error) as drives:
        machine_job = MachineJob(
            hardware, drives, acceleration, job.network, job.forwards, display=job.display
        )
        variables = job.overlay and job.overlay.with_name(f"{job.overlay.name}.uefi")
        with running_machine(machine_job, variables=variables) as machine:
            progress.note(f"runs in {describe(hardware)}, accelerated by {acceleration}")
            yield machine


def attend_machine(machine: Machine, progress: Progress, *, overlay: Path | None = None) -> str:
    """Wait for the machine's end and say what happens to it meanwhile; returns how it ended.

    When the disk of this host is full, the machine stands still; it goes on when there is room.
    """
    shutdown, is_stopped = "", False
    while True:
        ended = machine.ended
        for event in machine.events():
            if event.name == "SHUTDOWN":
                shutdown = str(event.data.get("reason", ""))
            elif event.name == "BLOCK_IO_ERROR" and not is_stopped:
                is_stopped = event.data.get("action") == "stop"
                progress.note(_io_error(event, overlay, is_stopped))
        if ended:
            return _end(machine, shutdown)
        if is_stopped and _has_room(overlay):
            machine.control.execute("cont")
            is_stopped = False
            progress.note("there is room again: the machine goes on")
        machine.control.wait_for_end(_LOOK_SECONDS)


def _hardware(repository: Repository, manifest: Manifest, job: BootJob) -> Hardware:
    """That of a proof, which is known to work, or else the image is looked into."""
    proof = latest_proof(repository, manifest.id)
    if proof is None or not proof.proved or proof.hardware is None:
        return machine_for(repository, manifest, job.firmware, job.memory, job.cpus)
    known = proof.hardware
    return replace(
        known,
        firmware=job.firmware or known.firmware,
        memory=job.memory or known.memory,
        cpus=job.cpus or known.cpus,
    )


def _overlays(
    repository: Repository, manifest: Manifest, path: Path | None
) -> dict[str, Path] | None:
    """The kept overlays of the disks, made where they are missing."""
    if path is None:
        return None
    files = {disk.name: overlay_file(path, disk, manifest) for disk in manifest.disks}
    for disk in manifest.disks:
        file = files[disk.name]
        if not file.exists():
            make_overlay(file, repository, manifest, disk)
        elif read_overlay(file).base != (repository.id, manifest.id, disk.name):
            raise UsageError(f"{file} lies over another image: {read_overlay(file).base.image}")
    return files


def _io_error(event: Event, overlay: Path | None, is_stopped: bool) -> str:
    what = f"{event.data.get('operation')} of {event.data.get('device') or 'a disk'}"
    if event.data.get("nospace"):
        return (
            f"THE DISK OF THIS HOST IS FULL ({_folder(overlay)}): the machine stands still and "
            "goes on when there is room"
        )
    words = f"disk error at a {what}: {event.data.get('reason', 'I/O error')}"
    return f"{words}; the machine stands still" if is_stopped else words


def _folder(overlay: Path | None) -> Path:
    return overlay.absolute().parent if overlay else Path(tempfile.gettempdir())


def _has_room(overlay: Path | None) -> bool:
    found = os.statvfs(_folder(overlay))
    return found.f_bavail * found.f_frsize >= _ENOUGH_BYTES


def _end(machine: Machine, shutdown: str) -> str:
    if shutdown == "guest-shutdown":
        return "the machine switched itself off"
    if shutdown:
        return f"the machine ended: {shutdown}"
    if machine.was_cut_off:
        return "the machine was cut off"
    raise ImagerError(f"the machine ended: {machine.failure() or 'QEMU ended by itself'}")
