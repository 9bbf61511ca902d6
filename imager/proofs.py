"""Proofs: what came of booting an image, kept beside its manifest (`docs/format.md`, "Proofs").

An image is never changed by them, and they go when it is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from imager.errors import IntegrityError, ObjectMissing
from imager.format import digest_of, seal, unseal
from imager.jsonrecord import JsonRecord
from imager.manifest import new_document
from imager.qemu import Hardware
from imager.repository import PROOFS, Repository, new_image_id


@dataclass(frozen=True)
class Proof(JsonRecord):
    """One try. ``verdict`` is "proved", "failed" or "not tried" (never stored); ``cause`` of a
    failure is a word for programs (`docs/prove.md`), ``reason`` the words for people."""

    image: str
    verdict: str
    level: str = "boot"
    """"boot", "filesystems" or "coverage"."""
    id: str = ""
    """Sorts by time; empty while it is not stored."""
    time: str = ""
    sign: str = ""
    cause: str = ""
    reason: str = ""
    milliseconds: int = 0
    acceleration: str = ""
    hardware: Hardware | None = None
    tool: str = ""
    console_digest: str = ""
    picture_digest: str = ""
    """Digests of the evidence; empty when there is none."""

    @property
    def proved(self) -> bool:
        return self.verdict == "proved"

    @property
    def words(self) -> str:
        """The verdict in a line, without the image."""
        took = f"{self.milliseconds / 1000:.1f} s"
        if self.verdict == "not tried":
            return f"NOT TRIED: {self.reason}"
        if not self.proved:
            return f"FAILED after {took}: {self.reason}"
        what = f"{self.sign} seen" if self.level == "boot" else self.reason
        return f"PROVED: {what} after {took}"


@dataclass(frozen=True)
class Evidence:
    """What was seen: the console's text, and the last screen as a PNG."""

    console: str = ""
    picture: bytes | None = None


def new_proof_id() -> str:
    """Proofs of one second are in order too, and no two have one name."""
    return new_image_id()


def store_proof(repository: Repository, proof: Proof, evidence: Evidence) -> Proof:
    """Store a proof and its evidence; the document comes last, so it is never without."""
    proof_id = proof.id or new_proof_id()
    base = _base(proof.image, proof_id)
    console = evidence.console.encode(errors="replace")
    if console:
        repository.store.create(f"{base}.log", console)
    if evidence.picture:
        repository.store.create(f"{base}.png", evidence.picture)
    stored = replace(
        proof,
        id=proof_id,
        console_digest=digest_of(console).hex() if console else "",
        picture_digest=digest_of(evidence.picture).hex() if evidence.picture else "",
    )
    repository.store.create(f"{base}.json", seal(new_document("proof", **stored.to_json())))
    return stored


def proofs_of(repository: Repository, image_id: str) -> Iterator[Proof]:
    """All proofs of an image, oldest first. Raises IntegrityError for a damaged one."""
    for name in list(repository.store.names(f"{PROOFS}/{image_id}")):
        if name.endswith(".json"):
            with suppress(ObjectMissing):  # removed meanwhile
                yield _read(repository, name, image_id)


def latest_proof(repository: Repository, image_id: str, level: str = "boot") -> Proof | None:
    """The newest of a level; damaged ones don't count."""
    for name in reversed(list(repository.store.names(f"{PROOFS}/{image_id}"))):
        if name.endswith(".json"):
            with suppress(ObjectMissing, IntegrityError):
                proof = _read(repository, name, image_id)
                if proof.level == level:
                    return proof
    return None


def latest_proofs(repository: Repository) -> dict[str, Proof]:
    """The newest boot proof of each image that has one: by one look at the names."""
    images = {name.split("/")[1] for name in repository.store.names(PROOFS)}
    found = {image_id: latest_proof(repository, image_id) for image_id in sorted(images)}
    return {image_id: proof for image_id, proof in found.items() if proof is not None}


def read_evidence(repository: Repository, proof: Proof) -> Evidence:
    """Raises IntegrityError when it is not what the proof was given for, ObjectMissing."""
    base = _base(proof.image, proof.id)
    console = _read_checked(repository, f"{base}.log", proof.console_digest)
    picture = _read_checked(repository, f"{base}.png", proof.picture_digest)
    return Evidence((console or b"").decode(errors="replace"), picture)


def evidence_names(proof: Proof) -> list[str]:
    """Of the objects that hold it."""
    base = _base(proof.image, proof.id)
    ends = [(".log", proof.console_digest), (".png", proof.picture_digest)]
    return [base + ending for ending, digest in ends if digest]


def remove_orphans(repository: Repository, images: set[str]) -> None:
    """Those of images that are gone: a removal was interrupted."""
    proved = {name.split("/")[1] for name in repository.store.names(PROOFS)}
    for image_id in sorted(proved - images):
        repository.remove_proofs(image_id)


def _base(image_id: str, proof_id: str) -> str:
    return f"{PROOFS}/{image_id}/{proof_id}"


def _read(repository: Repository, name: str, image_id: str) -> Proof:
    where = f"{repository.store.url}/{name}"
    document = unseal(repository.store.read(name), where)
    proof = Proof.from_json(document)
    if document.get("kind") != "proof" or proof.image != image_id:
        raise IntegrityError(f"{where} is no proof of this image")
    return proof


def _read_checked(repository: Repository, name: str, digest: str) -> bytes | None:
    if not digest:
        return None
    content = repository.store.read(name)
    if digest_of(content).hex() != digest:
        raise IntegrityError(f"{repository.store.url}/{name} is not the evidence of its proof")
    return content
