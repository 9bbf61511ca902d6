"""``imager files cp``: entries of an image's filesystem into a folder of this machine.

The names and links in an image are foreign: nothing is written outside of the destination, whatever
they say. Each step goes through an open folder and follows no link, so it also holds when somebody
changes the destination meanwhile. A file appears under its name only when it is whole.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from imager.errors import ImagerError, IntegrityError, RefusedError
from imager.files.model import Entry, Reader
from imager.files.tree import Found, walk

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Problem:
    path: str
    text: str
    is_damage: bool = False


@dataclass
class Copied:
    """What was done. Not copied or not kept: ``problems``."""

    files: int = 0
    folders: int = 0
    others: int = 0
    content_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        if any(problem.is_damage for problem in self.problems):
            return IntegrityError.exit_code
        return 5 if self.problems else 0


@dataclass
class _Folder:
    """An open folder of the destination, and whose attributes it gets when all is in it."""

    descriptor: int
    name: str
    found: Found


def copy(
    reader: Reader, start: Found, destination: Path, *, recursive: bool, preserve: bool
) -> Copied:
    """To ``destination``, or into it if it is a folder.

    ``preserve``: owner, mode, times, attributes, ACLs, hard links; devices are made by root only.
    Raises RefusedError for a destination that can't be used, ImagerError for a folder without
    ``recursive``.
    """
    if start.entry.is_folder and not recursive:
        raise ImagerError(f"{start.path or '/'} is a folder", hint="copy it with -r")
    parent, name = _place(start, destination)
    with _opened(parent) as top:
        return _Copy(reader, preserve, top).all_of(start, name)


def _place(start: Found, destination: Path) -> tuple[Path, str]:
    """The folder, and the name in it. A destination may itself be a link: the user named it."""
    if destination.is_dir():
        own = start.path.rpartition("/")[2]
        if own:
            return destination, own
        destination = destination.resolve()
        return destination.parent, destination.name
    if not destination.parent.is_dir():
        raise RefusedError([f"there is no folder {destination.parent}"])
    return destination.parent, destination.name


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class _Copy:
    def __init__(self, reader: Reader, preserve: bool, top: int) -> None:
        self._reader = reader
        self._preserve = preserve
        self._top = top
        self._is_root = os.geteuid() == 0
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._links: dict[tuple[int, int], list[str]] = {}
        """Where the first name of a file with several is, from the top."""
        self._stack: list[_Folder] = []
        self._done = Copied()

    def all_of(self, start: Found, name: str) -> Copied:
        if not start.entry.is_folder:
            self._one(start, self._top, [name])
            return self._done
        with ExitStack() as stack:
            stack.callback(self._close_to, 0)
            self._enter(start, self._top, name)
            if not self._stack:
                return self._done
            skipped: str | None = None
            for found in self._walked(start):
                depth = found.path.count("/") - start.path.count("/")
                if skipped is not None and found.path.startswith(f"{skipped}/"):
                    continue
                self._close_to(depth)
                here = self._stack[-1].descriptor
                own = found.entry.name  # foreign, and perhaps no name at all
                if found.entry.is_folder:
                    before = len(self._stack)
                    self._enter(found, here, own)
                    skipped = found.path if len(self._stack) == before else None
                else:
                    self._one(found, here, [*(folder.name for folder in self._stack), own])
        return self._done

    def _walked(self, start: Found) -> Iterator[Found]:
        """Up to where the tree can't be read on."""
        try:
            yield from walk(self._reader, start)
        except (ImagerError, OSError) as error:
            self._problem(start.path, error)

    # --- folders ------------------------------------------------------------------------------

    def _enter(self, found: Found, parent: int, name: str) -> None:
        """Make a folder, or go on in one that is there; on the stack if that worked."""
        try:
            _check_name(name)
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
            self._stack.append(_Folder(os.open(name, _FOLDER, dir_fd=parent), name, found))
            self._done.folders += 1
        except (ImagerError, OSError) as error:
            self._problem(found.path, error)

    def _close_to(self, depth: int) -> None:
        """Leave the folders below; they get their attributes now, when nothing changes them."""
        while len(self._stack) > depth:
            folder = self._stack.pop()
            try:
                self._keep(folder.descriptor, folder.found)
            finally:
                os.close(folder.descriptor)

    # --- all else -----------------------------------------------------------------------------

    def _one(self, found: Found, parent: int, names: list[str]) -> None:
        try:
            _check_name(names[-1])
            if self._linked(found.entry, parent, names):
                return
            if found.entry.is_file:
                self._file(found, parent, names[-1])
            elif found.entry.is_link:
                target = self._reader.target(found.entry)
                self._placed(
                    found, parent, names[-1], lambda new: os.symlink(target, new, dir_fd=parent)
                )
            else:
                self._special(found, parent, names[-1])
            if found.entry.links > 1:
                self._links.setdefault(found.entry.number, names)
        except (ImagerError, OSError) as error:
            self._problem(found.path, error)

    def _file(self, found: Found, parent: int, name: str) -> None:
        temporary = _temporary_name()
        descriptor = os.open(temporary, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            written = 0
            for offset, content in self._reader.pieces(found.entry):
                _write(descriptor, offset, content)
                written += len(content)
            os.ftruncate(descriptor, found.entry.size)
            self._keep(descriptor, found)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
            raise
        finally:
            os.close(descriptor)
        self._done.files += 1
        self._done.content_bytes += written

    def _special(self, found: Found, parent: int, name: str) -> None:
        entry = found.entry
        is_device = stat.S_ISBLK(entry.mode) or stat.S_ISCHR(entry.mode)
        if is_device and not self._is_root:
            raise ImagerError(f"a {entry.kind}: only root makes one")
        if not (is_device or stat.S_ISFIFO(entry.mode) or stat.S_ISSOCK(entry.mode)):
            raise ImagerError("of an unknown kind")
        mode = stat.S_IFMT(entry.mode) | 0o600
        self._placed(
            found, parent, name, lambda new: os.mknod(new, mode, entry.rdev, dir_fd=parent)
        )

    def _placed(self, found: Found, parent: int, name: str, make: Callable[[str], None]) -> None:
        """Made under another name, and renamed when it has its attributes."""
        temporary = _temporary_name()
        make(temporary)
        try:
            self._keep_by_name(parent, temporary, found)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
            raise
        self._done.others += 1

    def _linked(self, entry: Entry, parent: int, names: list[str]) -> bool:
        """Whether it is a hard link to what was copied already."""
        first = self._links.get(entry.number) if entry.links > 1 else None
        if first is None or not self._preserve:
            return False
        temporary = _temporary_name()
        with _inside(self._top, first[:-1]) as folder:
            os.link(
                first[-1], temporary, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False
            )
        os.rename(temporary, names[-1], src_dir_fd=parent, dst_dir_fd=parent)
        # Renaming one name of a file to another of it does nothing, rename(2).
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=parent)
        self._done.files += 1
        return True

    # --- attributes ---------------------------------------------------------------------------

    def _keep(self, descriptor: int, found: Found) -> None:
        """Owner first, since it takes away set-uid bits and capabilities; times last."""
        entry = found.entry
        if not self._preserve:
            os.chmod(descriptor, stat.S_IMODE(entry.mode) & 0o777 & ~self._umask)
            return
        self._own(found, lambda uid, gid: os.chown(descriptor, uid, gid))
        os.chmod(descriptor, self._mode(entry))
        self._set_attributes(found, lambda name, value: os.setxattr(descriptor, name, value))
        os.utime(descriptor, ns=(entry.atime_ns, entry.mtime_ns))

    def _keep_by_name(self, parent: int, name: str, found: Found) -> None:
        """Of links and devices, which can't be opened for it."""
        entry = found.entry
        if not self._preserve:
            if not entry.is_link:
                mode = stat.S_IMODE(entry.mode) & 0o777 & ~self._umask
                os.chmod(name, mode, dir_fd=parent)
            return
        self._own(
            found,
            lambda uid, gid: os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False),
        )
        if not entry.is_link:
            os.chmod(name, self._mode(entry), dir_fd=parent)
        path = f"/proc/self/fd/{parent}/{name}"
        self._set_attributes(
            found,
            lambda attribute, value: os.setxattr(path, attribute, value, follow_symlinks=False),
        )
        os.utime(name, ns=(entry.atime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _mode(self, entry: Entry) -> int:
        """Set-uid and set-gid only with their owner."""
        mode = stat.S_IMODE(entry.mode)
        return mode if self._is_root else mode & 0o1777

    def _own(self, found: Found, chown: Callable[[int, int], None]) -> None:
        entry = found.entry
        try:
            chown(entry.uid, entry.gid)
        except PermissionError:
            self._note(found, f"owner {entry.uid}:{entry.gid} not kept: only root gives files away")

    def _set_attributes(self, found: Found, set_one: Callable[[str, bytes], None]) -> None:
        attributes: Mapping[str, bytes] = self._reader.attributes(found.entry)
        lost = []
        for name, value in attributes.items():
            try:
                set_one(name, value)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EACCES):
                    raise
                lost.append(name)
        if lost:
            self._note(found, f"not kept: {', '.join(sorted(lost))}")

    # --- problems -----------------------------------------------------------------------------

    def _note(self, found: Found, text: str) -> None:
        self._done.problems.append(Problem(found.path or "/", text))

    def _problem(self, path: str, error: ImagerError | OSError) -> None:
        text = error.message if isinstance(error, ImagerError) else str(error.strerror or error)
        is_damage = isinstance(error, IntegrityError) or (
            isinstance(error, OSError) and error.errno == errno.EIO
        )
        self._done.problems.append(Problem(path or "/", text, is_damage))


def _write(descriptor: int, offset: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, offset)
        offset += count
        view = view[count:]


def _check_name(name: str) -> None:
    """Raises ImagerError for a name that would lead elsewhere."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ImagerError(f"the name {name!r} is none that a file can have here")


def _temporary_name() -> str:
    return f".imager-{secrets.token_hex(8)}"


@contextmanager
def _inside(top: int, names: list[str]) -> Iterator[int]:
    """A folder below one that is open, without following a link on the way."""
    descriptor = os.dup(top)
    try:
        for name in names:
            below = os.open(name, _FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)
