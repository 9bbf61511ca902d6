"""What a medium carries: exactly what its images need, split over volumes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from bootmedia.carried import CarriedImages, split_volumes
from imager.carry import StoredObject, fetch, objects_of, source_file
from imager.errors import IntegrityError, ObjectMissing, UsageError
from imager.repository import Repository
from imager.store.local import LocalStore
from imager.store.union import UnionStore, VolumeMissing
from tests.support.commandline import imager
from tests.support.httpserver import range_server


def capture(folder: Path, disk: Path, seed: int) -> str:
    disk.write_bytes(random.Random(seed).randbytes(2 << 20) + bytes(1 << 20))
    imager("capture", disk, "--repo", folder, "--init", "--name", f"host{seed}")
    return Repository.open(str(folder)).image_ids()[-1]


def test_an_image_restores_from_just_its_objects(tmp_path: Path) -> None:
    folder, disk = tmp_path / "images", tmp_path / "disk"
    capture(folder, tmp_path / "other", 1)
    image = capture(folder, disk, 2)
    with range_server(folder) as url:
        repository = Repository.open(url)
        objects = objects_of(repository, [repository.manifest(image)])
        assert [item.name for item in objects[:2]] == [
            "repository.json",
            f"manifests/{image}.json",
        ]
        # the two small ones, the map's pack, and packs of blocks
        assert [item.everywhere for item in objects] == [True] * 3 + [False] * (len(objects) - 3)
        for item in objects:
            source_file(repository.store, item, tmp_path / "carried")
    assert len(objects) < len([path for path in folder.rglob("*") if path.is_file()])
    target = tmp_path / "target"
    target.touch()
    imager("restore", image, target, "--repo", tmp_path / "carried", "--yes")
    assert target.read_bytes() == disk.read_bytes()
    imager("verify", "--repo", tmp_path / "carried")


def test_shared_objects_are_carried_once(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    ids = [capture(folder, tmp_path / "disk", seed) for seed in (1, 1)]
    repository = Repository.open(str(folder))
    objects = objects_of(repository, map(repository.manifest, ids))
    names = [item.name for item in objects]
    assert len(names) == len(set(names))
    assert all(item.size == (folder / item.name).stat().st_size for item in objects)


def test_a_lost_pack_is_found_before_the_medium_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    image = capture(folder, tmp_path / "disk", 1)
    shutil.rmtree(folder / "packs")
    repository = Repository.open(str(folder))
    with pytest.raises(ObjectMissing):
        objects_of(repository, [repository.manifest(image)])


def test_volumes_hold_all_and_are_one_repository(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    ids = [capture(folder, tmp_path / "disk", seed) for seed in (1, 2)]
    repository = Repository.open(str(folder))
    objects = objects_of(repository, map(repository.manifest, ids))
    carried = CarriedImages(
        (), tuple(objects), lambda item: source_file(repository.store, item, tmp_path)
    )
    (whole,) = carried.volumes(None)
    assert [file.path for file in whole] == [f"images/{item.name}" for item in objects]
    volumes = carried.volumes(max(item.size for item in objects) + 40_000)
    assert len(volumes) > 1
    for number, volume in enumerate(volumes):
        for file in volume:
            assert isinstance(file.source, Path)
            target = tmp_path / f"volume{number}" / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.source, target)
    stores = [LocalStore(tmp_path / f"volume{n}/images") for n in range(len(volumes))]
    for item in objects:
        assert UnionStore(stores).size(item.name) == item.size
    with pytest.raises(VolumeMissing):
        for item in objects:
            UnionStore(stores[:1]).size(item.name)


def test_first_fits_in_order() -> None:
    small = StoredObject("repository.json", 100, True)
    packs = [StoredObject(f"packs/{n}", 10_000, False) for n in range(5)]
    volumes = split_volumes([small, *packs], 30_000)
    assert [[item.name for item in volume] for volume in volumes] == [
        ["repository.json", "packs/0", "packs/1"],
        ["repository.json", "packs/2", "packs/3"],
        ["repository.json", "packs/4"],
    ]
    with pytest.raises(UsageError, match="no room for packs/0"):
        split_volumes([small, *packs], 12_000)
    with pytest.raises(UsageError, match="below 4 GiB"):
        split_volumes([StoredObject("packs/x", 4 << 30, False)], None)


def test_a_copy_that_is_cut_short_is_found(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "images")
    store.create("packs/a", b"content")
    with pytest.raises(IntegrityError, match="packs/a"):
        fetch(store, StoredObject("packs/a", 8, False), tmp_path / "copy")
