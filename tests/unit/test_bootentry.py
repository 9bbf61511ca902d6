"""UEFI boot entries: real bytes, and a folder that stands for efivarfs."""

from __future__ import annotations

import contextlib
import struct
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootmedia.guest.bootentry import HardDrive, LoadOption, Variables, put_first
from imager.errors import FormatError, ImagerError
from imager.partitions import Partition

GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
GUID = "5c1de1a7-3c4b-4d44-8e42-0d3c5a0d9e01"
ESP = Partition(2, 2 << 20, 100 << 20, "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", uuid=GUID)

# By the tables of UEFI 2.10, 3.1.3 and 10.3.5.1, as efibootmgr 17 writes such an entry.
DEBIAN = bytes.fromhex(
    "01000000"  # active
    "6200"  # bytes of the device path
    "640065006200690061006e000000"  # debian
    "04012a000200000000100000000000000020030000000000"
    "a7e11d5c4b3c444d8e420d3c5a0d9e010202"
    "040434005c004500460049005c00640065006200690061006e005c00"
    "7300680069006d007800360034002e006500660069000000"
    "7fff0400"
)
# OVMF's own entry for its shell: a firmware volume and a file in it, no hard drive.
OVMF_MENU = bytes.fromhex(
    "090100002c00"
    "5500690041007000700000"
    "00"
    "04071400c9bdb87cebf8344faaea3ee4af6516a1"
    "0406140021aa2c4614760345836e8ab6f4662331"
    "7fff0400"
)


def option() -> LoadOption:
    return LoadOption("debian", HardDrive.of(ESP, 512, is_gpt=True), "\\EFI\\debian\\shimx64.efi")


def test_encoded_as_the_specification_says() -> None:
    assert option().encode() == DEBIAN
    assert LoadOption.decode(DEBIAN) == option()


def test_entries_of_other_kinds_are_read() -> None:
    found = LoadOption.decode(OVMF_MENU)
    assert (found.description, found.drive, found.path) == ("UiApp", None, None)
    assert found.attributes == 0x109
    assert not found.boots_the_same(found)


def test_mbr_signature() -> None:
    part = Partition(1, 1 << 20, 1 << 20, "0xef", uuid="deadbeef-01")
    drive = HardDrive.of(part, 512, is_gpt=False)
    assert drive.signature == struct.pack("<I12x", 0xDEADBEEF)
    with pytest.raises(FormatError):
        HardDrive.of(Partition(1, 0, 512, "0xef"), 512, is_gpt=False)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_an_error_or_an_entry(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        LoadOption.decode(raw)
    cut = DEBIAN[: len(raw) % len(DEBIAN)]
    with pytest.raises(FormatError):
        LoadOption.decode(cut)


def firmware(folder: Path) -> Variables:
    attributes = struct.pack("<I", 7)
    (folder / f"Boot0000-{GLOBAL}").write_bytes(attributes + OVMF_MENU)
    (folder / f"BootOrder-{GLOBAL}").write_bytes(attributes + struct.pack("<H", 0))
    return Variables(folder)


def test_a_new_entry_comes_first(tmp_path: Path) -> None:
    variables = firmware(tmp_path)
    assert put_first(option(), variables) == (1, True)
    assert (tmp_path / f"Boot0001-{GLOBAL}").read_bytes() == struct.pack("<I", 7) + DEBIAN
    assert variables.boot_order() == [1, 0]


def test_the_same_entry_is_used_again(tmp_path: Path) -> None:
    variables = firmware(tmp_path)
    put_first(option(), variables)
    variables.write_boot_order([0, 1])
    other = LoadOption("Debian 12", option().drive, "\\EFI\\DEBIAN\\SHIMX64.EFI")
    assert put_first(other, variables) == (1, False)
    assert variables.boot_order() == [1, 0]
    assert len(variables.boot_entries()) == 2


def test_another_partition_is_another_entry(tmp_path: Path) -> None:
    variables = firmware(tmp_path)
    put_first(option(), variables)
    other = Partition(2, 2 << 20, 100 << 20, ESP.type, uuid=str(uuid.uuid4()))
    drive = HardDrive.of(other, 512, is_gpt=True)
    assert put_first(LoadOption("x", drive, option().path), variables) == (2, True)


def test_without_firmware_variables_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ImagerError, match="no UEFI variables"):
        put_first(option(), Variables(tmp_path / "none"))
