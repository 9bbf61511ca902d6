"""Python for the rescue system: the running interpreter, its library, and packages.

Modules are compiled (PEP 552, PEP 3147: sourceless), since the rescue system has no place to
keep what it would compile. All of them, packages too, lie in the folder of the standard library:
it is searched in every mode of the interpreter, whatever a distribution has made of ``site``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import marshal
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from bootmedia.rescueroot import RescueRoot
from imager.errors import ImagerError, ToolError

# Of the standard library: what is for developers, for other systems, or never used here.
_NOT_NEEDED = {
    *("__pycache__", "__phello__", "__phello__.foo.py", "site-packages", "dist-packages"),
    *("test", "tests", "unittest", "doctest.py", "idlelib", "lib2to3", "pydoc.py", "pydoc_data"),
    *("tkinter", "turtle.py", "turtledemo", "distutils", "ensurepip", "venv", "tabnanny.py"),
    *("dbm", "sqlite3", "msilib", "wsgiref", "xml", "xmlrpc", "cgi.py", "cgitb.py"),
    *("asyncio", "webbrowser.py"),
    *("imaplib.py", "mailbox.py", "nntplib.py", "smtpd.py", "telnetlib.py", "sitecustomize.py"),
    *("_aix_support.py", "_osx_support.py", "_bootsubprocess.py", "_pydecimal.py", "_pyio.py"),
}
_NOT_NEEDED_NATIVE = re.compile(
    r"_test|xx|_asyncio|_elementtree|pyexpat|_xx|_tkinter|_ctypes_test|_sqlite3|_dbm|_gdbm|_codecs_|audioop|ossaudiodev|nis\."
)
_FOLDER_OF_CONFIG = re.compile(r"config-\d")

# What the rescue system's code imports, by the name of the import.
PACKAGES = ("zstandard", "blake3", "isal", "mfusepy", "typer", "tqdm", "parted", "_ped")
OWN_PACKAGES = ("imager", "bootmedia")

# zstandard has its backend twice; this one is for interpreters other than CPython.
_NOT_NEEDED_OF_PACKAGES = {"__pycache__", "tests", "_cffi" + sysconfig.get_config_var("EXT_SUFFIX")}

# Named by requirements of the above, and never imported: typer is told not to use rich.
_LEFT_OUT = frozenset({"rich"})

# Docstrings are what the commands' help is made of; the standard library's are not read by code.
_KEEP_DOCSTRINGS, _NO_DOCSTRINGS = 0, 2


def add_python(root: RescueRoot) -> None:
    """Interpreter, standard library, packages and this project.

    Raises ImagerError when a package is not installed.
    """
    _add_interpreter(root)
    _add_standard_library(root)
    for name in third_party_packages():
        _add_package(root, name)
    for name in OWN_PACKAGES:
        _add_package(root, name)


def interpreter() -> Path:
    """The running one, not a virtual environment's link to it."""
    return Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()


def library_path() -> str:
    """The standard library's folder in the rescue system, where the prefix is /usr."""
    return f"/usr/{sys.platlibdir}/python{sys.version_info.major}.{sys.version_info.minor}"


def _add_interpreter(root: RescueRoot) -> None:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    root.add_file(interpreter(), f"/usr/bin/{name}")
    root.add_link("/usr/bin/python3", name)


def _add_standard_library(root: RescueRoot) -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    for source in _files(folder, _NOT_NEEDED):
        relative = source.relative_to(folder)
        if _FOLDER_OF_CONFIG.match(relative.parts[0]):
            continue
        if source.suffix == ".so":
            if not _NOT_NEEDED_NATIVE.match(source.name):
                _add_optional_module(root, source, f"{library_path()}/{relative}")
        elif source.suffix == ".py":
            _add_module(root, source, f"{library_path()}/{relative}", _NO_DOCSTRINGS)
    # Where the interpreter looks for it, even if all of its modules are built in.
    root.add_folder(f"{library_path()}/lib-dynload")


def _add_optional_module(root: RescueRoot, source: Path, path: str) -> None:
    try:
        root.add_file(source, path)
    except ToolError as error:
        root.warnings.append(f"Python's module {source.name} is left out: {error.message}")


def third_party_packages() -> list[str]:
    """Names of packages and modules to import: ``PACKAGES`` and what those require."""
    found = dict.fromkeys(PACKAGES)
    distribution_of = importlib.metadata.packages_distributions()
    open_names = [name for package in PACKAGES for name in distribution_of.get(package, ())]
    seen = set(_LEFT_OUT)
    while open_names:
        name = _normal(open_names.pop())
        if name in seen:
            continue
        seen.add(name)
        open_names += _requirements(name)
        found |= dict.fromkeys(
            package
            for package, owners in distribution_of.items()
            if name in map(_normal, owners) and importlib.util.find_spec(package)
        )
    return [name for name in found if not _is_metadata(name)]


def _normal(name: str) -> str:
    """A distribution's name as it is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_metadata(name: str) -> bool:
    return name.endswith((".libs", ".dist-info")) or "__" in name


def _requirements(distribution: str) -> Iterator[str]:
    """Of what is installed here, without extras (PEP 508): a condition that doesn't hold names
    what isn't needed, and mostly isn't there."""
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement, _, condition = line.partition(";")
        if "extra" not in condition and (name := re.match(r"[A-Za-z0-9._-]+", requirement)):
            yield name[0]


def _add_package(root: RescueRoot, name: str) -> None:
    """A package, or a module that is one file."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ImagerError(
            f"the rescue system needs the Python package {name}, which is not installed",
            hint=f"install it for {sys.executable}, or run imager with a Python that has it",
        )
    origin = Path(spec.origin)
    is_folder = spec.submodule_search_locations is not None
    base = origin.parent.parent if is_folder else origin.parent
    root.move_folder(base, library_path())
    sources = _files(origin.parent, _NOT_NEEDED_OF_PACKAGES) if is_folder else [origin]
    for source in sources:
        path = f"{library_path()}/{source.relative_to(base)}"
        if source.suffix == ".py":
            _add_module(root, source, path, _KEEP_DOCSTRINGS)
        elif ".so" in source.suffixes:
            root.add_file(source, path)


def _files(folder: Path, leave_out: Iterable[str]) -> Iterator[Path]:
    """All files below a folder, in order."""
    for path in sorted(folder.iterdir()):
        if path.name in leave_out:
            continue
        if path.is_dir():
            yield from _files(path, leave_out)
        elif path.is_file():
            yield path


def _add_module(root: RescueRoot, source: Path, path: str, optimization: int) -> None:
    root.add_bytes(path.removesuffix(".py") + ".pyc", _compiled(source, path, optimization))


def _compiled(source: Path, path: str, optimization: int) -> bytes:
    """An unchecked hash-based pyc. marshal's version 2 has no references to earlier objects,
    which would depend on what else this process holds."""
    text = source.read_bytes()
    code = compile(text, path, "exec", dont_inherit=True, optimize=optimization)
    flags = (0b01).to_bytes(4, "little")
    header = importlib.util.MAGIC_NUMBER + flags + importlib.util.source_hash(text)
    return header + marshal.dumps(code, 2)
