"""The judgement: what goes wrong only without the unused bytes shows that one of them is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

from imager.allocation.model import all_used
from imager.blocksource import BlockSource, PartSource
from imager.checkers import CHECKERS, Checker, Opinion, Surplus, check
from imager.coverage.files import Reading, mounted, read_all, surplus
from imager.coverage.inside import Holding, contents, is_container
from imager.coverage.view import View, ViewUnavailable, open_view
from imager.errors import ImagerError, ToolError
from imager.extents import Extent, Extents
from imager.layout import DiskLayout, Proof, Verdict, Volume


def prove_layouts(disks: Sequence[tuple[BlockSource, DiskLayout]]) -> list[DiskLayout]:
    """The layouts of disks that are captured together, with a proof in every volume; where it
    failed, with all of the volume used."""
    holdings = [[_holding(source, v) for v in layout.volumes] for source, layout in disks]
    everything = [holding for disk in holdings for holding in disk]
    return [
        replace(layout, volumes=tuple(map(_proved, layout.volumes, found, repeat(everything))))
        for (_, layout), found in zip(disks, holdings, strict=True)
    ]


def prove(holding: Holding, others: Sequence[Holding] = ()) -> Proof:
    """Prove the map of a partition, which must not change meanwhile.

    ``others``: what is captured together with it. The source is only read: checkers and the
    kernel work on a view of it. Takes as long as checking the filesystem and reading all of its
    files.
    """
    filesystem = holding.filesystem
    if holding.allocation.used.covers(0, holding.source.size):
        return Proof("nothing to prove", "all of it is used")
    if filesystem.kind == "swap":
        return Proof("nothing to prove", "swap space keeps nothing")
    if is_container(filesystem):
        return _prove_contents(holding, others)
    member = filesystem.member_of
    if member is not None and member.members != 1:
        return Proof("not proved", "it lies on several devices, and a proof takes one")
    checker = CHECKERS.get(filesystem.kind)
    if checker is None:
        return Proof("not proved", f"there is no checker for {filesystem.kind}")
    if not checker.is_installed():
        return Proof("not proved", f"{checker.command[0]} is missing: install {checker.package}")
    try:
        return _judge(_Trial(holding, checker))
    except ViewUnavailable as error:
        return Proof("not proved", error.message)


def _holding(source: BlockSource, volume: Volume) -> Holding:
    part = PartSource(source, volume.offset, volume.size)
    return Holding(part, volume.filesystem, volume.allocation, part)


def _proved(volume: Volume, holding: Holding, others: Sequence[Holding]) -> Volume:
    proof = prove(holding, others)
    allocation = volume.allocation
    if proof.verdict == "failed":
        allocation = all_used(holding.source, "the map failed its proof")
    return replace(volume, allocation=allocation, proof=proof)


def _prove_contents(container: Holding, others: Sequence[Holding]) -> Proof:
    """Of all that is in it the worst verdict."""
    try:
        inside = contents(container, others)
    except (ImagerError, OSError) as error:
        return Proof("failed", f"{container.filesystem.kind} cannot be read: {error}")
    proofs = [(holding, prove(holding)) for holding in inside]
    if not proofs:
        return Proof("not proved", f"of what this {container.filesystem.kind} holds is no map")
    worst = max((proof.verdict for _, proof in proofs), key=_BY_DOUBT.index)
    text = "; ".join(f"{holding.source.path}: {proof.text}" for holding, proof in proofs)
    return Proof(worst, text)


_BY_DOUBT: tuple[Verdict, ...] = ("nothing to prove", "proved", "not proved", "failed")


@dataclass(frozen=True)
class _Trial:
    holding: Holding
    checker: Checker

    @property
    def kind(self) -> str:
        return self.holding.filesystem.kind

    def filler(self, surplus: Surplus) -> Extents:
        """The unused bytes that must read as something, for a tool that reads so much more."""
        size, filesystem = self.holding.source.size, self.holding.filesystem
        unused = self.holding.allocation.used.complement(size)
        if surplus == "anything":
            return unused
        if surplus != "last block":
            return Extents()
        end = min(filesystem.size or size, size)
        start = max(end - (filesystem.block_size or 0), 0)
        return unused.clip(start, end - start)


@dataclass(frozen=True)
class _Check:
    """A checker's run, and the unused bytes that it asked for."""

    opinion: Opinion
    misses: list[Extent]


@dataclass(frozen=True)
class _Sweep:
    """All files read, or the reason why not; and the unused bytes that were asked for."""

    reading: Reading | None
    reason: str
    misses: list[Extent]


@dataclass(frozen=True)
class _Evidence:
    """What happened with a view."""

    checks: tuple[_Check, ...]
    """The second is after a replay."""
    sweep: _Sweep

    @property
    def place(self) -> str:
        """Words for the first unused byte that was asked for."""
        misses = [*(miss for check in self.checks for miss in check.misses), *self.sweep.misses]
        return f" (byte {misses[0].offset} of the partition is needed)" if misses else ""


def _judge(trial: _Trial) -> Proof:
    sparse = _examine(trial, whole=False)
    doubts = _doubts(trial, sparse)
    if not doubts and sparse.sweep.reading is not None:
        return Proof("proved", f"{trial.checker.line}, and {sparse.sweep.reading.files} files read")
    fault = _new_fault(trial, sparse, _examine(trial, whole=True))
    if fault is not None:
        return Proof("failed", f"{fault}{sparse.place}")
    return Proof("not proved", "; ".join(doubts))


def _doubts(trial: _Trial, evidence: _Evidence) -> list[str]:
    """Why the evidence is no proof. Before a replay, checkers may complain."""
    doubts = []
    if _asked_for_more(trial, evidence):
        doubts.append(f"{trial.checker.line} reads unused bytes")
    if not evidence.checks[-1].opinion.clean:
        doubts.append(f"{trial.checker.line} finds faults, with the unused bytes too")
    if evidence.sweep.reading is None:
        passed = "" if doubts else f"{trial.checker.line} finds no fault, but "
        doubts.append(f"{passed}the files cannot be read: {evidence.sweep.reason}")
    elif complaints := evidence.sweep.reading.complaints:
        count, first = len(complaints), min(complaints)
        doubts.append(f"{count} files are unreadable, with the unused bytes too: {first}")
    return doubts


def _new_fault(trial: _Trial, sparse: _Evidence, whole: _Evidence) -> str | None:
    """What went wrong with the sparse view and not with the whole one."""
    for found, expected in zip(sparse.checks, whole.checks, strict=True):
        new = _new_lines(found.opinion, expected.opinion)
        if not found.opinion.clean and (expected.opinion.clean or new):
            return f"the checker says: {(new or ['that it is damaged'])[0]}"
    if _asked_for_more(trial, sparse):
        return f"{trial.checker.line} reads unused bytes, and says nothing of it"
    found_files, expected_files = sparse.sweep.reading, whole.sweep.reading
    if expected_files is None:
        return None
    if found_files is None:
        return f"it cannot be mounted: {sparse.sweep.reason}"
    new_complaints = sorted(found_files.complaints - expected_files.complaints)
    return f"unreadable: {new_complaints[0]}" if new_complaints else None


def _asked_for_more(trial: _Trial, evidence: _Evidence) -> bool:
    """Whether a checker that reads only what it needs met an error, said or not.

    While something is mounted that can't be told: other programs look at new devices.
    """
    return trial.checker.surplus == "nothing" and any(check.misses for check in evidence.checks)


def _new_lines(found: Opinion, expected: Opinion) -> list[str]:
    known = {"", *map(str.strip, expected.output.splitlines())}
    return [line for line in map(str.strip, found.output.splitlines()) if line not in known]


def _examine(trial: _Trial, *, whole: bool) -> _Evidence:
    """Check and read the volume without its unused bytes, or, to compare, with them."""
    return _Evidence(tuple(_checks(trial, whole)), _sweep(trial, whole))


def _open(trial: _Trial, whole: bool, surplus: Surplus) -> AbstractContextManager[View]:
    holding = trial.holding
    if whole:
        return open_view(holding.source, Extents.whole(holding.source.size))
    return open_view(holding.bare, holding.allocation.used, trial.filler(surplus))


def _checks(trial: _Trial, whole: bool) -> Iterator[_Check]:
    with _open(trial, whole, trial.checker.surplus) as view:
        yield _Check(check(trial.checker, view.path), view.misses())
        if trial.holding.allocation.certainty == "union":
            with suppress(ToolError), _mounted(trial, view):
                pass
            view.misses()
            yield _Check(check(trial.checker, view.path), view.misses())


def _sweep(trial: _Trial, whole: bool) -> _Sweep:
    with _open(trial, whole, surplus(trial.kind)) as view:
        try:
            with _mounted(trial, view) as folder:
                reading = read_all(folder, view.token)
        except ToolError as error:
            return _Sweep(None, _gist(error), view.misses())
        return _Sweep(reading, "", view.misses())


def _gist(error: ToolError) -> str:
    """What a program said last of the path that it was given: the path is gone by now."""
    command, *said = error.message.splitlines()
    return (said or [command])[0].split(": ")[-1].strip().rstrip(".")


def _mounted(trial: _Trial, view: View) -> AbstractContextManager[Path]:
    return mounted(view.path, trial.kind, trial.holding.source.logical_sector)
