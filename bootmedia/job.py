"""What a rescue system is to do: written when the medium is built, read when it has booted.

It lies at ``JOB_PATH`` in a layer of its own, the last and smallest of the initramfs, so that it
can be replaced without building the others again.
"""

from __future__ import annotations

from dataclasses import dataclass

from imager.jsonrecord import JsonRecord

JOB_PATH = "etc/imager/job.json"
"""Relative to the root of the rescue system."""

ONLY_DISK = "only"
"""A target rule: the only disk that is large enough. With more or fewer of them it is refused."""


@dataclass(frozen=True)
class PinnedDisk(JsonRecord):
    """A disk of an image, and the root digest (64 hex digits) that vouches for all of it."""

    name: str
    root: str


@dataclass(frozen=True)
class PinnedImage(JsonRecord):
    """An image as it was when the medium was made; one that differs now is refused."""

    id: str
    name: str | None = None
    disks: tuple[PinnedDisk, ...] = ()


@dataclass(frozen=True)
class TargetRule(JsonRecord):
    """Where a disk of the image goes: ``ONLY_DISK``, ``serial=…``, ``wwn=…``, ``model=…``,
    ``table=…`` (the id of its partition table), or a device's path."""

    disk: str
    target: str


@dataclass(frozen=True)
class Unattended(JsonRecord):
    """A restore that starts by itself after ``countdown`` seconds, unless a key is pressed.

    ``then`` is "reboot" or "poweroff"; it follows a success only. ``delta``: write only what
    differs. ``back``: when nothing could be written, restart, so that the machine's own system
    comes up again.
    """

    image: str
    targets: tuple[TargetRule, ...]
    grow: bool = False
    countdown: int = 10
    then: str = "reboot"
    report_url: str | None = None
    delta: bool = False
    back: bool = False


@dataclass(frozen=True)
class NetworkSetup(JsonRecord):
    """``mode`` is "dhcp", "static" or "none". Without ``interface``: every card with a carrier
    (dhcp), the first of them (static). ``address`` is written like 192.0.2.7/24."""

    mode: str = "dhcp"
    interface: str | None = None
    address: str | None = None
    gateway: str | None = None
    dns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job(JsonRecord):
    """Everything that the rescue system is told.

    ``medium_id``: 16 hex digits, the name of the marker file on the medium; ``least_memory`` in
    bytes; ``created`` in seconds since 1970; ``ssh_keys`` as lines of an authorized_keys file.
    """

    medium_id: str
    created: int
    tool_version: str
    kernel: str
    least_memory: int
    layers: tuple[str, ...]
    """Names of the layers: each ends with a file of that name in the folder ``sentinel``."""
    volumes: int = 1
    images: tuple[PinnedImage, ...] = ()
    repositories: tuple[str, ...] = ()
    """URLs of repositories to offer beside what the medium carries."""
    unattended: Unattended | None = None
    network: NetworkSetup = NetworkSetup()
    ssh_keys: tuple[str, ...] = ()
    fill_fallback: bool = True
    boot_entry: bool = True
