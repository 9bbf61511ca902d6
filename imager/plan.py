"""The plan of a restore: what goes where, and every reason not to do it. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imager.blockmap import BlockMap
from imager.blocksource import BlockSource, FileSource, PartSource
from imager.compatibility import compare
from imager.contents import what_is_on
from imager.deviceuse import SYS_ROOT, device_numbers, disk_numbers_below, uses_of
from imager.diskidentity import DiskIdentity, disk_identity
from imager.errors import ImagerError, SourceError, UsageError
from imager.extents import Extent
from imager.fingerprint import read_fingerprint
from imager.growfs import can_grow, tools_to_grow
from imager.manifest import Disk, Manifest
from imager.marker import MARKER_SIZE, Marker
from imager.partitions import read_partition_table, smallest_disk
from imager.process import find_tool
from imager.repository import Repository
from imager.sysfs import read_number

# UEFI Specification 2.10, 5.3.1: at least this much is reserved for the entries
_GPT_ENTRIES_BYTES = 16384

MAY_NOT_BOOT = "the disk may not boot here"
"""How warnings begin that come of comparing the machines."""

# What the comparison of machines says too, and the plan refuses by itself.
_REFUSED_ALREADY = frozenset({"sector size", "disk size"})


@dataclass(frozen=True)
class RestoreOptions:
    """What a restore is asked for. ``partition`` and ``to_partition`` are partition numbers."""

    partition: int | None = None
    to_partition: int | None = None
    delta: bool = False
    grow: bool = False
    new_ids: bool = False
    read_back: bool = False


@dataclass(frozen=True)
class RestorePlan:
    """One disk or partition of an image on its way to one target. Sizes and offsets in bytes.

    With ``refusals`` it must not be carried out.
    """

    image: str
    disk: str
    options: RestoreOptions
    source: Extent
    target: str
    target_exists: bool
    target_size: int
    target_offset: int
    identity: DiskIdentity
    overwrites: tuple[str, ...]
    steps: tuple[str, ...]
    warnings: tuple[str, ...]
    missing: tuple[str, ...]
    """What the image does not have, because it could not be read."""
    refusals: tuple[str, ...]
    resumes: bool
    stale_gpt: Extent | None
    """The backup GPT that a former table left at the target's end, to be zeroed."""
    data_bytes: int
    packs: int

    @property
    def whole_disk(self) -> bool:
        return self.options.partition is None

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "options": vars(self.options),
            "source": list(self.source),
            "identity": self.identity.to_json(),
        }


def plan_restore(
    repository: Repository, manifest: Manifest, disk: Disk, target: str, options: RestoreOptions
) -> RestorePlan:
    """Find out everything about a restore that can be known before the first write.

    Raises ImagerError where there is nothing to plan with: no such partition, a damaged map.
    """
    return _Planner(repository, manifest, disk, target, options).plan()


class _Planner:
    def __init__(
        self,
        repository: Repository,
        manifest: Manifest,
        disk: Disk,
        target: str,
        options: RestoreOptions,
    ) -> None:
        self._repository = repository
        self._manifest = manifest
        self._disk = disk
        self._table = disk.table
        self._path = target
        self._options = options
        self._steps: list[str] = []
        self._warnings: list[str] = []
        self._refusals: list[str] = []
        self._overwrites: list[str] = []

    def plan(self) -> RestorePlan:
        self._check_options()
        map_ = self._repository.block_map(self._disk)
        source = self._source_range()
        if _is_within(Path(self._path), self._repository.store.url):
            self._refusals.append(f"{self._path} is a file of the repository itself")
        exists = _has_content(Path(self._path))
        if not exists and _is_among_devices(Path(self._path)):
            self._refusals.append(f"there is no device {self._path}")
        offset, size, resumes, stale_gpt = 0, source.length, False, None
        if exists:
            self._path = self._partition_node() or self._path
            self._check_use()
            try:
                with self._open(self._path) as target:
                    offset, size = self._target_range(target, source)
                    resumes = self._look_at(PartSource(target, offset, size), source)
                    self._check_sectors(target)
                    self._compare_machines(target)
                    stale_gpt = self._find_stale_gpt(target)
            except SourceError as error:
                self._refusals.append(error.message)
        self._check_room(map_, source, size)
        source = Extent(source.offset, min(source.length, size))
        data_bytes, packs = self._check_packs(map_, source)
        self._describe(source, offset, size, resumes=resumes, exists=exists)
        return RestorePlan(
            image=self._manifest.id,
            disk=self._disk.name,
            options=self._options,
            source=source,
            target=self._path,
            target_exists=exists,
            target_size=size,
            target_offset=offset,
            identity=disk_identity(self._path),
            overwrites=tuple(self._overwrites),
            steps=tuple(self._steps),
            warnings=tuple(self._warnings),
            missing=tuple(self._missing(source)),
            refusals=tuple(self._refusals),
            resumes=resumes,
            stale_gpt=stale_gpt,
            data_bytes=data_bytes,
            packs=packs,
        )

    # --- what is asked for ---

    def _check_options(self) -> None:
        options = self._options
        if options.to_partition is not None and options.partition is None:
            raise UsageError("--to-partition needs --partition: which one to restore")
        if options.new_ids and options.partition is not None:
            raise UsageError("--new-ids renews a disk's partition table: not with --partition")
        if options.new_ids and options.delta:
            raise UsageError("--new-ids and --delta contradict each other")

    def _source_range(self) -> Extent:
        number = self._options.partition
        if number is None:
            return Extent(0, self._disk.size)
        part = self._table.partition(number)
        if part is None:
            known = ", ".join(str(item.number) for item in self._table.partitions) or "none"
            raise UsageError(
                f"disk {self._disk.name} of {self._manifest.id} has no partition {number}",
                hint=f"its partitions: {known}",
            )
        if part.kind == "extended":
            raise UsageError(f"partition {number} is an extended one: restore those inside it")
        if reason := (self._disk.partition(number) or {}).get("excluded"):
            self._refusals.append(f"partition {number} is not in the image: {reason}")
        return Extent(part.offset, part.size)

    # --- the target ---

    def _open(self, path: str) -> FileSource:
        return FileSource(path, logical_sector=self._disk.logical_sector)

    def _partition_node(self) -> str | None:
        """The device of the partition to write, so that its siblings may stay in use; only where
        the kernel has it at the place that the table on the disk says."""
        number = self._options.to_partition or self._options.partition
        if number is None:
            return None
        folder = SYS_ROOT / "class/block" / Path(self._path).resolve().name
        for entry in folder.glob("*/partition"):
            if read_number(entry) == number:
                start, size = (read_number(entry.parent / name) for name in ("start", "size"))
                with suppress(SourceError), self._open(self._path) as target:
                    part = read_partition_table(target).partition(number)
                    if part and (start, size) == (part.offset // 512, part.size // 512):
                        return f"/dev/{entry.parent.name}"
                self._refusals.append(
                    f"the kernel has another partition {number} than the table on {self._path}: "
                    f"have it read the table again (partx --update {self._path})"
                )
        return None

    def _target_range(self, target: FileSource, source: Extent) -> tuple[int, int]:
        """Offset and length of what may be written."""
        if self._options.partition is None:
            return 0, target.size
        table = read_partition_table(target)
        if not table.partitions:
            if self._options.to_partition is not None:
                self._refusals.append(f"{self._path} has no partitions")
            return 0, target.size
        number = self._options.to_partition or self._options.partition
        part = table.partition(number)
        if part is None or part.kind == "extended":
            known = ", ".join(str(item.number) for item in table.partitions)
            self._refusals.append(
                f"{self._path} has no partition {number} to restore into (it has {known})"
            )
            return 0, min(source.length, target.size)
        return part.offset, part.size

    def _check_use(self) -> None:
        path, url = self._path, self._repository.store.url
        for use in uses_of(path):
            self._refusals.append(f"{path}: {use.device} is {use.description}")
        if device_numbers(path) & disk_numbers_below(Path(url)):
            self._refusals.append(f"{path} holds the repository {url} that is restored from")

    def _check_sectors(self, target: FileSource) -> None:
        if not target.is_device or self._table.scheme == "none" or self._options.partition:
            return
        if target.logical_sector != self._disk.logical_sector:
            self._refusals.append(
                f"{self._path} has sectors of {target.logical_sector} bytes, the imaged disk had "
                f"{self._disk.logical_sector}: its partition table would not be understood"
            )

    def _compare_machines(self, target: FileSource) -> None:
        """A disk of this machine should boot in it; files go anywhere."""
        if not target.is_device:
            return
        identity = disk_identity(self._path)
        found = compare(self._manifest, self._disk, read_fingerprint(), identity)
        for reason in (*found.of("blocker"), *found.of("attention")):
            if reason.subject not in _REFUSED_ALREADY:
                self._warnings.append(f"{MAY_NOT_BOOT}: {reason}")

    def _look_at(self, target: BlockSource, source: Extent) -> bool:
        """Describe what will be overwritten; whether it is our own unfinished restore."""
        marker = Marker.decode(_head(target))
        if marker is not None:
            self._overwrites.append(f"an unfinished restore of {marker.image}/{marker.disk}")
            return marker.root == self._disk.root and marker.offset == source.offset
        self._overwrites += what_is_on(target)
        return False

    def _find_stale_gpt(self, target: FileSource) -> Extent | None:
        """Firmware and tools would find it, and take it for the disk's table."""
        unit = target.logical_sector
        length = _GPT_ENTRIES_BYTES + unit
        is_overwritten = self._table.backup_size or target.size < self._disk.size + length
        if self._options.partition is not None or is_overwritten:
            return None
        try:
            if not target.pread(target.size - unit, unit).startswith(b"EFI PART"):
                return None
        except OSError:
            return None
        self._steps.append("remove the backup GPT that a former table left at the target's end")
        return Extent(target.size - length, length)

    # --- does it fit ---

    def _check_room(self, map_: BlockMap, source: Extent, size: int) -> None:
        if self._options.partition is not None:
            if size < source.length:
                self._refusals.append(
                    f"the target has {size} bytes, partition {self._options.partition} has "
                    f"{source.length}"
                )
            return
        least = smallest_disk(self._table, self._disk.size)
        if size < least:
            self._refusals.append(
                f"{self._path} has {size} bytes; the partitions of {self._disk.name} need {least}"
            )
        elif size < self._disk.size and (lost := self._data_beyond(map_, size)) is not None:
            self._refusals.append(
                f"{self._path} has {size} bytes; there is data outside of partitions at byte {lost}"
            )

    def _data_beyond(self, map_: BlockMap, size: int) -> int | None:
        """First byte behind ``size`` that is not zero, the backup GPT aside."""
        unit = self._disk.block_size
        end = self._disk.size - self._table.backup_size
        for run in map_.runs(size // unit, -(-end // unit)):
            if run.place is None:
                continue
            start = run.first * unit
            content = self._repository.read_block(
                run.place, run.digest, min(unit, self._disk.size - start)
            )
            first = max(size - start, 0)
            if content[first : end - start].strip(b"\0"):
                return start + first
        return None

    def _check_packs(self, map_: BlockMap, source: Extent) -> tuple[int, int]:
        """Open every pack that is needed; (bytes of data blocks, number of packs)."""
        packs: set[bytes] = set()
        data_bytes = 0
        for run in block_runs(map_, self._disk, source):
            if run.place is not None:
                packs.add(run.place.pack)
                data_bytes += self._disk.block_size
        for pack_id in sorted(packs):
            try:
                self._repository.pack(pack_id)
            except ImagerError as error:
                self._refusals.append(error.message)
        return min(data_bytes, source.length), len(packs)

    # --- the steps, in words ---

    def _describe(
        self, source: Extent, offset: int, size: int, *, resumes: bool, exists: bool
    ) -> None:
        options, disk = self._options, self._disk
        what = f"partition {options.partition}" if options.partition else "the disk"
        into = ""
        if options.partition and offset:
            into = f" into partition {options.to_partition or options.partition} of the target"
        how = "compare with the target and write what differs"
        if not (options.delta or resumes):
            how = "write its blocks"
            how += ", zero or discard the rest" if exists else ", leave the rest sparse"
        self._steps.append(f"{what} of {self._manifest.id}{into}: {how}")
        if options.read_back:
            self._steps.append("read everything back and compare digests")
        if options.partition is None:
            self._describe_table(size)
            self._describe_left_out()
        elif options.grow:
            part = disk.partition(options.partition) or {}
            self._describe_growth(options.partition, part)
        if options.delta and not exists:
            self._refusals.append(f"{self._path} does not exist: there is nothing to compare with")

    def _missing(self, source: Extent) -> Iterator[str]:
        for extent in self._disk.unreadable.within(*source):
            yield (
                f"{extent.length} bytes at byte {extent.offset}, "
                f"{self._disk.where(extent.offset)}, could not be read when the image was made"
            )

    def _describe_left_out(self) -> None:
        for item in self._disk.partitions:
            if not item.get("excluded"):
                continue
            inside = item.get("filesystem") or {}
            kind, uuid = inside.get("kind", "unknown"), inside.get("uuid") or "none"
            self._warnings.append(
                f"partition {item.get('number')} ({kind}, UUID {uuid}) is not in the image, "
                f"{item['excluded']}: what the target has there stays; on another disk make the "
                "filesystem, then bring back its data (imager data restore)"
            )

    def _describe_table(self, size: int) -> None:
        options, table = self._options, self._table
        if table.backup_size and size != self._disk.size:
            self._steps.append("move the backup GPT to the target's end")
            self._need_tool("sfdisk")
        if options.grow:
            if size <= self._disk.size:
                self._warnings.append("--grow: the target is not larger, nothing to grow")
            elif not table.partitions:
                self._describe_growth(None, (self._disk.partitions or [{}])[0])
            else:
                last = max((p for p in table.partitions if p.kind != "extended"), key=_end)
                self._describe_growth(last.number, self._disk.partition(last.number) or {})
        if options.new_ids:
            if table.scheme == "none":
                self._refusals.append("--new-ids: the disk has no partition table")
            self._steps.append("give the disk and its partitions new ids")
            self._warnings.append("boot loaders and fstab that name PARTUUIDs need the new ids")
            self._need_tool("sfdisk")

    def _describe_growth(self, number: int | None, part: dict[str, Any]) -> None:
        if part.get("excluded"):
            self._refusals.append("--grow: the last partition is not in the image")
        kind = str((part.get("filesystem") or {}).get("kind", "unknown"))
        what = "the filesystem" if number is None else f"partition {number} and its filesystem"
        if not can_grow(kind):
            self._refusals.append(f"--grow: a filesystem of kind {kind} can't be grown here")
        self._steps.append(f"grow {what} ({kind}) to the target's end")
        for tool in ("losetup", *tools_to_grow(kind)):
            self._need_tool(tool)

    def _need_tool(self, name: str) -> None:
        if find_tool(name) is None:
            self._refusals.append(f"{name} is not installed, and a step needs it")


def block_runs(map_: BlockMap, disk: Disk, source: Extent) -> Iterator[Any]:
    """The runs of blocks that a range of bytes lies in."""
    return map_.runs(source.offset // disk.block_size, -(-source.end // disk.block_size))


def _end(part: Any) -> int:
    return int(part.end)


def _head(target: BlockSource) -> bytes:
    try:
        return target.pread(0, min(MARKER_SIZE, target.size))
    except OSError:
        return b""


def _has_content(path: Path) -> bool:
    """An empty file is as good as none: a restore that was killed early leaves one."""
    return path.exists() and not (path.is_file() and path.stat().st_size == 0)


def _is_within(path: Path, url: str) -> bool:
    return path.resolve().is_relative_to(Path(url).resolve())


def _is_among_devices(path: Path) -> bool:
    """Whether a new file would lie in the memory that holds the device nodes."""
    folder, devices = path.absolute().parent, Path("/dev")
    is_there = folder.exists() and devices.is_mount()
    return is_there and folder.stat().st_dev == devices.stat().st_dev
