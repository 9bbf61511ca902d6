"""The modules layer of the rescue system: which drivers it has, and the firmware they name.

The index files of the layer are written from what the chosen modules say about themselves
(``modinfo.py``), in depmod's text formats: no depmod is needed, neither here nor there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bootmedia.cpio import File, Tree
from bootmedia.kernel import Kernel
from bootmedia.modinfo import ModuleInfo, read_modinfo, uncompressed
from bootmedia.moduleindex import ModuleIndex, module_name
from imager.errors import ImagerError
from imager.fingerprint import Device, Fingerprint

Selection = Literal["all", "host"]

# What every rescue medium has: the way from any USB port or CD drive to its own files, the
# keyboard, the filesystems that are restored and those of media, volumes, name tables that the
# kernel asks for by name when FAT or ISO 9660 is mounted.
_BASE = """
    ehci_pci ohci_pci uhci_hcd xhci_pci xhci_pci_renesas usb_storage uas usbhid hid_generic evdev
    ahci ata_piix ata_generic sd_mod sr_mod cdrom loop
    ext4 xfs btrfs f2fs vfat exfat isofs udf squashfs overlay fuse efivarfs
    nls_ascii nls_utf8 nls_cp437 nls_cp850 nls_iso8859_1 nls_iso8859_15
    dm_mod md_mod
    crc32c_generic crc32c_intel
"""

# What `all` has besides, wherever a kernel has it: whole folders below kernel/.
_FOLDERS = (
    "drivers/ata",
    "drivers/block",
    "drivers/cdrom",
    "drivers/hv",
    "drivers/md",
    "drivers/message/fusion",
    "drivers/mmc",
    "drivers/net/bonding",
    "drivers/net/ethernet",
    "drivers/net/hyperv",
    "drivers/net/mdio",
    "drivers/net/phy",
    "drivers/net/usb",
    "drivers/net/vmxnet3",
    "drivers/nvdimm",
    "drivers/nvme/host",
    "drivers/pci/controller",
    "drivers/scsi",
    "drivers/ufs",
    "drivers/usb/host",
    "drivers/usb/storage",
    "drivers/virtio",
    "net/8021q",
)

# Parts of these that are no use in a rescue: switches, cards of other buses, servers' sides of
# protocols, drivers for tests.
_LEFT_OUT = (
    "drivers/block/drbd",
    "drivers/block/null_blk",
    "drivers/block/rbd",
    "drivers/block/xen-blkback",
    "drivers/block/zram",
    "drivers/md/dm-flakey",
    "drivers/md/dm-log-writes",
    "drivers/md/faulty",
    "drivers/md/md-cluster",
    "drivers/net/ethernet/marvell/prestera",
    "drivers/net/ethernet/mellanox/mlxsw",
    "drivers/net/ethernet/netronome",
    "drivers/scsi/device_handler",
    "drivers/scsi/pcmcia",
    "drivers/scsi/scsi_debug",
    "drivers/scsi/st",
    "drivers/usb/host/sl811_cs",
    "drivers/virtio/virtio_balloon",
    "drivers/virtio/virtio_mem",
)

# And single modules: drivers that lie among others, disks of virtual machines, the ciphers of
# LUKS with what makes them fast.
_SINGLE = """
    virtio_net net_failover xen_netfront xen_blkfront xen_scsifront mii dummy
    virtio_rng virtio_console hid_hyperv hyperv_keyboard hid_apple hid_logitech_dj vmd pci_hyperv
    nbd iscsi_ibft reiserfs jfs
    xts cbc ecb aesni_intel sha256_ssse3 sha512_ssse3 sha256_generic sha512_generic algif_skcipher
    algif_hash essiv serpent_generic twofish_generic
    crc32_pclmul crct10dif_pclmul crct10dif_generic xxhash_generic blake2b_generic
    crc64_rocksoft_generic
"""

_PHY_LIBRARY = "libphy"
_PHY_FOLDER = "drivers/net/phy"

_FIRMWARE = Path("lib/firmware")
_COMPRESSED = ("", ".xz", ".zst", ".gz")
# More than all wired network cards and storage controllers of a Debian need; what machines other
# than this one may want must not make the medium one that only large memories can boot.
_MAX_FIRMWARE_SIZE = 24 << 20

# Buses on which a driver is found by the device's own number.
_BUSES = frozenset({"pci", "virtio", "vmbus", "xen", "usb"})


@dataclass(frozen=True)
class ModulesLayer:
    """``names`` of the modules, ``firmware`` files below /lib/firmware, and what lacks.

    ``missing_for_host``: devices of the fingerprint that work now and would not in the rescue
    system; ``warnings`` says so in sentences. ``missing_firmware`` are names of files that
    modules mention and this machine does not have.
    """

    tree: Tree
    names: tuple[str, ...]
    firmware: tuple[str, ...]
    warnings: tuple[str, ...]
    missing_for_host: tuple[str, ...]
    missing_firmware: tuple[str, ...]


def modules_layer(
    kernel: Kernel,
    selection: Selection,
    fingerprint: Fingerprint,
    *,
    scratch: Path,
    root: Path = Path("/"),
) -> ModulesLayer:
    """Modules, firmware and index for a rescue system.

    ``all`` has every driver for disks, wired networks and USB; ``host`` those of the machine of
    the fingerprint, and what it takes to boot the medium from any CD or USB port. Compressed
    modules are unpacked into ``scratch``, where they must stay until the layer is written:
    compressed again as a whole they take less, and the kernel loads them without help.
    """
    catalogue = Catalogue(kernel, scratch / "modules")
    host = _host_modules(catalogue, fingerprint)
    wanted = [*_BASE.split(), *host.names]
    if selection == "all":
        wanted += [*catalogue.below(_FOLDERS, _LEFT_OUT), *_SINGLE.split()]
    chosen = catalogue.closure(wanted)
    if _PHY_LIBRARY in chosen:
        # A network card's driver asks for its PHY's when it starts.
        chosen = catalogue.closure([*chosen, *catalogue.below((_PHY_FOLDER,), ())])
    for_host = catalogue.closure(host.names)
    tree = Tree()
    _add_modules(tree, catalogue, chosen)
    firmware = _add_firmware(tree, chosen, set(for_host), root, scratch / "firmware")
    return ModulesLayer(
        tree=tree,
        names=tuple(sorted(chosen)),
        firmware=tuple(sorted(firmware.found)),
        warnings=tuple(_warnings(kernel, host, firmware)),
        missing_for_host=tuple(host.missing),
        missing_firmware=tuple(sorted(firmware.missing)),
    )


class Catalogue:
    """The modules of a kernel and what each says about itself, read when it is asked for."""

    def __init__(self, kernel: Kernel, scratch: Path) -> None:
        self.kernel = kernel
        self._scratch = scratch
        self._infos: dict[str, ModuleInfo] = {}
        self._files: dict[str, Path] = {}
        self.index = ModuleIndex.read(kernel.modules)
        if not self.index.paths:
            self.index = self._index_of_files()
        if not self.index.paths:
            raise ImagerError(f"{kernel.modules} holds no modules")

    def info(self, name: str) -> ModuleInfo:
        if name not in self._infos:
            path = self.kernel.modules / self.index.paths[name]
            # Modules may share a file name in different folders only by a packaging error.
            plain = uncompressed(path, self._scratch)
            self._infos[name], self._files[name] = read_modinfo(plain), plain
        return self._infos[name]

    def file(self, name: str) -> Path:
        """The module, uncompressed."""
        self.info(name)
        return self._files[name]

    def below(self, folders: Iterable[str], left_out: Iterable[str]) -> Iterator[str]:
        """Names of all modules below these folders of ``kernel/``."""
        inside = tuple(f"kernel/{folder}/" for folder in folders)
        outside = tuple(f"kernel/{path}{end}" for path in left_out for end in ("/", ".ko"))
        for name, path in self.index.paths.items():
            text = str(path)
            if text.startswith(inside) and not text.startswith(outside):
                yield name

    def closure(self, names: Iterable[str]) -> dict[str, ModuleInfo]:
        """These modules, by name or alias, and all that they need, softly too.

        What this kernel does not have is left out: kernels differ in what they build in.
        """
        chosen: dict[str, ModuleInfo] = {}
        waiting = deque(names)
        while waiting:
            for name in self.index.resolve(waiting.popleft()):
                if name in self.index and name not in chosen:
                    chosen[name] = info = self.info(name)
                    waiting += info.depends
                    waiting += (word for line in info.softdeps for word in _softdep_words(line))
        return dict(sorted(chosen.items()))

    def _index_of_files(self) -> ModuleIndex:
        """For a kernel that was unpacked only, where no depmod ran yet."""
        folder = self.kernel.modules
        texts = {
            name: (folder / name).read_text(errors="replace")
            for name in ("modules.builtin", "modules.builtin.modinfo")
            if (folder / name).is_file()
        }
        files = sorted(path for path in folder.rglob("*.ko*") if path.is_file())
        self.index = ModuleIndex(
            {"modules.dep": "".join(f"{path.relative_to(folder)}:\n" for path in files)}
        )
        infos = [self.info(name) for name in self.index.paths]
        return ModuleIndex(
            texts
            | {
                "modules.dep": _dependency_text(self.index, {info.name: info for info in infos}),
                "modules.alias": _alias_text(infos),
            }
        )


def _softdep_words(line: str) -> Iterator[str]:
    return (word for word in line.split() if word not in ("pre:", "post:"))


# --- the machine's own hardware ------------------------------------------------------------------


@dataclass
class _HostModules:
    names: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def _host_modules(catalogue: Catalogue, fingerprint: Fingerprint) -> _HostModules:
    found = _HostModules()
    cards = [device for card in fingerprint.network for device in card.devices]
    for device in dict.fromkeys([*fingerprint.storage, *cards]):
        names = _drivers(catalogue.index, device)
        found.names += names
        if not names and device.driver is not None and device.bus in _BUSES:
            found.missing.append(_device_text(device))
    return found


def _drivers(index: ModuleIndex, device: Device) -> list[str]:
    """Modules for a device, those built in too: by its alias, else by its driver's name."""
    names = index.modules_for(device.modalias) if device.modalias else []
    if device.driver is not None and (device.driver in index or index.is_builtin(device.driver)):
        names.append(module_name(device.driver))
    # The driver of USB devices as such is a part of usbcore
    return names or (["usbcore"] if device.driver in ("usb", "hub") else [])


def _device_text(device: Device) -> str:
    ids = ":".join(number for number in (device.vendor, device.device) if number)
    place = " ".join(word for word in (device.bus, device.address, ids) if word)
    return f"{place} (driver {device.driver})"


# --- what goes into the layer --------------------------------------------------------------------


def _add_modules(tree: Tree, catalogue: Catalogue, chosen: dict[str, ModuleInfo]) -> None:
    folder = Path("lib/modules") / catalogue.kernel.version
    index = catalogue.index
    for name in chosen:
        path = _plain_path(index.paths[name])
        tree.add(File(str(folder / path), 0o644, catalogue.file(name)))
    builtin = catalogue.kernel.modules / "modules.builtin"
    texts = {
        "modules.dep": _dependency_text(index, chosen),
        "modules.alias": _alias_text(chosen.values()),
        "modules.softdep": "".join(
            f"softdep {name} {line}\n" for name, info in chosen.items() for line in info.softdeps
        ),
        "modules.builtin": builtin.read_text() if builtin.is_file() else "",
        "modules.builtin.alias": "".join(
            f"alias {pattern} {name}\n" for pattern, name in index.builtin_aliases
        ),
    }
    for file_name, text in texts.items():
        tree.add(File(str(folder / file_name), 0o644, text.encode()))


def _dependency_text(index: ModuleIndex, infos: dict[str, ModuleInfo]) -> str:
    """A ``modules.dep``: all that a module needs, what must be loaded first last."""
    lines = []
    for name in infos:
        needs = _dependencies(name, infos)
        paths = (str(_plain_path(index.paths[other])) for other in reversed(needs))
        lines.append(f"{_plain_path(index.paths[name])}: {' '.join(paths)}".rstrip() + "\n")
    return "".join(lines)


def _dependencies(name: str, infos: dict[str, ModuleInfo]) -> list[str]:
    """All that a module needs, in the order of loading."""
    done: dict[str, None] = {}
    entered = {name}
    stack = [(name, False)]
    while stack:
        current, needs_are_done = stack.pop()
        if needs_are_done:
            done[current] = None
            continue
        stack.append((current, True))
        for other in infos[current].depends:
            if other in infos and other not in entered:
                entered.add(other)
                stack.append((other, False))
    del done[name]
    return list(done)


def _alias_text(infos: Iterable[ModuleInfo]) -> str:
    return "".join(f"alias {alias} {info.name}\n" for info in infos for alias in info.aliases)


def _plain_path(path: Path) -> Path:
    return path if path.suffix == ".ko" else path.with_suffix("")


# --- firmware ------------------------------------------------------------------------------------


@dataclass
class _Firmware:
    found: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    missing_for_host: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)


def _add_firmware(
    tree: Tree, chosen: dict[str, ModuleInfo], host: set[str], root: Path, scratch: Path
) -> _Firmware:
    """The host's own first, then what others may need as long as there is room."""
    result = _Firmware()
    size = 0
    seen: set[str] = set()
    for name in sorted(chosen, key=lambda name: (name not in host, name)):
        for wanted in chosen[name].firmware:
            if wanted in seen:
                continue
            seen.add(wanted)
            file = _firmware_file(root, wanted)
            if file is None:
                result.missing.add(wanted)
                if name in host:
                    result.missing_for_host.add(wanted)
                continue
            plain = uncompressed(file, (scratch / wanted).parent)
            length = plain.stat().st_size
            if size + length > _MAX_FIRMWARE_SIZE and name not in host:
                result.left_out.append(wanted)
                continue
            size += length
            tree.add(File(str(_FIRMWARE / wanted), 0o644, plain))
            result.found.append(wanted)
    return result


def _firmware_file(root: Path, name: str) -> Path | None:
    """Where the kernel would take it from (Linux Documentation/driver-api/firmware)."""
    if name.startswith("/") or ".." in name.split("/"):
        return None
    for folder in (_FIRMWARE / "updates", _FIRMWARE):
        for suffix in _COMPRESSED:
            path = root / folder / (name + suffix)
            if path.is_file():
                return path
    return None


def _warnings(kernel: Kernel, host: _HostModules, firmware: _Firmware) -> Iterator[str]:
    for device in host.missing:
        yield f"kernel {kernel.version} has no driver for this machine's {device}"
    if firmware.missing_for_host:
        yield (
            "firmware that drivers of this machine's own hardware may ask for is not installed: "
            + ", ".join(sorted(firmware.missing_for_host))
        )
    others = len(firmware.missing - firmware.missing_for_host)
    if others:
        yield f"{others} firmware files for other hardware are not installed here"
    if firmware.left_out:
        yield (
            f"{len(firmware.left_out)} firmware files for other hardware were left out: "
            f"more than {_MAX_FIRMWARE_SIZE >> 20} MiB"
        )
