"""Packs that were compacted: where their records are now (`docs/format.md`, "Moved packs")."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from imager.errors import FormatError
from imager.format import MAX_RECORDS, Place, pack_id_bytes, seal, unseal
from imager.manifest import new_document
from imager.store import ReadStore


def moved_name(pack_id: bytes) -> str:
    return f"moved/{pack_id.hex()}.json"


class MovedRun(NamedTuple):
    """``length`` records from ordinal ``first`` on lie in a row from ``place`` on."""

    first: int
    length: int
    place: Place


@dataclass(frozen=True)
class Moved:
    """A pack that is no more. Of its records, numbered up to ``records``, the runs tell those that
    are elsewhere; the others are gone."""

    pack: bytes
    records: int
    runs: tuple[MovedRun, ...]

    @classmethod
    def of(cls, pack: bytes, records: int, places: Iterable[tuple[int, Place]]) -> Moved:
        """From the ordinals that are kept, ascending, and their new places."""
        runs: list[MovedRun] = []
        for ordinal, place in places:
            last = runs[-1] if runs else None
            if last and (ordinal, place) == (
                last.first + last.length,
                Place(last.place.pack, last.place.ordinal + last.length),
            ):
                runs[-1] = last._replace(length=last.length + 1)
            else:
                runs.append(MovedRun(ordinal, 1, place))
        return cls(pack, records, tuple(runs))

    def places(self) -> Iterator[tuple[int, Place]]:
        """Ordinals of the records that are elsewhere, and where."""
        for first, length, (pack, ordinal) in self.runs:
            for n in range(length):
                yield first + n, Place(pack, ordinal + n)

    def targets(self) -> set[bytes]:
        """The packs that hold the records now, unless those were moved too."""
        return {run.place.pack for run in self.runs}

    def to_json(self) -> dict[str, Any]:
        runs = [[first, length, at.pack.hex(), at.ordinal] for first, length, at in self.runs]
        return {"pack": self.pack.hex(), "records": self.records, "runs": runs}

    def to_bytes(self) -> bytes:
        return seal(new_document("moved", **self.to_json()))

    @classmethod
    def from_json(cls, document: dict[str, Any], where: str) -> Moved:
        """Raises FormatError, naming ``where``, for what cannot be."""
        records, runs = document.get("records"), document.get("runs")
        if type(records) is not int or not 0 < records <= MAX_RECORDS or not isinstance(runs, list):
            raise FormatError(f"{where}: not a list of moved records")
        found, end = [], 0
        for item in runs:
            run = _parse_run(item, where)
            if run.first < end or run.first + run.length > records:
                raise FormatError(f"{where}: its runs are out of order")
            end = run.first + run.length
            found.append(run)
        return cls(pack_id_bytes(document.get("pack")), records, tuple(found))


def read_moved(store: ReadStore, pack_id: bytes) -> Moved:
    """Raises ObjectMissing when the pack was not moved, FormatError, UnsupportedError."""
    name = moved_name(pack_id)
    where = f"{store.url}/{name}"
    document = unseal(store.read(name), where)
    if document.get("kind") != "moved" or document.get("pack") != pack_id.hex():
        raise FormatError(f"{where} tells of something else")
    return Moved.from_json(document, where)


def moved_ids(names: Iterable[str]) -> Iterator[bytes]:
    """Ids of packs from names of objects in ``moved/``."""
    for name in names:
        stem = name.removeprefix("moved/").removesuffix(".json")
        if len(stem) == 32 and name == f"moved/{stem}.json":
            yield pack_id_bytes(stem)


def _parse_run(item: object, where: str) -> MovedRun:
    if isinstance(item, list) and len(item) == 4:
        first, length, pack, ordinal = item
        numbers = (first, length, ordinal)
        if all(type(n) is int and 0 <= n <= MAX_RECORDS for n in numbers) and length:
            return MovedRun(first, length, Place(pack_id_bytes(pack), ordinal))
    raise FormatError(f"{where}: not a run of records: {item!r}")
