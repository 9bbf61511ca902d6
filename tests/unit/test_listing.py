"""Listings from the cache say what the manifests say."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from bench.fleet import make_repository
from imager.errors import IntegrityError
from imager.listing import Summary, cache_folder, summaries
from imager.repository import Repository
from imager.retention import Rules, plan_prune
from tests.support.commandline import imager

MANY = 300


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("IMAGER_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    make_repository(tmp_path / "repo", MANY, 5)
    return Repository.open(str(tmp_path / "repo"))


def truth(repository: Repository) -> list[Summary]:
    return [Summary.of(manifest) for manifest in repository.manifests()]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    manifest = Repository.manifest

    def counted(self: Repository, image_id: str) -> object:
        read.append(image_id)
        return manifest(self, image_id)

    monkeypatch.setattr(Repository, "manifest", counted)
    return read


def test_what_is_cached_is_not_read_again(
    repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = truth(repository)
    read = count_reads(monkeypatch)
    for _ in range(2):
        assert summaries(repository, full=True) == expected and len(read) == MANY
    short = summaries(repository)
    assert [image._replace(more="") for image in expected] == short and len(read) == MANY
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert all(type(image) is Summary for image in summaries(repository))


def test_what_changed_is_seen(repository: Repository) -> None:
    summaries(repository)
    ids = repository.image_ids()
    repository.remove(ids[3])
    repository.pin(ids[4], "")
    damaged = Path(repository.store.url) / f"manifests/{ids[7]}.json"
    content = damaged.read_bytes()
    damaged.write_bytes(content.replace(b'"sda"', b'"sdb"'))
    errors: list[IntegrityError] = []
    found = summaries(repository, errors.append)
    assert [image.id for image in found] == [i for i in ids if i not in (ids[3], ids[7])]
    assert len(errors) == 1
    with pytest.raises(IntegrityError):
        summaries(repository)


def test_a_short_listing_keeps_the_rest_of_the_cache(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many images come, and a listing that did not read all of the cache writes it anew."""
    monkeypatch.setattr("imager.listing._LEAST_NEW", 10)
    removed = repository.image_ids()[:20]
    kept = {i: (tmp_path / f"repo/manifests/{i}.json").read_bytes() for i in removed}
    for image_id in removed:
        repository.remove(image_id)
    summaries(repository)
    for image_id, content in kept.items():
        (tmp_path / f"repo/manifests/{image_id}.json").write_bytes(content)
    summaries(repository)
    read = count_reads(monkeypatch)
    assert summaries(repository, full=True) == truth(repository)
    assert len(read) == MANY  # those of the truth


@pytest.mark.parametrize("content", ["", "[", "{}", "[[1]]", "null", "[[],[]]", '"x"'])
def test_a_damaged_cache_counts_for_nothing(
    repository: Repository, cache: Path, content: str
) -> None:
    summaries(repository)
    (file,) = cache.iterdir()
    for text in (content, f"{content}\n{content}\n"):
        file.write_text(text)
        assert summaries(repository, full=True) == truth(repository)


def test_a_cache_with_bytes_cut_off_counts_for_nothing(repository: Repository, cache: Path) -> None:
    summaries(repository)
    expected = truth(repository)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    pick = random.Random(3)
    for _ in range(20):
        file.write_bytes(content[: pick.randrange(len(content))])
        assert summaries(repository, full=True) == expected


def test_another_users_cache_is_not_trusted(
    repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summaries(repository)
    (file,) = cache.iterdir()
    file.chmod(0o666)
    read = count_reads(monkeypatch)
    summaries(repository)
    assert len(read) == MANY


def test_no_cache_for_few_images_and_none_where_none_can_be(
    repository: Repository, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image_id in repository.image_ids()[20:]:
        repository.remove(image_id)
    summaries(repository)
    assert not cache.exists()
    make_repository(tmp_path / "many", MANY, 5)
    monkeypatch.setenv("IMAGER_CACHE_DIR", "/proc/nowhere")
    assert len(summaries(Repository.open(str(tmp_path / "many")))) == MANY


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGER_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cache_folder() == Path("/x/imager")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cache_folder() == Path("/var/cache/imager")


def test_list_and_prune_are_the_same_with_a_cache(repository: Repository) -> None:
    words = ("--repo", repository.store.url, "--json")
    first, second = (imager("list", *words).out for _ in range(2))
    assert first == second and len(json.loads(first)) == MANY
    assert set(json.loads(first)[0]) >= {"id", "previous", "disks", "statistics", "consistency"}
    rules = Rules(last=2, daily=3)
    verdicts = plan_prune(repository, rules)
    assert len(verdicts) == MANY and sum(item.kept for item in verdicts) >= 10
    assert imager("gc", "--dry-run", *words).json["condemned"] == []
