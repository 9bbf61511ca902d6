"""GRUB: boot images made by its own grub-mkimage, and the menu of the medium."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bootmedia.medium import marker_path
from imager.errors import ToolError, UsageError
from imager.process import run

CONFIG_PATH = "boot/grub/grub.cfg"
"""Of the menu on the medium, and of the early configuration in the EFI system partition, which is
where Debian's signed GRUB for CDs looks first."""

GRUB_FOLDER = Path("/usr/lib/grub")
SERIAL = "ttyS0,115200"

_PREFIX = "/boot/grub"
# All that the menu uses: the image loads nothing afterwards.
_MODULES = (
    *("normal", "configfile", "search", "search_fs_file", "linux"),
    *("part_gpt", "part_msdos", "iso9660", "fat"),
    *("serial", "terminal", "echo", "test", "sleep", "minicmd", "reboot", "halt"),
)
_BIOS_MODULES = ("biosdisk", "vga_text")
_EFI_MODULES = ("efi_gop", "all_video", "gfxterm")
_HYBRID_SIZE = 512

# What stands on the line after it is the kernel's and never GRUB's.
_PLAIN_ARGUMENTS = re.compile(r"[A-Za-z0-9_.,:;=/@%+*~\[\]() -]*")
_QUIET = ("quiet", "loglevel=3")


@dataclass(frozen=True)
class Menu:
    """What the medium's boot menu says.

    ``kernel`` and ``layers`` are paths on the medium; ``arguments`` are added to the kernel's
    command line; ``timeout`` in seconds until the first entry starts.
    """

    medium_id: str
    kernel: str = "/boot/vmlinuz"
    layers: tuple[str, ...] = ("/boot/python.img", "/boot/modules.img", "/boot/job.img")
    title: str = "imager"
    arguments: str = ""
    timeout: int = 3

    def text(self) -> str:
        """The configuration file. Raises UsageError for arguments that GRUB would take as its own
        words."""
        if not _PLAIN_ARGUMENTS.fullmatch(self.arguments):
            raise UsageError(
                f"kernel arguments with quotes, dollars or other signs of GRUB: {self.arguments}"
            )
        # tty0 last: it is what /dev/console is, and a serial line that isn't there would be a
        # dead one. The rescue system itself opens every console that exists.
        both = (f"console={SERIAL}", "console=tty0")
        entries = (
            ("rescue", "Restore or rescue", (*both, *_QUIET)),
            ("verbose", "Restore or rescue, with kernel messages", (*both, "loglevel=7")),
            ("serial", "Restore or rescue, serial console only", (f"console={SERIAL}", *_QUIET)),
        )
        return _HEAD.format(timeout=self.timeout) + "".join(
            self._entry(name, f"{self.title}: {title}", arguments)
            for name, title, arguments in entries
        )

    def command_line(self, arguments: Sequence[str] = ()) -> str:
        """The kernel's: the medium, these arguments, and the menu's own."""
        return " ".join([f"imager.medium={self.medium_id}", *arguments, *self.arguments.split()])

    def _entry(self, name: str, title: str, arguments: Sequence[str]) -> str:
        return _ENTRY.format(
            name=name,
            title=title.replace("'", ""),
            kernel=self.kernel,
            arguments=self.command_line(arguments),
            layers=" ".join(self.layers),
        )


# A machine without a serial port keeps its screen: `serial` fails there.
_HEAD = """set default=rescue
set timeout={timeout}
if serial --unit=0 --speed=115200; then
    terminal_input console serial
    terminal_output console serial
fi
"""

_ENTRY = """
menuentry '{title}' --id {name} {{
    linux {kernel} {arguments}
    initrd {layers}
}}
"""


def early_config(medium_id: str) -> str:
    """What GRUB runs first: find the medium by its marker among all disks, then the menu there."""
    return (
        f"search --no-floppy --set=root --file /{marker_path(medium_id)}\n"
        f"set prefix=($root){_PREFIX}\n"
        f"configfile ($root)/{CONFIG_PATH}\n"
    )


def bios_image(medium_id: str, *, grub: Path = GRUB_FOLDER) -> bytes:
    """GRUB for BIOS as an El Torito image. Raises ToolError when it is not installed."""
    return _make_image("i386-pc-eltorito", grub / "i386-pc", _BIOS_MODULES, medium_id)


def efi_image(medium_id: str, *, grub: Path = GRUB_FOLDER) -> bytes:
    """GRUB for UEFI, unsigned. Raises ToolError when it is not installed."""
    return _make_image("x86_64-efi", grub / "x86_64-efi", _EFI_MODULES, medium_id)


def hybrid_boot_sector(*, grub: Path = GRUB_FOLDER) -> bytes:
    """The boot sector that starts the El Torito image when the ISO lies on a disk."""
    content = _installed(grub / "i386-pc/boot_hybrid.img").read_bytes()
    if len(content) != _HYBRID_SIZE:
        raise ToolError(f"{grub}/i386-pc/boot_hybrid.img has {len(content)} bytes, not 512")
    return content


def _make_image(platform: str, folder: Path, modules: Sequence[str], medium_id: str) -> bytes:
    _installed(folder)
    with tempfile.TemporaryDirectory(prefix="imager-grub-") as scratch:
        config, image = Path(scratch) / "early.cfg", Path(scratch) / "image"
        config.write_text(early_config(medium_id))
        command = ["grub-mkimage", "-O", platform, "-d", str(folder), "-p", _PREFIX]
        run([*command, "-c", str(config), "-o", str(image), *_MODULES, *modules])
        return image.read_bytes()


def _installed(path: Path) -> Path:
    if not path.exists():
        package = "grub-pc-bin" if "i386-pc" in path.parts else "grub-efi-amd64-bin"
        raise ToolError(
            f"{path} is missing: GRUB for that firmware is not installed",
            hint=f"install {package} and grub-common",
        )
    return path
