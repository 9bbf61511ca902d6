"""Files of other imaging programs, told apart by how they begin, and made raw.

Sources: QEMU's docs/interop/qcow2.txt; VMware's "Virtual Disk Format 5.0"; Microsoft's [MS-VHDX]
and "Virtual Hard Disk Image Format Specification"; VirtualBox's VDICore.h; partclone's
docs/IMAGE_FORMATS.md; the magic numbers of the compressors in their own format documents.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from imager.errors import ImagerError, UnsupportedError
from imager.process import pipe, run

# How files begin, and which program unpacks them to its output.
_COMPRESSED: tuple[tuple[bytes, tuple[str, ...]], ...] = (
    (b"\x1f\x8b", ("gzip", "-dc")),
    (b"\xfd7zXZ\0", ("xz", "-dc")),
    (b"\x28\xb5\x2f\xfd", ("zstd", "-dc", "-q", "--long=31")),
    (b"BZh", ("bzip2", "-dc")),
    (b"\x04\x22\x4d\x18", ("lz4", "-dc")),
)

_DISK_IMAGES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)

_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"\0ntfsclone-image", "an image of ntfsclone"),
    (b"PaRtImAgE-VoLuMe", "an image of partimage"),
    (b"LRZI", "compressed by lrzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"PK\x03\x04", "a zip archive"),
)

PARTCLONE = "partclone"
RAW = "raw"

HEAD_BYTES = 4096


def kind_of(head: bytes, where: str) -> str:
    """``raw``, ``partclone`` or QEMU's name of a format. Raises UnsupportedError, naming it."""
    for magic, text in _REFUSED:
        if head.startswith(magic):
            raise UnsupportedError(f"{where} is {text}: not supported")
    if head.startswith(b"partclone-image"):
        return PARTCLONE
    for at, magic, kind in _DISK_IMAGES:
        if head[at : at + len(magic)] == magic:
            return kind
    return RAW


def decompressor_for(head: bytes) -> list[str] | None:
    """The command that unpacks its input, None when there is nothing to unpack."""
    for magic, command in _COMPRESSED:
        if head.startswith(magic):
            return list(command)
    return None


def read_head(path: Path) -> bytes:
    """Raises ImagerError."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise ImagerError(f"cannot read {path}: {error.strerror}") from None


def make_raw(parts: list[Path], target: Path, scratch: Path) -> str:
    """Write what the parts of one file hold, unpacked, to a sparse raw file; how it was stored.

    Raises UnsupportedError, ImagerError, ToolError.
    """
    head = read_head(parts[0])
    unpack = decompressor_for(head)
    packed = [] if unpack is None else [unpack[0]]
    if unpack is not None:
        head = _head_of(parts, unpack)
    kind = kind_of(head, str(parts[0]))
    if kind == RAW:
        _fill(parts, unpack, target)
    elif kind == PARTCLONE:
        _fill_by(parts, unpack, _partclone(target, scratch))
    else:
        whole = parts[0]
        if unpack is not None or len(parts) > 1:
            whole = scratch / "unpacked"
            _fill(parts, unpack, whole)
        _convert(whole, kind, target)
        if whole != parts[0]:
            whole.unlink()
    return ", ".join([*packed, kind])


def _head_of(parts: list[Path], unpack: list[str]) -> bytes:
    with pipe(parts, unpack) as content:
        return content.read(HEAD_BYTES)


# Holes of a raw file; shorter runs of zeros are not worth a seek.
_PIECE = 64 << 10


def _fill(parts: list[Path], unpack: list[str] | None, target: Path) -> None:
    zeros = bytes(_PIECE)
    with ExitStack() as stack:
        content = stack.enter_context(pipe(parts, unpack))
        file = stack.enter_context(target.open("wb"))
        at = 0
        while piece := content.read(_PIECE):
            if piece != zeros[: len(piece)]:
                file.seek(at)
                file.write(piece)
            at += len(piece)
        file.truncate(at)


def _fill_by(parts: list[Path], unpack: list[str] | None, command: list[str]) -> None:
    with pipe(parts, unpack, command) as said:
        said.read()


def _partclone(target: Path, scratch: Path) -> list[str]:
    """partclone checks its own checksums. partclone.restore(8)."""
    return [
        *("partclone.restore", "--source", "-", "--output", str(target)),
        *(
            "--restore_raw_file",
            "--no_check",
            "--quiet",
            "--logfile",
            str(scratch / "partclone.log"),
        ),
    ]


def _convert(path: Path, kind: str, target: Path) -> None:
    check_disk_image(path, kind)
    run(["qemu-img", "convert", "-f", kind, "-O", "raw", "-S", "4k", "--", str(path), str(target)])


def check_disk_image(path: Path, kind: str) -> None:
    """A disk image may name other files, of this machine too: only what stands beside it counts.

    Raises UnsupportedError for one with a backing file or encryption.
    """
    document = _object(json.loads(_info(path, kind)))
    for key, what in (("backing-filename", "a backing file"), ("data-file", "a data file")):
        special = _object(_object(document.get("format-specific")).get("data"))
        if document.get(key) or special.get(key):
            raise UnsupportedError(
                f"{path} has {what}: not supported",
                hint="make one file of it with: qemu-img convert",
            )
    if document.get("encrypted"):
        raise UnsupportedError(f"{path} is encrypted: not supported")
    special = _object(_object(document.get("format-specific")).get("data"))
    for extent in special.get("extents") or []:
        named = Path(str(_object(extent).get("filename", "")))
        if named.absolute().parent != path.absolute().parent:
            raise UnsupportedError(f"{path} has a part elsewhere: {named}")


def _info(path: Path, kind: str) -> bytes:
    return run(["qemu-img", "info", "-f", kind, "--output=json", "--", str(path)]).stdout


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
