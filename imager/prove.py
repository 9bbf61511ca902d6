"""Prove: boot an image in a virtual machine and see it come up.

The machine reads the image through an export of ours and writes to overlays that are thrown away.
What came of it is stored beside the manifest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from imager import __version__
from imager.acceleration import QEMU, choose_acceleration
from imager.bootsigns import Sign
from imager.bootwatch import Outcome, watch
from imager.errors import ToolError
from imager.firmware import FIRMWARE_NAMES, firmware_missing
from imager.guestcommand import LogIn
from imager.imagedrives import image_drives
from imager.imagemount import read_image_drivers
from imager.machine import MachineJob, running_machine
from imager.manifest import Manifest
from imager.process import find_tool
from imager.progress import Progress
from imager.proofs import Evidence, Proof, new_proof_id, store_proof
from imager.qemu import Hardware, NetworkKind
from imager.repository import Repository, utc_now
from imager.virtualhardware import choose_hardware, imaged_machine

TIMEOUT_SECONDS = 600.0
"""A server boots in half a minute on an idle machine that emulates it, in many on a loaded one."""

_RUN_HERE = frozenset({None, "x86_64", "i386", "i486", "i586", "i686"})


@dataclass(frozen=True)
class ProveJob:
    """Everything that one proof is told. Without ``firmware``, ``memory`` (bytes) and ``cpus``,
    they are chosen."""

    sign: Sign = field(default_factory=Sign)
    timeout_seconds: float = TIMEOUT_SECONDS
    acceleration: str = "auto"
    firmware: str | None = None
    memory: int | None = None
    cpus: int | None = None
    network: NetworkKind = "none"
    login: LogIn | None = None


def prove(
    repository: Repository, manifest: Manifest, progress: Progress, job: ProveJob | None = None
) -> Proof:
    """Boot an image, and store and return what came of it.

    "not tried" is not stored: QEMU or a firmware is missing here, or it is no image for x86.
    Raises ImagerError when something of the image cannot be read, or the proof not be stored.
    """
    job = job or ProveJob()
    blank = Proof(
        manifest.id, "not tried", time=utc_now(), sign=str(job.sign), tool=f"imager {__version__}"
    )
    reason = _why_not(manifest)
    if reason:
        return replace(blank, reason=reason)
    hardware = machine_for(repository, manifest, job.firmware, job.memory, job.cpus)
    blank = replace(blank, hardware=hardware)
    reason = firmware_missing(hardware.firmware)
    if reason:
        return replace(blank, reason=reason)
    acceleration = choose_acceleration(job.acceleration)
    progress.note(f"boots in {describe(hardware)}, accelerated by {acceleration}")
    started = time.monotonic()
    outcome, evidence = _boot(repository, manifest, hardware, acceleration, job)
    proof = replace(
        blank,
        id=new_proof_id(),
        verdict="proved" if outcome.proved else "failed",
        cause=outcome.cause,
        reason=outcome.reason,
        milliseconds=round((time.monotonic() - started) * 1000),
        acceleration=acceleration,
    )
    return store_proof(repository, proof, evidence)


def machine_for(
    repository: Repository,
    manifest: Manifest,
    firmware: str | None = None,
    memory: int | None = None,
    cpus: int | None = None,
) -> Hardware:
    """A machine for the image, with what is said of it. Looks into the image for its drivers."""
    found = read_image_drivers(Repository.open(repository.store.url), manifest)
    hardware = choose_hardware(manifest, found.drivers)
    return replace(
        hardware,
        firmware=firmware or hardware.firmware,
        memory=memory or hardware.memory,
        cpus=cpus or hardware.cpus,
    )


def describe(hardware: Hardware) -> str:
    """A machine in words."""
    return (
        f"{FIRMWARE_NAMES[hardware.firmware]}, {hardware.bus} disks, a {hardware.card} card, "
        f"{hardware.memory >> 20} MiB"
    )


def _why_not(manifest: Manifest) -> str:
    architecture = imaged_machine(manifest).architecture
    if architecture not in _RUN_HERE:
        return f"the image is of a machine of architecture {architecture}"
    for tool, package in ((QEMU, "qemu-system-x86"), ("qemu-img", "qemu-utils")):
        if find_tool(tool) is None:
            return f"{tool} is not installed (Debian: {package})"
    return ""


def _boot(
    repository: Repository,
    manifest: Manifest,
    hardware: Hardware,
    acceleration: str,
    job: ProveJob,
) -> tuple[Outcome, Evidence]:
    errors: list[str] = []

    def note_error(disk: str, error: Exception) -> None:
        errors.append(f"disk {disk}: {error}")

    with image_drives(repository, manifest, on_error=note_error) as drives:
        needs_network = job.sign.kind == "port" and job.network == "none"
        machine_job = MachineJob(
            hardware,
            drives,
            acceleration,
            network="isolated" if needs_network else job.network,
            agent=job.sign.kind == "command",
        )
        try:
            with running_machine(machine_job) as machine:
                outcome, evidence = watch(
                    machine, job.sign, timeout_seconds=job.timeout_seconds, login=job.login
                )
        except ToolError as error:
            outcome, evidence = Outcome(False, "ended", error.message), Evidence()
    if errors and not outcome.proved:
        words = f"{outcome.reason}; the image could not be read: {errors[0]}"
        return Outcome(False, "unreadable", words), evidence
    return outcome, evidence
