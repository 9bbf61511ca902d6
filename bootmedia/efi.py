"""The EFI system partition of a medium: signed loaders where they are installed, else our own.

With Secure Boot the firmware starts shim, which Microsoft signed; shim starts Debian's GRUB, and
that a kernel which Debian signed. Each checks the signature of the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bootmedia.fat import fat_image
from bootmedia.grub import CONFIG_PATH, GRUB_FOLDER, early_config, efi_image

SHIM_FOLDER = Path("/usr/lib/shim")

FALLBACK = "EFI/BOOT/BOOTX64.EFI"
"""What the firmware starts from a medium that it has no entry for (UEFI specification, 3.5.1.1)."""
_FALLBACK_FOLDER = "EFI/BOOT"
# The names by which shim starts the next one.
_GRUB_NAME = "grubx64.efi"
_MOK_MANAGER_NAME = "mmx64.efi"
_LABEL = "IMAGER"


@dataclass(frozen=True)
class SecureBootState:
    """Whether a medium boots with Secure Boot on; if not, each reason, and the packages (of
    Debian) that would help."""

    reasons: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    @property
    def boots(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        if self.boots:
            return "boots under Secure Boot"
        text = f"will not boot under Secure Boot: {'; '.join(self.reasons)}"
        return f"{text} (install {' '.join(self.packages)})" if self.packages else text


@dataclass(frozen=True)
class SignedLoaders:
    """Where the signed loaders lie; None for one that is not installed.

    ``grub_disc`` looks for its configuration on the medium it came from, ``grub_net`` on the TFTP
    server.
    """

    shim: Path | None
    grub_disc: Path | None
    grub_net: Path | None
    mok_manager: Path | None

    def secure_boot(self, *, kernel_signed: bool) -> SecureBootState:
        """What becomes of a medium with these and such a kernel."""
        reasons, packages = [], []
        if self.shim is None:
            reasons.append("shim, signed by Microsoft, is not installed")
            packages.append("shim-signed")
        if self.grub_disc is None or self.grub_net is None:
            reasons.append("GRUB, signed by Debian, is not installed")
            packages.append("grub-efi-amd64-signed")
        if not kernel_signed:
            reasons.append("the kernel is not signed")
            packages.append("linux-image-amd64")
        return SecureBootState(tuple(reasons), tuple(packages))

    def for_network(self) -> dict[str, Path]:
        """The loaders to serve by TFTP, by file name; empty when one is missing."""
        if self.shim is None or self.grub_net is None:
            return {}
        found = {"shimx64.efi": self.shim, _GRUB_NAME: self.grub_net}
        return found | ({_MOK_MANAGER_NAME: self.mok_manager} if self.mok_manager else {})


def find_signed_loaders(*, shim: Path = SHIM_FOLDER, grub: Path = GRUB_FOLDER) -> SignedLoaders:
    """Look where Debian's packages put them."""
    signed = grub / "x86_64-efi-signed"
    return SignedLoaders(
        shim=_first(shim / "shimx64.efi.signed"),
        grub_disc=_first(signed / "gcdx64.efi.signed"),
        grub_net=_first(signed / "grubnetx64.efi.signed"),
        mok_manager=_first(shim / "mmx64.efi.signed", shim / "mmx64.efi"),
    )


def esp_image(loaders: SignedLoaders, medium_id: str, created: int) -> bytes:
    """The EFI system partition of the medium, a FAT filesystem.

    Raises ToolError when there is neither a signed GRUB nor the parts of an own one.
    """
    return fat_image(
        _esp_files(loaders, medium_id),
        serial=int(medium_id[:8], 16),
        label=_LABEL,
        created=created,
    )


def _esp_files(loaders: SignedLoaders, medium_id: str) -> dict[str, bytes]:
    if loaders.shim is None or loaders.grub_disc is None:
        return {FALLBACK: efi_image(medium_id)}
    files = {
        FALLBACK: loaders.shim.read_bytes(),
        f"{_FALLBACK_FOLDER}/{_GRUB_NAME}": loaders.grub_disc.read_bytes(),
        CONFIG_PATH: early_config(medium_id).encode(),
    }
    if loaders.mok_manager is not None:
        files[f"{_FALLBACK_FOLDER}/{_MOK_MANAGER_NAME}"] = loaders.mok_manager.read_bytes()
    return files


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)
