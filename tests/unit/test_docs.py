"""The documents: every link leads somewhere, every page can be found, every command is told of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from imager.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """Without code: there are no links nor headings in it."""
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """As web sites make them of headings."""
    plain = (re.sub(r"[^\w\- ]", "", text.lower()) for text in _HEADING.findall(prose(page)))
    return {text.replace(" ", "-") for text in plain}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The file and the anchor of each link that stays within the project."""
    for target in _LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{page.name}: no {target}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: no #{anchor} in {target.name}"


def test_every_page_is_reached_from_the_first() -> None:
    index = ROOT / "docs" / "README.md"
    seen, todo = set(), [index]
    while todo:
        page = todo.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            todo += [target for target, _ in links(page) if target.exists()]
    lost = [page.name for page in (ROOT / "docs").rglob("*.md") if page not in seen]
    assert not lost


def commands(group: TyperGroup, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        yield f"{before}{name}"
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{before}{name} ")


def test_every_command_is_in_the_documents() -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    told = " ".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    missing = [name for name in commands(root) if not re.search(rf"imager {name}\b", told)]
    assert not missing
