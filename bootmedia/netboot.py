"""The rescue system as a folder to boot from over the network.

iPXE fetches what ``boot.ipxe`` names from where it got that file, by TFTP or HTTP. With Secure Boot
the firmware loads shim, which loads GRUB's signed network image; that image looks for
``/grub/grub.cfg`` on the TFTP server only, so there the folder has to be the server's root.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

# tty0 last: it is what /dev/console is, and a serial line that isn't there would be a dead one.
CONSOLES = "console=ttyS0,115200 console=tty0"

KERNEL = "vmlinuz"
SHIM = "shimx64.efi"
GRUB = "grubx64.efi"

# The kernel's own EFI loader fetches what its command line names as initrd, in that order; a BIOS
# start, where iPXE hands all of them over, ignores those words.
_IPXE = """#!ipxe
kernel {kernel} {named} {arguments}
{fetched}
boot
"""

_GRUB = """set timeout=5
set default=0
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
menuentry "imager rescue" {{
    linux /{kernel} {arguments}
    initrd {layers}
}}
"""

_README = """This folder boots the rescue system of imager over the network.

By iPXE (BIOS, and UEFI without Secure Boot): have the DHCP server name boot.ipxe to iPXE
clients. The folder can be served by TFTP or HTTP. For example, with dnsmasq beside a DHCP server
that is there already (put in your network's address):

    dnsmasq --no-daemon --port=0 --dhcp-range=192.0.2.0,proxy --enable-tftp \\
        --tftp-root=$PWD --dhcp-boot=boot.ipxe

{secure_boot}
Network cards that do not start iPXE by themselves need it handed to them first: undionly.kpxe
(BIOS) or ipxe.efi (UEFI), for example from Debian's package ipxe.

Least memory of a machine: {memory} MiB. There are no images in this folder: the rescue system
fetches them from the repositories that were named when it was built, or finds them on an attached
disk.
"""

_SECURE_BOOT = """With Secure Boot: have the DHCP server name shimx64.efi to the firmware. This
folder must be the root of the TFTP server then.
"""
_NO_SECURE_BOOT = """It does not boot with Secure Boot on: it was built without signed loaders or
without a signed kernel.
"""


def write_netboot(
    folder: Path,
    *,
    kernel: Path,
    layers: Mapping[str, Path],
    arguments: str,
    least_memory: int,
    loaders: Mapping[str, Path],
) -> None:
    """Fill ``folder``. ``layers``: parts of the initramfs by file name, in their order;
    ``loaders``: signed ones for Secure Boot by file name, or none; ``least_memory`` in bytes."""
    shutil.copyfile(kernel, folder / KERNEL)
    for name, path in (*layers.items(), *loaders.items()):
        shutil.copyfile(path, folder / name)
    (folder / "boot.ipxe").write_text(_ipxe_script(tuple(layers), arguments))
    (folder / "grub").mkdir()
    (folder / "grub/grub.cfg").write_text(_grub_config(tuple(layers), arguments))
    text = _README.format(
        secure_boot=_SECURE_BOOT if loaders else _NO_SECURE_BOOT, memory=least_memory >> 20
    )
    (folder / "README.txt").write_text(text)


def _ipxe_script(layers: tuple[str, ...], arguments: str) -> str:
    return _IPXE.format(
        kernel=KERNEL,
        named=" ".join(f"initrd={name}" for name in layers),
        arguments=arguments,
        fetched="\n".join(f"initrd {name}" for name in layers),
    )


def _grub_config(layers: tuple[str, ...], arguments: str) -> str:
    return _GRUB.format(
        kernel=KERNEL, arguments=arguments, layers=" ".join(f"/{name}" for name in layers)
    )
