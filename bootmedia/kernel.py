"""The kernel that a rescue system boots: this machine's own, or another one that was given."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imager import process
from imager.errors import ImagerError, UsageError

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]*\Z")

# Microsoft PE Format: DOS header, PE signature, COFF header (20 bytes), optional header.
_DOS_HEADER_SIZE = 64
_PE_OFFSET_AT = 0x3C
_COFF_HEADER_SIZE = 20
_PE32, _PE32_PLUS = 0x10B, 0x20B
_DIRECTORIES_AT = {_PE32: 96, _PE32_PLUS: 112}
_CERTIFICATE_TABLE = 4


@dataclass(frozen=True)
class Kernel:
    """``image`` is what a boot loader loads, ``modules`` the folder ``lib/modules/VERSION``.

    ``signed``: the image carries a signature, which Secure Boot asks for (whose it is, and
    whether a machine trusts it, shows only there).
    """

    version: str
    image: Path
    modules: Path
    signed: bool


def find_kernel(
    version: str | None = None,
    modules_dir: Path | None = None,
    package: Path | None = None,
    *,
    scratch: Path,
    root: Path = Path("/"),
) -> Kernel:
    """The kernel of this machine, or the one that is named.

    ``version``: one of several in the place that is searched. ``modules_dir``: a folder with
    ``lib/modules/VERSION`` and ``boot/vmlinuz-VERSION``. ``package``: a Debian package of a
    kernel, which is unpacked into ``scratch``. Raises ImagerError when there is none.
    """
    if modules_dir is not None and package is not None:
        raise UsageError("a folder with modules and a kernel package: only one can be used")
    if version is not None and not _VERSION.match(version):
        raise UsageError(f"not a kernel version: {version!r}")
    if package is not None:
        return _kernel_below(_unpack(package, scratch), version, f"{package}")
    if modules_dir is not None:
        return _kernel_below(modules_dir, version, f"{modules_dir}")
    return _own_kernel(root, version)


def is_signed(image: Path) -> bool:
    """Whether a kernel image is an EFI program with a signature; False for anything else."""
    with image.open("rb") as file:
        dos = file.read(_DOS_HEADER_SIZE)
        if len(dos) < _DOS_HEADER_SIZE or dos[:2] != b"MZ":
            return False
        file.seek(*struct.unpack_from("<I", dos, _PE_OFFSET_AT))
        header = file.read(4 + _COFF_HEADER_SIZE + 112 + 8 * (_CERTIFICATE_TABLE + 1))
    optional = header[4 + _COFF_HEADER_SIZE :]
    if header[:4] != b"PE\0\0" or len(optional) < 2:
        return False
    directories_at = _DIRECTORIES_AT.get(int.from_bytes(optional[:2], "little"))
    if directories_at is None or len(optional) < directories_at + 8 * (_CERTIFICATE_TABLE + 1):
        return False
    (count,) = struct.unpack_from("<I", optional, directories_at - 4)
    _, length = struct.unpack_from("<II", optional, directories_at + 8 * _CERTIFICATE_TABLE)
    return bool(count > _CERTIFICATE_TABLE and length)


def _own_kernel(root: Path, version: str | None) -> Kernel:
    wanted = version or os.uname().release
    kernel = _kernel(root, wanted)
    if kernel is not None:
        return kernel
    others = [other for other in _versions(root) if _kernel(root, other) is not None]
    if others:
        hint = f"choose one that is here with --kernel: {', '.join(others)}"
    else:
        hint = (
            "use a kernel of Debian: apt-get download "
            '$(apt-cache depends linux-image-amd64 | sed -n "s/.*Depends: //p"), '
            "then give the .deb file with --kernel FILE; or name a folder that holds "
            "boot/vmlinuz-VERSION and lib/modules/VERSION with --modules-dir DIR"
        )
    raise ImagerError(
        f"kernel {wanted} can't be used for a rescue medium: "
        f"{_what_is_missing(root, wanted)} is missing",
        hint=hint,
    )


def _kernel_below(folder: Path, version: str | None, where: str) -> Kernel:
    """The kernel in a folder that is laid out like a root."""
    versions = [version] if version else _versions(folder)
    if not versions:
        raise ImagerError(
            f"{where} holds no kernel modules (lib/modules/VERSION)",
            hint="apt-get download linux-image-amd64 gives only a name for the real package: "
            "download the one that it depends on, like linux-image-6.1.0-28-amd64",
        )
    found = [kernel for each in versions if (kernel := _kernel(folder, each)) is not None]
    if len(found) > 1:
        names = ", ".join(kernel.version for kernel in found)
        raise ImagerError(
            f"{where} holds several kernels: {names}", hint="choose one with --kernel VERSION"
        )
    if not found:
        raise ImagerError(f"{where}: {_what_is_missing(folder, versions[0])} is missing")
    return found[0]


def _kernel(root: Path, version: str) -> Kernel | None:
    modules = next((path for path in _module_folders(root, version) if _is_usable(path)), None)
    image = next((path for path in _images(root, version) if path.is_file()), None)
    if modules is None or image is None:
        return None
    try:
        return Kernel(version, image, modules, is_signed(image))
    except OSError as error:
        raise ImagerError(
            f"{image}: {error.strerror}", hint="run as root: kernels are for root only here"
        ) from None


def _what_is_missing(root: Path, version: str) -> str:
    if not any(map(_is_usable, _module_folders(root, version))):
        return f"{root / 'lib/modules' / version}"
    return f"{root / 'boot' / f'vmlinuz-{version}'}"


def _module_folders(root: Path, version: str) -> Iterator[Path]:
    yield root / "lib/modules" / version
    yield root / "usr/lib/modules" / version


def _images(root: Path, version: str) -> Iterator[Path]:
    """Debian, SUSE and others; then Fedora and Arch."""
    yield root / "boot" / f"vmlinuz-{version}"
    for folder in _module_folders(root, version):
        yield folder / "vmlinuz"


def _is_usable(modules: Path) -> bool:
    """A folder may stay behind, with built leftovers only, when a kernel is removed."""
    return (modules / "kernel").is_dir()


def _versions(root: Path) -> list[str]:
    found = {
        folder.name
        for parent in (root / "lib/modules", root / "usr/lib/modules")
        if parent.is_dir()
        for folder in parent.iterdir()
        if _is_usable(folder)
    }
    return sorted(found)


def _unpack(package: Path, scratch: Path) -> Path:
    """The files of a Debian package. Nothing of it is run."""
    if not package.is_file():
        raise ImagerError(f"there is no kernel package {package}")
    folder = scratch / "kernel"
    folder.mkdir(parents=True, exist_ok=True)
    process.run(["dpkg-deb", "-x", str(package), str(folder)])
    return folder
