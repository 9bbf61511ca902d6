"""The NBD server, spoken to byte by byte by a client written from the protocol document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.blocksource import PartSource
from imager.imagesource import ImageSource
from imager.repository import Repository
from imager.serve import ImageServer
from tests.support.nbdclient import NbdClient
from tests.unit.test_imagesource import BAD_SECTOR, CONTENT, SIZE, UNIT, make_image


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Exports ``disk``, and ``part``, a window of it."""
    folder = tmp_path_factory.mktemp("serve")
    Repository.create(str(folder / "repo"), block_size=UNIT)
    repository, disk = make_image(folder / "repo", bad={BAD_SECTOR})
    with ImageSource(repository, disk) as source:
        exports = {"disk": source, "part": PartSource(source, 4096, 10 * UNIT)}
        with ImageServer(exports, folder / "nbd"):
            yield folder / "nbd"


@pytest.mark.parametrize("structured", [False, True])
def test_reads_across_blocks(address: Path, structured: bool) -> None:
    with NbdClient(address, structured=structured) as client:
        info = client.go("disk")
        assert (info.size, info.block_sizes) == (SIZE, (1, 4096, 32 << 20))
        for offset, length in ((0, 1), (UNIT - 1, 2), (3, 9 * UNIT), (29 * UNIT, UNIT)):
            assert client.read(offset, length) == CONTENT[offset : offset + length]


def test_a_window(address: Path) -> None:
    with NbdClient(address) as client:
        assert client.go("part").size == 10 * UNIT
        assert client.read(UNIT, 2 * UNIT) == CONTENT[4096 + UNIT :][: 2 * UNIT]
