"""Kernel, module index and modules layer, on Debian's real kernel package."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
import zstandard

from bootmedia.cpio import File, Tree
from bootmedia.kernel import Kernel, find_kernel, is_signed
from bootmedia.modinfo import read_modinfo, uncompressed
from bootmedia.moduleindex import INDEX_FILES, ModuleIndex
from bootmedia.modules import ModulesLayer, modules_layer
from imager.errors import FormatError, ImagerError, UsageError
from imager.fingerprint import Device, Fingerprint, NetworkCard
from tests.machines.guest import debian_kernel

E1000 = "pci:v00008086d0000100Esv00001AF4sd00001100bc02sc00i00"
AHCI = "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01"
RTL8168 = "pci:v000010ECd00008168sv00001458sd0000E000bc02sc00i00"

MACHINE = Fingerprint(
    storage=(Device("pci", "0000:00:1f.2", "0x8086", "0x2922", "ahci", AHCI),),
    network=(
        NetworkCard("eth0", None, (Device("pci", "0000:03:00.0", None, None, "r8169", RTL8168),)),
    ),
)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return find_kernel(modules_dir=debian_kernel(), scratch=tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def index(kernel: Kernel) -> ModuleIndex:
    return ModuleIndex.read(kernel.modules)


def written(tree: Tree, folder: Path, version: str) -> ModuleIndex:
    """The index that the rescue system will find."""
    for name in INDEX_FILES:
        entry = tree.get(f"lib/modules/{version}/{name}")
        if isinstance(entry, File):
            assert isinstance(entry.content, bytes)
            (folder / name).write_bytes(entry.content)
    return ModuleIndex.read(folder)


# --- the index ----------------------------------------------------------------------------------


def test_modules_of_devices(index: ModuleIndex) -> None:
    assert index.modules_for(E1000) == ["e1000"]
    assert index.modules_for(AHCI) == ["ahci"]
    assert index.modules_for("fs-vfat") == ["vfat"]
    assert index.modules_for("virtio:d00000002v00001AF4") == ["virtio_blk"]
    assert index.modules_for("pci:v0000FFFFd0000FFFFsv0sd0bc00sc00i00") == []


@pytest.mark.parametrize("name", ["ahci", "nvme", "btrfs", "usb-storage", "virtio_net"])
def test_dependencies_come_first(index: ModuleIndex, name: str) -> None:
    order = index.load_order(name)
    assert order[-1] == index.paths[name.replace("-", "_")]
    done: set[Path] = set()
    for path in order:
        needs = {index.paths[other] for other in index.dependencies[path.stem.replace("-", "_")]}
        assert needs <= done, f"{path} before {needs - done}"
        done.add(path)


def test_soft_dependencies_and_cycles() -> None:
    index = ModuleIndex(
        {
            "modules.dep": "a.ko: b.ko\nb.ko: a.ko\nc-1.ko:\nd.ko:\n/etc/evil.ko:\n../x.ko:\n",
            "modules.alias": "alias later:* d\nnonsense\n",
            "modules.softdep": "softdep a pre: c-1 post: later:x\n",
            "modules.builtin": "kernel/fs/e-x.ko\n",
            "modules.builtin.modinfo": "e_x.alias=fs-e\0e_x.license=GPL\0",
        }
    )
    assert [str(path) for path in index.load_order("a")] == ["c-1.ko", "b.ko", "a.ko", "d.ko"]
    assert sorted(index) == ["a", "b", "c_1", "d"]
    assert index.is_builtin("e-x") and index.modules_for("fs-e") == ["e_x"]
    assert index.load_order("e-x") == index.load_order("nothing") == []


# --- modules and kernels ------------------------------------------------------------------------


def test_compressed_modules_say_the_same(
    kernel: Kernel, index: ModuleIndex, tmp_path: Path
) -> None:
    plain = kernel.modules / index.paths["r8169"]
    content = plain.read_bytes()
    packed = {
        ".gz": gzip.compress(content),
        ".xz": lzma.compress(content),
        ".zst": zstandard.compress(content),
    }
    expected = read_modinfo(plain)
    assert "rtl_nic/rtl8168h-2.fw" in expected.firmware and "libphy" in expected.depends
    for suffix, raw in packed.items():
        file = tmp_path / f"r8169.ko{suffix}"
        file.write_bytes(raw)
        assert read_modinfo(uncompressed(file, tmp_path / suffix)) == expected
        file.write_bytes(raw[: len(raw) // 2])
        with pytest.raises(FormatError):
            read_modinfo(uncompressed(file, tmp_path / suffix))


def test_damaged_modules_are_refused(kernel: Kernel, index: ModuleIndex, tmp_path: Path) -> None:
    content = (kernel.modules / index.paths["crc16"]).read_bytes()
    file = tmp_path / "crc16.ko"
    for length in (0, 4, 15, 63, 64, 1000, len(content) // 2):
        file.write_bytes(content[:length])
        with pytest.raises(FormatError, match="not a kernel module"):
            read_modinfo(file)
    for at in range(0x20, 0x40):  # counts and offsets of the header
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        file.write_bytes(damaged)
        try:
            read_modinfo(file)
        except FormatError:
            continue


def test_signatures(kernel: Kernel, tmp_path: Path) -> None:
    assert kernel.signed
    file = tmp_path / "vmlinuz"
    for content in (b"", b"MZ", bytes(4096), kernel.image.read_bytes()[:200]):
        file.write_bytes(content)
        assert not is_signed(file)


def test_kernels_that_lack_something_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ImagerError, match="can't be used") as raised:
        find_kernel(scratch=tmp_path, root=tmp_path)
    assert raised.value.hint is not None and "apt-get download" in raised.value.hint
    with pytest.raises(ImagerError, match="no kernel modules"):
        find_kernel(modules_dir=tmp_path, scratch=tmp_path)
    for version in ("1.0", "2.0"):
        (tmp_path / "lib/modules" / version / "kernel").mkdir(parents=True)
    with pytest.raises(ImagerError, match=r"vmlinuz-2\.0 is missing"):
        find_kernel("2.0", tmp_path, scratch=tmp_path)
    (tmp_path / "boot").mkdir()
    for version in ("1.0", "2.0"):
        (tmp_path / f"boot/vmlinuz-{version}").touch()
    with pytest.raises(ImagerError, match=r"several kernels: 1\.0, 2\.0"):
        find_kernel(modules_dir=tmp_path, scratch=tmp_path)
    assert find_kernel("2.0", tmp_path, scratch=tmp_path).version == "2.0"
    assert find_kernel("1.0", scratch=tmp_path, root=tmp_path).version == "1.0"
    with pytest.raises(UsageError):
        find_kernel("../x", scratch=tmp_path)


def test_a_debian_package(tmp_path: Path) -> None:
    """A small one of the same layout, without an index: no depmod ran."""
    real = debian_kernel()
    (modules,) = (real / "lib/modules").iterdir()
    files = tmp_path / "files"
    for name in ("fs/ext4/ext4", "fs/jbd2/jbd2", "fs/mbcache", "lib/crc16"):
        target = files / "lib/modules" / modules.name / f"kernel/{name}.ko"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(modules / f"kernel/{name}.ko", target)
    (files / "boot").mkdir()
    shutil.copy(next(real.glob("boot/vmlinuz-*")), files / "boot")
    (files / "DEBIAN").mkdir()
    (files / "DEBIAN/control").write_text(
        "Package: linux-image-test\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y.z>\n"
        "Description: test\n"
    )
    package = tmp_path / "kernel.deb"
    subprocess.run(["dpkg-deb", "-Znone", "-b", str(files), str(package)], check=True)
    kernel = find_kernel(package=package, scratch=tmp_path / "work")
    layer = modules_layer(kernel, "all", Fingerprint(), scratch=tmp_path / "work", root=tmp_path)
    assert layer.names == ("crc16", "ext4", "jbd2", "mbcache")
    (tmp_path / "index").mkdir()
    index = written(layer.tree, tmp_path / "index", kernel.version)
    assert [path.name for path in index.load_order("ext4")][-1] == "ext4.ko"
    assert len(index.load_order("ext4")) == 4
    assert index.modules_for("fs-ext4") == ["ext4"]


# --- the layer ----------------------------------------------------------------------------------


def layer_of(kernel: Kernel, selection: str, machine: Fingerprint, tmp_path: Path) -> ModulesLayer:
    assert selection in ("all", "host")
    return modules_layer(
        kernel,
        "all" if selection == "all" else "host",
        machine,
        scratch=tmp_path / "scratch",
        root=tmp_path,
    )


def test_drivers_of_the_host(kernel: Kernel, tmp_path: Path) -> None:
    layer = layer_of(kernel, "host", MACHINE, tmp_path)
    wanted = {"ahci", "r8169", "realtek", "usb_storage", "uas", "xhci_pci", "ext4", "isofs"}
    assert wanted <= set(layer.names)
    assert not {"megaraid_sas", "virtio_blk", "e1000"} & set(layer.names)
    assert layer.missing_for_host == ()
    assert any("rtl_nic/rtl8168h-2.fw" in warning for warning in layer.warnings)


@pytest.mark.parametrize("selection", ["all", "host"])
def test_the_written_index_is_the_kernels(
    kernel: Kernel, index: ModuleIndex, tmp_path: Path, selection: str
) -> None:
    layer = layer_of(kernel, selection, MACHINE, tmp_path)
    (tmp_path / "index").mkdir()
    found = written(layer.tree, tmp_path / "index", kernel.version)
    assert set(found) == set(layer.names)
    print(f"{selection}: {len(layer.names)} modules")
    for name in found:
        assert set(found.dependencies[name]) == set(index.dependencies[name])
        assert len(found.load_order(name)) >= len(index.load_order(name))
    assert found.modules_for(AHCI) == ["ahci"]
    assert found.builtin == index.builtin


def test_drivers_for_any_machine(kernel: Kernel, tmp_path: Path) -> None:
    names = set(layer_of(kernel, "all", Fingerprint(), tmp_path).names)
    wanted = "nvme megaraid_sas mpt3sas virtio_blk virtio_scsi vmw_pvscsi hv_storvsc xen_blkfront"
    wanted += " e1000e igb ixgbe tg3 bnx2x mlx5_core vmxnet3 hv_netvsc virtio_net r8169 vmd"
    wanted += " dm_crypt dm_thin_pool raid1 raid456 nbd loop squashfs overlay udf efivarfs"
    assert set(wanted.split()) - names == set()
    assert not {name for name in names if "iwl" in name or "ath1" in name}


def test_a_device_without_a_driver_is_told(kernel: Kernel, tmp_path: Path) -> None:
    alias = "pci:v0000ABCDd00001234sv0sd0bc01sc04i00"
    machine = Fingerprint(storage=(Device("pci", "0000:01:00.0", "0xabcd", "0x1234", "x", alias),))
    layer = layer_of(kernel, "host", machine, tmp_path)
    assert layer.missing_for_host == ("pci 0000:01:00.0 0xabcd:0x1234 (driver x)",)
    assert any("0xabcd:0x1234" in warning for warning in layer.warnings)


def test_firmware_is_taken_where_it_exists(kernel: Kernel, tmp_path: Path) -> None:
    folder = tmp_path / "lib/firmware/rtl_nic"
    folder.mkdir(parents=True)
    (folder / "rtl8168h-2.fw").write_bytes(b"plain")
    (folder / "rtl8168g-3.fw.xz").write_bytes(lzma.compress(b"packed"))
    layer = layer_of(kernel, "host", MACHINE, tmp_path)
    assert layer.firmware == ("rtl_nic/rtl8168g-3.fw", "rtl_nic/rtl8168h-2.fw")
    entry = layer.tree.get("lib/firmware/rtl_nic/rtl8168g-3.fw")
    assert isinstance(entry, File) and isinstance(entry.content, Path)
    assert entry.content.read_bytes() == b"packed"
    assert "rtl_nic/rtl8168e-3.fw" in layer.missing_firmware
