"""Extended attributes: in the inode, in leaves, and large values in blocks of their own."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from imager.allocation.model import require
from imager.files.model import acl_attribute
from imager.files.xfs.inode import LOCAL, Fork, Inode, Run, Volume

_LOCAL, _ROOT, _SECURE, _PARENT, _INCOMPLETE = 0x01, 0x02, 0x04, 0x08, 0x80
_ACLS = {
    b"SGI_ACL_FILE": "system.posix_acl_access",
    b"SGI_ACL_DEFAULT": "system.posix_acl_default",
}
_NODES = {0xFEBE: 16, 0x3EBE: 64}
_LEAVES = {0xFBEE: 32, 0x3BEE: 80}
"""Magic, and where the entries begin; in new filesystems with more before."""

_MAX_LEAVES = 1 << 16
_MAX_VALUE = 64 << 10
_REMOTE_HEADER = 56


class _Attribute(NamedTuple):
    flags: int
    name: bytes
    value: bytes


def attributes(volume: Volume, inode: Inode) -> dict[str, bytes]:
    """As getxattr(2) gives them. Raises NotRecognized."""
    found = {}
    for flags, name, value in _all(volume, inode.attributes):
        if flags & (_PARENT | _INCOMPLETE):
            continue
        if flags & _ROOT and name in _ACLS:
            found[_ACLS[name]] = _acl(value)
            continue
        space = "trusted." if flags & _ROOT else "security." if flags & _SECURE else "user."
        found[space + os.fsdecode(name)] = value
    return found


def _all(volume: Volume, fork: Fork | None) -> Iterator[_Attribute]:
    if fork is None:
        return
    if fork.format == LOCAL:
        yield from _short(fork.raw)
        return
    blocks = _ForkBlocks(volume, list(volume.runs(fork)))
    if blocks.runs:
        yield from _leaves(volume, blocks)


def _short(raw: bytes) -> Iterator[_Attribute]:
    size, count = struct.unpack_from(">HB", raw)
    require(4 <= size <= len(raw), "damaged attributes")
    at = 4
    for _ in range(count):
        require(at + 3 <= size, "damaged attributes")
        name_length, value_length, flags = raw[at : at + 3]
        start = at + 3
        at = start + name_length + value_length
        require(at <= size, "damaged attributes")
        name = raw[start : start + name_length]
        yield _Attribute(flags, name, raw[start + name_length : at])


class _ForkBlocks:
    """Blocks by their place in the fork."""

    def __init__(self, volume: Volume, runs: list[Run]) -> None:
        self._volume = volume
        self.runs = runs

    def read(self, logical: int) -> bytes:
        for run in self.runs:
            if run.logical <= logical < run.logical + run.length:
                return self._volume.read(run.start + logical - run.logical)
        require(False, "attributes that point outside of their fork")
        return b""


def _leaves(volume: Volume, blocks: _ForkBlocks) -> Iterator[_Attribute]:
    """Down to the first leaf, then from each to its right neighbour."""
    at = 0
    block = blocks.read(at)
    for _ in range(8):
        (magic,) = struct.unpack_from(">H", block, 8)
        if magic not in _NODES:
            break
        _, at = struct.unpack_from(">II", block, _NODES[magic])
        block = blocks.read(at)
    for _ in range(_MAX_LEAVES):
        yield from _leaf(volume, blocks, block)
        (at,) = struct.unpack_from(">I", block)
        if at == 0:
            return
        block = blocks.read(at)
    require(False, "attributes without an end")


def _leaf(volume: Volume, blocks: _ForkBlocks, block: bytes) -> Iterator[_Attribute]:
    (magic,) = struct.unpack_from(">H", block, 8)
    require(magic in _LEAVES, "damaged attributes")
    start = _LEAVES[magic]
    (count,) = struct.unpack_from(">H", block, 56 if volume.is_new else 12)
    require(start + 8 * count <= len(block), "damaged attributes")
    for n in range(count):
        _, index, flags = struct.unpack_from(">IHB", block, start + 8 * n)
        require(index + (3 if flags & _LOCAL else 9) <= len(block), "damaged attributes")
        if flags & _LOCAL:
            length, name_length = struct.unpack_from(">HB", block, index)
            at = index + 3
            require(at + name_length + length <= len(block), "damaged attributes")
            name = block[at : at + name_length]
            yield _Attribute(flags, name, block[at + name_length :][:length])
        elif not flags & _INCOMPLETE:
            first, length, name_length = struct.unpack_from(">IIB", block, index)
            name = block[index + 9 : index + 9 + name_length]
            yield _Attribute(flags, name, _remote(volume, blocks, first, length))


def _remote(volume: Volume, blocks: _ForkBlocks, first: int, length: int) -> bytes:
    require(length <= _MAX_VALUE, "an attribute that is too long")
    value = bytearray()
    while len(value) < length:
        block = blocks.read(first)
        first += 1
        if volume.is_new:
            magic, offset, count = struct.unpack_from(">4sII", block)
            require(magic == b"XARM" and offset == len(value) and count > 0, "a damaged attribute")
            block = block[_REMOTE_HEADER : _REMOTE_HEADER + count]
        value += block
    return bytes(value[:length])


def _acl(raw: bytes) -> bytes:
    """Count, then tag, id, permissions (xfs_format.h, struct xfs_acl)."""
    require(len(raw) >= 4, "a damaged access control list")
    (count,) = struct.unpack_from(">I", raw)
    require(4 + 12 * count <= len(raw), "a damaged access control list")
    entries = []
    for at in range(4, 4 + 12 * count, 12):
        tag, id, permissions = struct.unpack_from(">IIH", raw, at)
        entries.append((tag, permissions, id))
    try:
        return acl_attribute(entries)
    except ValueError:
        require(False, "a damaged access control list")
        return b""
