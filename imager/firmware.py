"""The firmware of a virtual machine: QEMU's own BIOS, or OVMF, with Secure Boot or without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, get_args

Firmware = Literal["bios", "uefi", "secureboot"]
FIRMWARES: tuple[Firmware, ...] = get_args(Firmware)
FIRMWARE_NAMES: dict[str, str] = {"bios": "BIOS", "uefi": "UEFI", "secureboot": "Secure Boot"}

OVMF = Path("/usr/share/OVMF")
"""Where Debian's package ovmf has its files."""

# Code, and the template of the variables; that of Secure Boot has Microsoft's keys enrolled.
_FILES: dict[str, tuple[str, str]] = {
    "uefi": ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
    "secureboot": ("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd"),
}


def firmware_missing(firmware: str, folder: Path = OVMF) -> str:
    """What keeps this machine from a firmware; empty when nothing does."""
    missing = [name for name in _FILES.get(firmware, ()) if not (folder / name).exists()]
    return f"{folder / missing[0]} is not there (Debian: install ovmf)" if missing else ""


def machine_options(firmware: str, *options: str) -> list[str]:
    """The machine type, with further options of it."""
    # Secure Boot needs a mode of the processor that alone may write the firmware's variables.
    return ["-machine", ",".join(["q35", *options, *["smm=on"] * (firmware == "secureboot")])]


def firmware_options(firmware: str, variables: Path, folder: Path = OVMF) -> list[str]:
    """QEMU's options; ``variables`` is the file of the firmware's variables, made when missing."""
    if firmware not in _FILES:
        return []
    code, template = _FILES[firmware]
    if not variables.exists():
        shutil.copyfile(folder / template, variables)
    options = [
        *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={folder / code}"),
        *("-drive", f"if=pflash,format=raw,unit=1,file={_escaped(variables)}"),
    ]
    if firmware == "secureboot":
        options += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    return options


def _escaped(path: Path) -> str:
    """A comma ends a value for QEMU."""
    return str(path).replace(",", ",,")
