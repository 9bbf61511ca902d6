"""Which images the rules keep."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager.errors import UsageError
from imager.proofs import Evidence, Proof, store_proof
from imager.repository import Repository
from imager.retention import Rules, Snapshot, judge
from tests.support.commandline import imager
from tests.support.disks import make_random

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)  # a Tuesday


def snapshot(age: timedelta, *, name: str = "web", whole: bool = True) -> Snapshot:
    created = NOON - age
    return Snapshot(f"{created:%Y%m%dt%H%M%Sz}-{name}", name, "host", ("sda",), created, whole)


def hours(*ages: float, name: str = "web") -> list[Snapshot]:
    return [snapshot(timedelta(hours=age), name=name) for age in ages]


def kept(snapshots: list[Snapshot], rules: Rules, *pinned: str) -> list[float]:
    """Ages in hours of what is kept, the newest first."""
    verdicts = judge(snapshots, rules, pinned)
    return [(NOON - item.snapshot.created) / timedelta(hours=1) for item in verdicts if item.kept]


@pytest.mark.parametrize(
    "rules, ages, expected",
    [
        (Rules(last=2), (0, 1, 2, 3), [0, 1]),
        (Rules(hourly=2), (0, 0.2, 0.9, 1.5, 5), [0, 0.2]),
        (Rules(daily=2), (0, 1, 13, 14, 40), [0, 13]),
        (Rules(weekly=2), (0, 24, 36.5, 40, 24 * 9), [0, 36.5]),
        (Rules(monthly=2), (0, 24 * 23, 24 * 24, 24 * 90), [0, 24 * 24]),
        (Rules(yearly=5), (0, 24 * 100, 24 * 365, 24 * 400), [0, 24 * 365]),
        # periods without an image do not count
        (Rules(daily=2), (0, 24 * 50, 24 * 51), [0, 24 * 50]),
        (Rules(last=1, daily=2), (0, 1, 24), [0, 24]),
    ],
)
def test_rules(rules: Rules, ages: tuple[float, ...], expected: list[float]) -> None:
    assert kept(hours(*ages), rules) == expected


def test_reasons_are_told() -> None:
    first, second = judge(hours(0, 1), Rules(last=1, hourly=1), ())
    assert first.reasons == ("last", "hourly")
    assert not second.kept


def test_names_hosts_and_disks_are_groups() -> None:
    other = Snapshot("x", "web", "host", ("sda", "sdb"), NOON - timedelta(hours=9), True)
    snapshots = [*hours(0, 1), *hours(5, 6, name="mail"), other]
    assert sorted(kept(snapshots, Rules(last=1))) == [0, 5, 9]


def test_pinned_stay() -> None:
    snapshots = hours(0, 1, 2)
    assert kept(snapshots, Rules(last=1), snapshots[2].id) == [0, 2]


def test_the_newest_proved_one_stays() -> None:
    snapshots = hours(0, 1, 2, 3)
    verdicts = judge(snapshots, Rules(last=1), (), {snapshots[2].id, snapshots[3].id})
    assert [item.reasons for item in verdicts] == [("last",), (), ("newest proved",), ()]


def test_the_newest_whole_one_stays() -> None:
    holes = [snapshot(timedelta(hours=age), whole=False) for age in (0, 1)]
    verdicts = judge([*holes, *hours(2, 3)], Rules(last=1), ())
    assert [item.reasons for item in verdicts] == [("last",), (), ("newest whole",), ()]


@pytest.mark.parametrize("counts", [{}, {"last": 0}, {"daily": 0, "last": 0}])
def test_no_rule_is_refused(counts: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="no rule"):
        Rules(**counts)
    with pytest.raises(UsageError, match="negative"):
        Rules(last=-1)


@given(
    st.lists(st.integers(0, 24 * 800), min_size=1, max_size=60, unique=True),
    st.integers(1, 5),
    st.integers(0, 5),
)
def test_more_rules_keep_no_less(ages: list[int], last: int, daily: int) -> None:
    snapshots = hours(*ages)
    few, more = kept(snapshots, Rules(last=last)), kept(snapshots, Rules(last=last, daily=daily))
    assert set(few) <= set(more)
    assert len(few) == min(last, len(ages))


def test_prune_on_the_command_line(tmp_path: Path) -> None:
    repo, disk = tmp_path / "repo", make_random(tmp_path / "disk", 1 << 20)
    imager("repo", "init", "--repo", repo)
    ids = []
    for _ in range(3):
        said = imager("capture", disk, "--repo", repo, "--name", "web", "--json").out
        ids.append(json.loads(said)["image"])
    imager("pin", ids[0], "--repo", repo)
    imager("rm", ids[0], "--yes", "--repo", repo, code=4)
    imager("prune", "--repo", repo, "--yes", code=2)
    words = ("prune", "--keep-last", 1, "--repo", repo, "--json", "--yes")
    document = json.loads(imager(*words, "--dry-run").out)
    assert document["removed"] == [ids[1]] and document["dry_run"]
    assert len(json.loads(imager("list", "--repo", repo, "--json").out)) == 3
    document = json.loads(imager(*words).out)
    assert document["kept"] == {ids[2]: ["last"], ids[0]: ["pinned"]}
    left = [item["id"] for item in json.loads(imager("list", "--repo", repo, "--json").out)]
    assert left == [ids[0], ids[2]]
    proof = Proof(image=ids[0], verdict="proved")
    store_proof(Repository.open(str(repo)), proof, Evidence("login:"))
    imager("unpin", ids[0], "--repo", repo)
    assert json.loads(imager(*words).out)["kept"] == {ids[2]: ["last"], ids[0]: ["newest proved"]}
    store_proof(Repository.open(str(repo)), replace(proof, image=ids[2]), Evidence())
    assert json.loads(imager(*words).out)["removed"] == [ids[0]]
    assert "all sound" in imager("verify", "--repo", repo).out
