"""The report: what it says of a repository, and how it looks and works in a browser."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from imager.report.collect import collect
from imager.report.model import Report
from imager.report.page import render
from imager.repository import Repository
from tests.support.browser import PROGRAM, Browser, open_browser
from tests.support.commandline import imager, imager_alone
from tests.support.disks import KIB, MIB, make_random

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
WIDTHS = (320, 480, 768, 1024, 1280, 1920)
NASTY = "<script>alert(1)</script>\"'&"

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed")


def again(repository: Repository, image_id: str, **changes: Any) -> None:
    """The same disks as another image."""
    repository.commit(repository.manifest(image_id).document | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository: ``web`` with forty images, the newest of another content; ``db`` overdue and
    with holes; ``mail`` with words that a page must escape."""
    folder = tmp_path_factory.mktemp("report")
    repo, disk = folder / "images", make_random(folder / "web.img", 2 * MIB)
    first = imager_alone("capture", disk, "--repo", repo, "--init", "--name", "web", "--json").json
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(os.urandom(100 * KIB))
    imager_alone("capture", disk, "--repo", repo, "--name", "web")
    repository = Repository.open(str(repo))
    for n in range(38):
        day = NOW - timedelta(days=60 - n)
        id_ = f"{day:%Y%m%dt%H%M%Sz}-000000{n:02x}"
        again(repository, first["image"], id=id_, created=f"{day:%Y-%m-%dT%H:%M:%SZ}")
    changes = {"name": "db", "partial": True, "created": "2026-02-01T00:00:00Z", "host": "db.local"}
    again(repository, first["image"], id="20260201t000000z-00000000", **changes)
    data = [
        {"name": "mail", "engine": "restic", "snapshot": "1", "finished": "2026-02-27T00:00:00Z"},
        {"name": NASTY, "engine": NASTY, "error": NASTY, "finished": NASTY},
    ]
    changes = {"name": NASTY, "note": NASTY, "created": "2026-02-28T00:00:00Z", "host": NASTY}
    changes |= {"data": data}
    again(repository, first["image"], id="20260228t000000z-00000000", **changes)
    repository.pin("20260228t000000z-00000000", "kept")
    return repo


@pytest.fixture(scope="module")
def found(folder: Path) -> Report:
    repository = Repository.open(str(folder))
    web = repository.find("web@latest").id
    return collect(
        repository,
        now=datetime.now(UTC),
        proofs={web: (True, "login prompt")},
        max_age=lambda name: timedelta(days=7) if name == "db" else None,
    )


@pytest.fixture(scope="module")
def page(found: Report, folder: Path) -> Path:
    file = folder.with_name("report.html")
    file.write_text(render(found))
    return file


def test_what_it_finds(found: Report) -> None:
    db, nasty, web = found.servers
    assert (db.name, nasty.name, web.name) == ("db", NASTY, "web")
    assert db.is_overdue(found.made) and db.newest.partial and db.hosts == ("db.local",)
    assert nasty.newest.pinned and nasty.proved is None
    assert web.proved is web.newest and len(web.images) == 40
    assert [image.created for image in web.images] == sorted(i.created for i in web.images)
    (detail,) = found.details["web"]
    # The newest two: 100 KiB from a border of 256 KiB on are one block.
    assert [(item.where, item.length) for item in detail.changed] == [
        ("the unknown filesystem", 256 * KIB)
    ]
    assert [backup.name for backup in found.data[NASTY]] == ["mail", NASTY]
    assert not found.damaged and not found.left_out


def test_bounds_and_names(folder: Path) -> None:
    repository = Repository.open(str(folder))
    found = collect(repository, now=NOW, closer=1)
    assert len(found.details) == 1 and found.left_out == 2
    assert "Not shown: 2 servers" in render(found)
    assert "and 10 older images" in render(collect(repository, now=NOW, name="web"))
    only = collect(repository, now=NOW, name="db")
    assert [server.name for server in only.servers] == ["db"]


def test_the_page_is_whole_and_loads_nothing(page: Path) -> None:
    text = page.read_text()
    open_tags: list[str] = []
    loads = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            loads.extend(value for key, value in attrs if key in ("src", "srcset", "data"))
            links = [value or "" for key, value in attrs if key == "href"]
            loads.extend(link for link in links if not link.startswith("#"))
            assert not [key for key, _ in attrs if key.startswith("on")]
            if tag not in ("meta", "input", "link", "circle", "line", "path", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("circle", "line", "path"):
                assert open_tags.pop() == tag

    Parser().feed(text)
    assert not open_tags and not loads
    assert "alert(1)</script>" not in text
    assert text.count("<script>") == 1


def test_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    words = ["report", out, "--repo", folder]
    said = imager(*words, "--max-age", "7", "--json").json
    assert (said["servers"], said["images"], said["damaged"]) == (3, 42, [])
    assert set(said["overdue"]) == {"db", NASTY} and "web" in said["unproved"]
    assert "3 servers, 42 images" in imager(*words).out
    assert not list(tmp_path.glob(".*"))
    assert imager(*words, "--name", "nobody", code=2).err
    (tmp_path / "no").touch()
    words_to_file = ["report", tmp_path / "no" / "x", "--repo", folder]
    assert "cannot be written" in imager(*words_to_file, code=1).err
    first, second = (item["id"] for item in imager("list", "--repo", folder, "--json").json[-2:])
    imager(*words, "--compare", first, second)
    assert f"Changed since <code>{first}</code>" in out.read_text()


def test_data_backups(found: Report) -> None:
    text = render(dataclasses.replace(found, made=NOW))
    assert text.count("Data backups of the newest image") == 1
    (row,) = re.findall("<tr><td>mail</td>.*?</tr>", text)
    age = NOW - datetime(2026, 2, 27, tzinfo=UTC)
    assert f"<td>{age.days} days</td>" in row and "whole" in row


def test_damage_is_told(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    imager("repo", "init", "--repo", copy)
    for kind in ("packs", "manifests"):
        for file in (folder / kind).rglob("*"):
            if file.is_file():
                target = copy / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    broken = copy / "manifests" / "20260201t000000z-00000000.json"
    broken.write_bytes(broken.read_bytes()[:-20])
    said = imager("report", tmp_path / "page.html", "--repo", copy, "--json", code=3).json
    assert said["servers"] == 2 and "20260201t000000z" in said["damaged"][0]
    assert "20260201t000000z" in (tmp_path / "page.html").read_text()


def test_no_images(repo: Path) -> None:
    text = render(collect(Repository.open(str(repo)), now=NOW))
    assert "There are no images yet" in text
    assert not re.search(r'id="filter"', text)


# --- in a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


CONTRASTS = """(() => {
  const curve = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (c) => curve(c / 255);
  const lum = (rgb) => 0.2126 * light(rgb[0]) + 0.7152 * light(rgb[1]) + 0.0722 * light(rgb[2]);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const rgb = parse(getComputedStyle(node).backgroundColor);
      if (rgb.length === 3 || rgb[3] === 1) return rgb;
    }
    return [255, 255, 255];
  };
  const bad = [];
  let seen = 0;
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !node.getClientRects().length || node.tagName === "SCRIPT") continue;
    const a = lum(parse(getComputedStyle(node).color)), b = lum(ground(node));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < 4.5) bad.push(node.tagName + " " + node.className + " " + ratio.toFixed(2));
  }
  return {seen, bad};
})()"""

FOCUSED = "document.activeElement.id || document.activeElement.textContent.trim()"
SHOWN = "[...document.querySelectorAll('#servers tbody tr')].filter(r => !r.hidden).length"


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(browser: Browser, page: Path, scheme: str) -> None:
    """WCAG 2 AA: a contrast of 4.5; and no page is wider than its window."""
    browser.prefer(scheme)
    browser.open(page)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for width in WIDTHS:
        browser.resize(width)
        wide = browser.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} pixels wide in a window of {width}"
    contrasts = browser.evaluate(CONTRASTS)
    assert contrasts["seen"] > 50
    assert not contrasts["bad"]
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    if shots := os.environ.get("IMAGER_SCREENSHOTS"):
        for width in (320, 1280):
            browser.resize(width)
            browser.screenshot(Path(shots) / f"report-{scheme}-{width}.png")


@needs_browser
def test_it_works_by_keyboard(browser: Browser, page: Path) -> None:
    browser.prefer("light")
    browser.resize(1280)
    browser.open(page)
    browser.press("Tab")
    assert browser.evaluate(FOCUSED) == "To the servers"
    browser.press("Tab")
    assert browser.evaluate(FOCUSED) == "theme"
    browser.press("Space")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert browser.evaluate(ground) != "rgb(255, 255, 255)"
    browser.press("Tab")
    assert browser.evaluate(FOCUSED) == "filter"
    browser.type("db.local")
    assert browser.evaluate(SHOWN) == 1
    browser.evaluate("document.getElementById('filter').value = ''")
    browser.type(" ")
    assert browser.evaluate(SHOWN) == 3
    browser.press("Tab")
    browser.press("Tab")
    assert browser.evaluate(FOCUSED) == "Server"
    first = "document.querySelector('#servers tbody th').dataset.key"
    browser.press("Enter")
    assert browser.evaluate(first) == NASTY  # "<" sorts before letters
    browser.press("Enter")
    assert browser.evaluate(first) == "web"
    for _ in range(40):
        if browser.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
        browser.press("Tab")
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.parentElement.open") is True


@needs_browser
def test_it_asks_nobody(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.requests == [page.as_uri()]


def test_states_of_a_server(found: Report) -> None:
    """An older image that was proved is named; a failed try of the newest is not hidden by it."""
    web = found.servers[2]
    failed = dataclasses.replace(web.newest, proved=False, proof_words="kernel panic")
    proved = dataclasses.replace(web.images[3], proved=True)
    images = (proved, *web.images[4:-1], dataclasses.replace(web.newest, proved=None))
    for newest, words in (
        (failed, "failed: kernel panic"),
        (images[-1], f"an older one: <code>{proved.id}"),
    ):
        server = dataclasses.replace(web, images=(*images[:-1], newest))
        assert words in render(dataclasses.replace(found, servers=[server], details={}))
