"""The layers, checked by a machine: who imports whom, and what stays out of the rescue system."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# In import order: a module may import its own layer and those above it here. A name stands for the
# module or for all of the package. Modules of `imager` that are not listed are engines.
LAYERS = {
    "foundation": "errors extents jsonrecord mounttable pipeline process progress sysfs units",
    "formats": "config format initramfs marker mbr partitiontypes",
    "devices": "acceleration allocation blocksource contents deviceuse diskidentity fingerprint "
    "firmware gpt growfs loopdevice partitions reading store tableedit target",
    "repository": "blockindex blockmap layout manifest moved pack repository",
    "engines": "belonging capture diff diskmap plan restore verify",
    "command line": "cli __main__",
}
ORDER = list(LAYERS)
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}

# Files that never import each other; what they share is named here.
FAMILIES = {
    "imager.allocation": {"bitmap", "checksum", "model"},
    "imager.store": {"base"},
}

# Third-party modules, and others with one door, have a home.
HOMES = {
    "parted": ("imager.tableedit",),
    "_ped": ("imager.tableedit",),
    "subprocess": ("imager.process",),
    "typer": ("imager.cli", "imager.__main__"),
    "click": ("imager.cli", "imager.__main__"),
    "tqdm": ("imager.cli.bars",),
    "fs_explorer": ("imager.files.foreign",),
    "mfusepy": ("imager.fuseserver",),
    "pycdlib": ("bootmedia.iso", "imager.store.iso"),
    "numpy": (),
}

# What a restore needs is all in the rescue system, where each import costs memory and time.
LIGHT = ("imager.restore", "imager.verify", "imager.capture", "imager.store.local")
HEAVY = {"typer", "click", "rich", "parted", "_ped", "pycdlib", "tqdm", "numpy", "pytest"}


class Module(NamedTuple):
    name: str
    tree: ast.Module


@cache
def modules() -> dict[str, Module]:
    found = {}
    for package in ("imager", "bootmedia"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(name, ast.parse(path.read_text(), str(path)))
    return found


def module_path(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(module: Module, *, lazy: bool = True) -> Iterator[str]:
    """Full names of the modules that are imported, within functions too when ``lazy``."""
    for node in ast.walk(module.tree) if lazy else executed_on_import(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module.name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else node.module


def executed_on_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from executed_on_import(child)


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(name: str) -> int:
    """Number of the layer of a module of ``imager``."""
    return ORDER.index(LAYER_OF.get(name.split(".")[1], "engines"))


def own_imports(module: Module) -> Iterator[str]:
    """What a module imports of ``imager``; the package itself has only the version."""
    return (name for name in imports(module) if name.startswith("imager."))


def is_command_line(name: str) -> bool:
    return is_below(name, "imager.cli") or name == "imager.__main__"


def each(names: Iterator[str]) -> pytest.MarkDecorator:
    """Run a test for each of these modules."""
    return pytest.mark.parametrize(
        "module", [modules()[name] for name in names], ids=lambda m: m.name
    )


def test_the_table_names_what_exists() -> None:
    missing = [name for name in LAYER_OF if not module_path(f"imager.{name}").exists()]
    assert not missing
    shared = [f"{family}.{name}" for family, names in FAMILIES.items() for name in names]
    assert not [name for name in shared if name not in modules()]


@each(name for name in modules() if name.startswith("imager."))
def test_layers(module: Module) -> None:
    """So no engine imports the command line, and nothing but an engine an engine."""
    wrong = [name for name in own_imports(module) if layer(name) > layer(module.name)]
    assert not wrong, f"{module.name} ({ORDER[layer(module.name)]}) imports from a later layer"


def test_bootmedia() -> None:
    """The build side needs devices: this machine's hardware, and the safety of a stick that is
    written. What runs in the rescue system needs the engines."""
    for module in modules().values():
        if is_below(module.name, "bootmedia"):
            highest = "engines" if is_below(module.name, "bootmedia.guest") else "devices"
            wrong = [name for name in own_imports(module) if layer(name) > ORDER.index(highest)]
            assert not wrong, f"{module.name} may import imager up to the {highest}"
        elif not is_below(module.name, "imager.cli"):
            wrong = [name for name in imports(module) if is_below(name, "bootmedia")]
            assert not wrong, f"{module.name}: only the command line knows bootmedia"


def test_files_that_are_no_modules_are_installed() -> None:
    """In a checkout they are there anyway: only an installed program misses them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data = {
        path
        for package, patterns in declared["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    there = {
        path
        for package in ("imager", "bootmedia")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert there == data


def test_there_are_no_cycles() -> None:
    """Among imports at module level. Importing a package runs its ``__init__``."""
    graph = {
        name: {other for other in imports(module, lazy=False) if other in modules()} - {name}
        for name, module in modules().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_one_kind_do_not_know_each_other(family: str) -> None:
    for module in modules().values():
        if module.name == family or not is_below(module.name, family):
            continue
        kind = module.name.removeprefix(family + ".").split(".")[0]
        siblings = {
            name.removeprefix(family).split(".")[1] if name != family else "__init__"
            for name in imports(module)
            if is_below(name, family)
        }
        assert siblings <= FAMILIES[family] | {kind}, f"{module.name} imports another kind"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_package_loads_its_kinds_only_when_they_are_used(family: str) -> None:
    for name in (family, f"{family}.registry"):
        if name in modules():
            loaded = {
                found.removeprefix(family + ".").split(".")[0]
                for found in imports(modules()[name], lazy=False)
                if found.startswith(family + ".")
            }
            assert loaded <= FAMILIES[family] | {"registry"}


@pytest.mark.parametrize("guest", HOMES)
def test_homes_of_modules(guest: str) -> None:
    for module in modules().values():
        if any(is_below(name, guest) for name in imports(module)):
            homes = HOMES[guest]
            assert any(is_below(module.name, home) for home in homes), (
                f"{module.name} imports {guest}, whose home is {homes or 'nowhere'}"
            )


@each(name for name in modules() if is_below(name, "imager") and not is_command_line(name))
def test_only_the_command_line_prints_and_exits(module: Module) -> None:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "exit", "quit", "input", "sys.exit", "os._exit"}, (
                f"{module.name}, line {node.lineno}: {called}"
            )


@each(iter(modules()))
def test_no_shell(module: Module) -> None:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            shells = ("os.system", "os.popen", "os.spawn", "os.posix_spawn")
            assert not called.startswith(shells), f"{module.name}, line {node.lineno}: {called}"
            assert not any(
                word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords
            ), f"{module.name}, line {node.lineno}: a shell"


@pytest.mark.parametrize("name", LIGHT)
def test_what_restore_needs_is_light(name: str) -> None:
    code = (
        "import sys, time; started = time.perf_counter();"
        f"import {name}; print(time.perf_counter() - started, *sys.modules)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, *loaded = finished.stdout.split()
    print(f"import {name}: {float(seconds):.3f} s, {len(loaded)} modules")
    assert name in loaded
    assert not HEAVY & {module.split(".")[0] for module in loaded}
    assert not [module for module in loaded if is_below(module, "imager.cli")]
