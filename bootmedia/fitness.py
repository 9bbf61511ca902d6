"""Whether a medium still fits the machine that it is kept for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath

from bootmedia.iso import read_iso_file
from bootmedia.medium import Medium
from bootmedia.moduleindex import INDEX_FILES, ModuleIndex
from imager.fingerprint import Device, Fingerprint
from imager.initramfs import read_cpio

_LARGEST_LAYER = 256 << 20


def warnings_about(
    medium: Medium,
    index: ModuleIndex,
    hardware: Fingerprint,
    host_kernel: str,
    newest: Callable[[str], str | None],
) -> Iterator[str]:
    """What has changed since the medium was made, and what it never had.

    ``newest`` gives the id of the newest image of a name, None where it is not known.
    """
    for image in medium.images:
        latest = newest(image.name) if image.name else None
        if latest is not None and latest > image.id:  # ids sort by time
            yield f"{latest} of {image.name} is newer than the image on the medium, {image.id}"
    if version_key(medium.kernel) < version_key(host_kernel):
        yield (
            f"the medium's kernel {medium.kernel} is older than the one that runs here, "
            f"{host_kernel}: build the medium again"
        )
    cards = (device for card in hardware.network for device in card.devices)
    for what, devices in (("storage", hardware.storage), ("network", cards)):
        for device in dict.fromkeys(devices):
            if _needs_driver(device) and not index.modules_for(device.modalias or ""):
                yield (
                    f"no driver on the medium for this machine's {what} device "
                    f"{device.address} ({device.driver})"
                )


def version_key(version: str) -> list[tuple[int, str]]:
    """Sorts 6.1.0-9 before 6.1.0-10."""
    parts = re.findall(r"\d+|[a-z]+", version.lower())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _needs_driver(device: Device) -> bool:
    """A device that no driver is bound to works without one here, too."""
    return bool(device.modalias and device.driver)


def read_module_index(iso: Path) -> ModuleIndex:
    """What drivers a medium has. Raises FormatError when it is not a rescue medium."""
    layer = BytesIO(read_iso_file(iso, "boot/modules.img", limit=_LARGEST_LAYER))
    found = {
        PurePosixPath(member.name).name: member.content
        for member in read_cpio(layer, want=_is_module_index)
        if _is_module_index(member.name)
    }
    return ModuleIndex.from_reader(found.get)


def _is_module_index(name: str) -> bool:
    return PurePosixPath(name).name in INDEX_FILES
