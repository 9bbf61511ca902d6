"""Proofs beside the manifests: kept in order, sealed, gone with their image."""

from __future__ import annotations

from pathlib import Path

import pytest

from imager.errors import IntegrityError
from imager.gc import collect
from imager.progress import NullProgress
from imager.proofs import (
    Evidence,
    Proof,
    evidence_names,
    latest_proof,
    latest_proofs,
    proofs_of,
    read_evidence,
    store_proof,
)
from imager.qemu import Hardware
from imager.repository import Repository, new_image_id
from tests.support.commandline import imager
from tests.support.disks import make_random


@pytest.fixture
def repository(repo: Path, tmp_path: Path) -> Repository:
    imager("capture", make_random(tmp_path / "disk.img", 200_000), "--repo", repo)
    return Repository.open(str(repo))


EVIDENCE = Evidence("web1 login: ", b"\x89PNG picture")


def test_a_proof_comes_back(repository: Repository) -> None:
    (image_id,) = repository.image_ids()
    given = Proof(image_id, "proved", sign="login", hardware=Hardware(bus="nvme"))
    stored = store_proof(repository, given, EVIDENCE)
    assert list(proofs_of(repository, image_id)) == [stored]
    assert stored.hardware == given.hardware
    assert read_evidence(repository, stored) == EVIDENCE
    assert latest_proofs(repository) == {image_id: stored}
    assert repository.manifest(image_id)


def test_without_evidence(repository: Repository) -> None:
    (image_id,) = repository.image_ids()
    stored = store_proof(repository, Proof(image_id, "failed"), Evidence())
    assert evidence_names(stored) == []
    assert read_evidence(repository, stored) == Evidence()


def test_many_within_a_second_are_in_order(repository: Repository) -> None:
    (image_id,) = repository.image_ids()
    for number in range(5):
        store_proof(repository, Proof(image_id, "failed", reason=str(number)), Evidence())
    store_proof(repository, Proof(image_id, "proved", level="filesystems"), Evidence())
    assert [proof.reason for proof in proofs_of(repository, image_id)][:5] == list("01234")
    newest = latest_proof(repository, image_id)
    assert newest is not None and newest.reason == "4"


def test_damage_is_found(repository: Repository, repo: Path) -> None:
    (image_id,) = repository.image_ids()
    first = store_proof(repository, Proof(image_id, "proved"), EVIDENCE)
    second = store_proof(repository, Proof(image_id, "failed"), EVIDENCE)
    (repo / evidence_names(first)[0]).write_bytes(b"web2 login: ")
    with pytest.raises(IntegrityError, match="not the evidence"):
        read_evidence(repository, first)
    document = repo / f"proofs/{image_id}/{second.id}.json"
    document.write_bytes(document.read_bytes().replace(b'"failed"', b'"proved"'))
    with pytest.raises(IntegrityError):
        list(proofs_of(repository, image_id))
    assert latest_proof(repository, image_id) == first  # the damaged one does not count


def test_they_go_with_their_image(repository: Repository, repo: Path) -> None:
    (image_id,) = repository.image_ids()
    store_proof(repository, Proof(image_id, "proved"), EVIDENCE)
    imager("rm", image_id, "--yes", "--repo", repo)
    assert list(repository.store.names("proofs")) == []


def test_a_gc_removes_what_an_interrupted_removal_left(repository: Repository) -> None:
    (image_id,) = repository.image_ids()
    kept = store_proof(repository, Proof(image_id, "proved"), EVIDENCE)
    store_proof(repository, Proof(new_image_id(), "proved"), EVIDENCE)
    collect(repository, NullProgress())
    assert latest_proofs(repository) == {image_id: kept}
    assert len(list(repository.store.names("proofs"))) == 3


def test_list_and_show(repository: Repository, repo: Path) -> None:
    (image_id,) = repository.image_ids()
    assert "proof" not in imager("list", "--json", "--repo", repo).json[0]
    store_proof(repository, Proof(image_id, "failed", reason="a panic"), EVIDENCE)
    assert "BOOT-FAILED" in imager("list", "--repo", repo).out
    store_proof(repository, Proof(image_id, "proved", sign="login", milliseconds=900), EVIDENCE)
    assert "PROVED" in imager("list", "--repo", repo).out
    assert imager("list", "--json", "--repo", repo).json[0]["proof"]["verdict"] == "proved"
    shown = imager("show", image_id, "--repo", repo).out
    assert "FAILED after 0.0 s: a panic" in shown
    assert "PROVED: login seen after 0.9 s" in shown
    told = imager("show", image_id, "--json", "--repo", repo).json["proofs"]
    assert [proof["verdict"] for proof in told] == ["failed", "proved"]
