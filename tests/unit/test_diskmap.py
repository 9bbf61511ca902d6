"""Pictures of disks add up, and are well-formed."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from imager.capture import CaptureJob, capture
from imager.diskmap import STATES, draw_svg, draw_text, make_disk_map, svg_cell_count
from imager.extents import Extents
from imager.format import State
from imager.manifest import Disk
from imager.progress import NullProgress
from imager.repository import Repository
from tests.support.sources import MemorySource, memory_disk

UNIT = 64 << 10


@pytest.fixture
def disk(repo: Path) -> tuple[Repository, Disk]:
    """Eight blocks used, four zero, four unused, one unreadable, and a short one used."""
    repository = Repository.open(str(repo))
    chance = random.Random(1)
    content = chance.randbytes(8 * UNIT) + bytes(4 * UNIT) + chance.randbytes(5 * UNIT + 100)
    used = Extents([(0, 12 * UNIT), (16 * UNIT, UNIT + 100)])
    source = MemorySource(content, bad=[16 * UNIT // 512])
    job = CaptureJob(disks=(memory_disk(source, used),), name="test")
    return repository, capture(job, repository, NullProgress()).disks[0]


@pytest.mark.parametrize("cells", [1, 2, 7, 17, 18, 1000])
def test_cells_and_totals_add_up(disk: tuple[Repository, Disk], cells: int) -> None:
    repository, found = disk
    picture = make_disk_map(repository.block_map(found), found, cells)
    assert len(picture.cells) == min(cells, 18)
    assert all(sum(cell.values()) == pytest.approx(1) for cell in picture.cells)
    assert picture.totals == {
        State.DATA: 8 * UNIT + 100,
        State.ZERO: 4 * UNIT,
        State.UNUSED: 4 * UNIT,
        State.UNREADABLE: UNIT,
    }
    share = sum(cell[State.UNUSED] for cell in picture.cells) / len(picture.cells)
    assert share == pytest.approx(4 * UNIT / found.size, rel=0.01)


def test_text_has_a_glyph_for_each_cell_and_a_legend(disk: tuple[Repository, Disk]) -> None:
    repository, found = disk
    picture = make_disk_map(repository.block_map(found), found, 18)
    text = draw_text(picture, columns=6, colour=False)
    rows, legend = text.split("\n\n")
    # cells are a little smaller than blocks here: the bad one lies in two
    assert rows.splitlines() == ["██████", "██░░░░", "░···✗✗"]
    assert "unreadable 64.0 KiB" in legend
    assert draw_text(picture, columns=6, colour=True).count("\033[1;31m") == 2


def test_one_bad_block_shows_in_the_smallest_picture(disk: tuple[Repository, Disk]) -> None:
    repository, found = disk
    picture = make_disk_map(repository.block_map(found), found, 1)
    assert draw_text(picture, columns=1, colour=False).startswith("✗")


def test_svg_is_xml_whatever_names_are_in_it(disk: tuple[Repository, Disk]) -> None:
    repository, found = disk
    found.document["partitions"] = [
        {"number": 1, "offset": UNIT, "size": 2 * UNIT, "filesystem": {"kind": '<ext4>&"'}},
        {"number": None, "offset": 0, "size": 1},
    ]
    picture = make_disk_map(repository.block_map(found), found, svg_cell_count())
    root = ET.fromstring(draw_svg(picture, found, '<title> & "more"'))
    texts = "".join(root.itertext())
    assert '<title> & "more"' in texts
    assert '1: <ext4>&"' in texts
    tooltips = [t for t in root.iter("{http://www.w3.org/2000/svg}title") if "%" in (t.text or "")]
    assert len(tooltips) == len(picture.cells) == 18
    assert all(any(f"{n} " in texts for n in ("used", "zero")) for _ in STATES)
