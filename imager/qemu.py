"""A virtual machine as a command line of QEMU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from imager.acceleration import QEMU, acceleration_options
from imager.firmware import firmware_options, machine_options
from imager.jsonrecord import JsonRecord

NetworkKind = Literal["none", "isolated", "user"]
NETWORKS: tuple[NetworkKind, ...] = get_args(NetworkKind)
"""A card without a cable; with a network of its own that leads nowhere; with the host's network
behind it."""

# How disks are attached: the controller's device, if it takes one, and the disk's.
BUSES: dict[str, tuple[str | None, str]] = {
    "virtio": (None, "virtio-blk-pci"),
    "sata": (None, "ide-hd"),
    "nvme": (None, "nvme"),
    "virtio-scsi": ("virtio-scsi-pci", "scsi-hd"),
    "megaraid": ("megasas-gen2", "scsi-hd"),
    "pvscsi": ("pvscsi", "scsi-hd"),
    "usb": ("qemu-xhci", "usb-storage"),
}

CARDS = ("virtio-net-pci", "e1000", "e1000e", "vmxnet3", "rtl8139")

_MAX_SERIAL = 20  # of virtio, ATA and NVMe


@dataclass(frozen=True)
class Hardware(JsonRecord):
    """A virtual machine; ``memory`` in bytes."""

    firmware: str = "bios"
    bus: str = "virtio"
    card: str = "virtio-net-pci"
    memory: int = 1 << 30
    cpus: int = 2


@dataclass(frozen=True)
class Drive:
    """A disk of the machine: a qcow2 overlay over a base that is only read."""

    overlay: Path
    base: dict[str, Any]
    """QEMU's options of the block device below the overlay."""
    serial: str = ""
    sector_size: int = 512
    keep: bool = False
    """Whether the overlay is to outlive the host's crash: flushes count."""


@dataclass(frozen=True)
class Wiring:
    """What the machine is connected to: open files by number, and the outer world."""

    control: int
    serial: int
    memory: int
    """A file that is the machine's memory."""
    agent: int | None = None
    network: NetworkKind = "none"
    forwards: tuple[tuple[int, int], ...] = ()
    """(port of this host's 127.0.0.1, port of the machine), TCP."""
    display: str = "none"


def command_line(
    hardware: Hardware,
    drives: Sequence[Drive],
    wiring: Wiring,
    *,
    acceleration: str,
    variables: Path,
) -> list[str]:
    """``variables`` is the file of the firmware's variables."""
    return [
        *(QEMU, *acceleration_options(acceleration)),
        *machine_options(hardware.firmware, "memory-backend=memory"),
        *("-smp", str(hardware.cpus), "-m", f"{hardware.memory >> 20}M"),
        *("-object", _memory(hardware, wiring)),
        # It waits for the first command: no event is lost.
        *("-S", "-nodefaults", "-no-user-config", "-display", wiring.display),
        *("-device", "VGA", "-device", "virtio-rng-pci"),
        *("-chardev", f"socket,id=control,fd={wiring.control}"),
        *("-mon", "chardev=control,mode=control"),
        *("-chardev", f"socket,id=serial,fd={wiring.serial}", "-serial", "chardev:serial"),
        *_agent(wiring),
        *_disks(hardware, drives),
        *_network(hardware, wiring),
        *firmware_options(hardware.firmware, variables),
    ]


def _memory(hardware: Hardware, wiring: Wiring) -> str:
    return json.dumps(
        {
            "qom-type": "memory-backend-file",
            "id": "memory",
            "mem-path": f"/proc/self/fd/{wiring.memory}",
            "size": hardware.memory >> 20 << 20,
            "share": True,
        }
    )


def _agent(wiring: Wiring) -> Iterator[str]:
    """Where the QEMU guest agent listens for commands."""
    if wiring.agent is None:
        return
    yield from ("-chardev", f"socket,id=agent,fd={wiring.agent}")
    yield from ("-device", "virtio-serial-pci")
    yield from ("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0")


def _disks(hardware: Hardware, drives: Sequence[Drive]) -> Iterator[str]:
    controller, device = BUSES[hardware.bus]
    if controller:
        yield from ("-device", controller)
    for number, drive in enumerate(drives):
        yield from _block_device(drive, number)
        options = [device, f"drive=disk{number}", f"bootindex={number + 1}"]
        serial = re.sub(r"[^A-Za-z0-9._-]", "", drive.serial)[:_MAX_SERIAL]
        if serial or hardware.bus == "nvme":
            options.append(f"serial={serial or f'disk{number}'}")
        if device == "ide-hd":
            options.append(f"bus=ide.{number}")
        else:
            options.append(f"logical_block_size={drive.sector_size}")
            options.append(f"physical_block_size={drive.sector_size}")
        yield from ("-device", ",".join(options))


def _block_device(drive: Drive, number: int) -> Iterator[str]:
    base = {**drive.base, "node-name": f"base{number}", "read-only": True}
    yield from ("-blockdev", json.dumps(base))
    cache = {"direct": False, "no-flush": not drive.keep}
    overlay = {
        "driver": "qcow2",
        "node-name": f"disk{number}",
        "file": {"driver": "file", "filename": str(drive.overlay), "cache": cache},
        "cache": cache,
        "backing": f"base{number}",
        "discard": "unmap",
    }
    yield from ("-blockdev", json.dumps(overlay))


def _network(hardware: Hardware, wiring: Wiring) -> Iterator[str]:
    if wiring.network == "none":
        yield from ("-netdev", "hubport,id=net,hubid=0")
    else:
        host = ["user", "id=net", *["restrict=on"] * (wiring.network == "isolated")]
        host += [f"hostfwd=tcp:127.0.0.1:{here}-:{there}" for here, there in wiring.forwards]
        yield from ("-netdev", ",".join(host))
    # Without its ROM, no firmware tries to boot from the network.
    yield from ("-device", f"{hardware.card},netdev=net,romfile=")
