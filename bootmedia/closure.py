"""The python layer of the rescue system: Python, this project, tools and what all of them need."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bootmedia.cpio import File, Folder, Node, Tree
from bootmedia.pythonfiles import add_python, interpreter
from bootmedia.rescueroot import RescueRoot
from bootmedia.tools import add_tools
from imager.errors import ImagerError

_GUEST = Path(__file__).parent / "guest"

_FOLDERS = ("dev", "proc", "sys", "run", "mnt", "etc/imager", "lib/modules", "lib/firmware", "var")

# mfusepy looks for its library by a compiler or ldconfig, unless it is told.
_IMAGER = """#!/bin/sh
export FUSE_LIBRARY_PATH={fuse}
exec python3 -I -B -m imager "$@"
"""

_NAMES = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "/etc/group": "root:x:0:\ndisk:x:6:\n",
    "/etc/shells": "/bin/sh\n",
    "/etc/hosts": "127.0.0.1 localhost rescue\n::1 localhost rescue\n",
    "/etc/hostname": "rescue\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}

# Each opened while running: at the end of a thread, and for names by older C libraries.
_OPENED_LIBRARIES = ("libgcc_s.so.1", "libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2")
_FUSE_LIBRARIES = ("libfuse3.so.4", "libfuse3.so.3")

_TERMINALS = ("linux", "vt100", "vt220", "xterm")
_TERMINFO_FOLDERS = ("/lib/terminfo", "/usr/share/terminfo", "/etc/terminfo")

# Debian, Fedora, SUSE.
_CERTIFICATES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
)
_CERTIFICATES_AT = "/etc/ssl/certs/ca-certificates.crt"

_LOCALES = Path("/usr/lib/locale")


@dataclass(frozen=True)
class PythonLayer:
    """``warnings``: what the rescue system will lack, and where it can be had."""

    tree: Tree
    warnings: tuple[str, ...]


def python_layer(*, ssh: bool = False, data: Sequence[str] = ()) -> PythonLayer:
    """Gather it from this machine; ``ssh`` adds the server for remote rescue, ``data`` the programs
    of these engines of data backups.

    Raises ImagerError when something is missing without which it would not work.
    """
    root = RescueRoot(interpreter())
    _add_folders(root)
    add_python(root)
    add_tools(root, ssh=ssh, data=data)
    _add_opened_libraries(root)
    _add_command(root)
    _add_scripts(root)
    _add_names(root)
    _add_terminals(root)
    _add_locale(root)
    _add_certificates(root)
    return PythonLayer(root.tree, tuple(root.warnings))


def _add_folders(root: RescueRoot) -> None:
    for path in _FOLDERS:
        root.add_folder(path)
    root.tree.add(Folder("root", 0o700))
    root.tree.add(Folder("tmp", 0o1777))
    # The kernel opens it for init before anything is mounted.
    root.tree.add(Node("dev/console", 0o020600, 5, 1))


def _add_opened_libraries(root: RescueRoot) -> None:
    for name in _OPENED_LIBRARIES:
        root.add_library(name)


def _add_command(root: RescueRoot) -> None:
    fuse = next((name for name in _FUSE_LIBRARIES if root.add_library(name)), "")
    if not fuse:
        root.warnings.append(
            "libfuse3 is not installed: the rescue system can't mount images; "
            "the package libfuse3-3 has it"
        )
    root.add_text("/usr/bin/imager", _IMAGER.format(fuse=fuse), mode=0o755)


def _add_scripts(root: RescueRoot) -> None:
    for name, path in (("init.sh", "/init"), ("udhcpc.sh", "/usr/share/udhcpc/default.script")):
        source = _GUEST / name
        if not source.is_file():
            raise ImagerError(
                f"{source} is missing, which the rescue system starts with",
                hint="install imager again: its files are not complete",
            )
        root.tree.add(File(path, 0o755, source))


def _add_names(root: RescueRoot) -> None:
    for path, text in _NAMES.items():
        root.add_text(path, text)


def _add_terminals(root: RescueRoot) -> None:
    for name in _TERMINALS:
        for folder in _TERMINFO_FOLDERS:
            source = Path(folder, name[0], name)
            if source.is_file():
                root.add_file(source, f"/usr/share/terminfo/{name[0]}/{name}")
                break
        else:
            root.warnings.append(f"no description of the terminal {name} (package ncurses-base)")


def _add_locale(root: RescueRoot) -> None:
    """Newer C libraries have C.UTF-8 built in."""
    for name in ("C.utf8", "C.UTF-8"):
        folder = _LOCALES / name
        for source in sorted(folder.rglob("*")):
            if source.is_file():
                root.add_file(source, f"{_LOCALES}/C.utf8/{source.relative_to(folder)}")
        if folder.is_dir():
            return


def _add_certificates(root: RescueRoot) -> None:
    for path in map(Path, _CERTIFICATES):
        if path.is_file():
            root.add_file(path.resolve(), _CERTIFICATES_AT)
            known = ssl.get_default_verify_paths().openssl_cafile
            if known != _CERTIFICATES_AT:
                root.add_link(known, _CERTIFICATES_AT)
            return
    root.warnings.append(
        "no certificates of authorities: repositories by https can't be reached from the rescue "
        "system; the package ca-certificates has them"
    )
