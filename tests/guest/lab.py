"""Disks under device-mapper and md: made of files, taken apart again, poisoned, compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from imager.allocation import AllocationMap
from imager.blocksource import FileSource
from imager.layout import read_layouts
from imager.loopdevice import loop_device
from imager.process import run
from tests.loop.allocation_lab import poison
from tests.support.disks import mounted
from tests.support.trees import describe_tree

Tree = dict[str, object]
CHECKS = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K", "--unsupported"],
}


@contextlib.contextmanager
def attached(images: Sequence[Path]) -> Iterator[list[str]]:
    """Loop devices over all of the images."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(loop_device(str(image))) for image in images]


def read_maps(images: Sequence[Path]) -> list[AllocationMap]:
    """The maps of disks that are captured together."""
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(FileSource(image)) for image in images]
        return [layout.volumes[0].allocation for layout in read_layouts(sources)]


def poison_all(images: Sequence[Path], maps: Sequence[AllocationMap]) -> int:
    """How many bytes were overwritten."""
    return sum(poison(image, found.used) for image, found in zip(images, maps, strict=True))


def filled(device: str, kind: str, folder: Path, fill: Callable[[Path], None]) -> Tree:
    """A filesystem on the device and what is in it."""
    run([*MKFS[kind], device])
    with mounted(device, folder) as tree:
        fill(tree)
    return read_tree(device, kind, folder)


def read_tree(device: str, kind: str, folder: Path) -> Tree:
    """Raises ToolError when the filesystem has a fault."""
    run([*CHECKS[kind], device])
    with mounted(device, folder, "ro") as tree:
        return describe_tree(tree)


def said(command: list[str]) -> str:
    return run(command).stdout.decode().strip()
