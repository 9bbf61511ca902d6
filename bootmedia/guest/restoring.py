"""A restore as every terminal does it: find out, say it in words, carry it out, make it boot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bootmedia.guest import afterwards
from bootmedia.guest.diskwords import disk_words
from bootmedia.guest.session import Found, Session
from imager.compatibility import Comparison, Reason, Severity, compare
from imager.errors import RefusedError
from imager.fingerprint import read_fingerprint
from imager.imagemount import read_image_drivers
from imager.manifest import Disk, Manifest
from imager.plan import MAY_NOT_BOOT, RestoreOptions, RestorePlan, plan_restore
from imager.progress import Progress
from imager.repository import Repository
from imager.restore import RestoreResult, restore
from imager.units import show_bytes


@dataclass(frozen=True)
class Prepared:
    """A disk of an image on its way to a target; nothing was written yet."""

    found: Found
    disk: Disk
    target: str
    plan: RestorePlan
    comparison: Comparison

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why it must not be carried out. A machine that it won't boot in is not among them."""
        return self.plan.refusals

    @property
    def all_refusals(self) -> tuple[str, ...]:
        """With such a machine among them."""
        blockers = self.comparison.of("blocker")
        hardware = (f"it will not boot in this machine: {reason}" for reason in blockers)
        return (*self.refusals, *hardware)


def prepare(
    session: Session, found: Found, disk: Disk, target: str, options: RestoreOptions
) -> Prepared:
    """Raises RefusedError for the medium and for a disk that holds a repository, ImagerError
    where there is nothing to plan with."""
    if reason := session.reserved(target):
        raise RefusedError([f"{target}: {reason}"])
    session.survey_volumes(found)
    plan = plan_restore(found.repository, found.manifest, disk, target, options)
    with session.without_asking():  # its files lie all over the volumes
        comparison = _compare(found.repository, found.manifest, disk, plan)
    return Prepared(found, disk, target, plan, comparison)


def _compare(
    repository: Repository, manifest: Manifest, disk: Disk, plan: RestorePlan
) -> Comparison:
    own = read_image_drivers(repository, manifest)
    here = read_fingerprint()
    comparison = compare(manifest, disk, here, plan.identity, own.drivers, own.aliases)
    if own.reason is None:
        return comparison
    note = Reason("note", "drivers", f"judged by the imaged machine alone: {own.reason}")
    return replace(comparison, reasons=(*comparison.reasons, note))


# --- in words -----------------------------------------------------------------------------------


def describe(prepared: Prepared) -> list[str]:
    """Paragraphs for people, whom they tell all that the restore would do and why it may not."""
    return [
        *_what(prepared),
        *_overwritten(prepared.plan),
        *_listed("Steps:", prepared.plan.steps),
        *_listed("Not in the image:", prepared.plan.missing),
        *_listed("Warnings:", _warnings(prepared.plan)),
        *_listed(f"In this machine: {prepared.comparison.verdict}.", _reasons(prepared.comparison)),
        *_listed("Refused:", prepared.refusals),
    ]


def _what(prepared: Prepared) -> Iterator[str]:
    plan, manifest = prepared.plan, prepared.found.manifest
    words = [manifest.id, manifest.name, manifest.host and f"of {manifest.host}", manifest.created]
    yield f"Image:  {' '.join(filter(None, words))}"
    yield f"        {prepared.found.origin.title}"
    yield (
        f"Disk:   {prepared.disk.name}, {show_bytes(prepared.disk.size)}, "
        f"{show_bytes(plan.data_bytes)} of data in {plan.packs} packs"
    )
    yield f"Target: {disk_words(replace(plan.identity, path=plan.target))}"
    if plan.resumes:
        yield "        this restore was begun there before: it is gone on with"


def _overwritten(plan: RestorePlan) -> Iterator[str]:
    if plan.overwrites:
        yield from _listed("Overwritten on the target:", plan.overwrites)
    elif plan.target_exists:
        yield "The target has no partitions and no filesystem that are known."


def _warnings(plan: RestorePlan) -> list[str]:
    """Without the plan's own judgement of the machine, made without the image's drivers: see
    ``Prepared.comparison``."""
    return [text for text in plan.warnings if not text.startswith(MAY_NOT_BOOT)]


def _reasons(comparison: Comparison) -> list[str]:
    severities: tuple[Severity, ...] = ("blocker", "attention", "note")
    return [str(reason) for severity in severities for reason in comparison.of(severity)]


def _listed(title: str, items: tuple[str, ...] | list[str]) -> Iterator[str]:
    if items or title.endswith("."):
        yield title
        yield from (f"  - {item}" for item in items)


# --- at work ------------------------------------------------------------------------------------


def carry_out(
    session: Session, prepared: Prepared, progress: Progress, *, despite_hardware: bool = False
) -> list[str]:
    """Returns paragraphs about what was done, and what its owner has to know.

    Raises RefusedError when the plan has refusals, or the disk would not boot in this machine and
    that was not accepted by ``despite_hardware``; otherwise as ``imager.restore``.
    """
    if reasons := prepared.refusals if despite_hardware else prepared.all_refusals:
        raise RefusedError(list(reasons))
    found, plan = prepared.found, prepared.plan
    result = restore(found.repository, found.manifest, prepared.disk, plan, progress)
    lines = list(_summary(prepared, result))
    for line in lines:
        session.log.add(line)
    lines += afterwards.finish(
        found.manifest,
        prepared.disk,
        plan,
        plan.target,
        fill_fallback=session.job.fill_fallback,
        boot_entry=session.job.boot_entry,
        log=session.log.add,
    )
    return lines


def _summary(prepared: Prepared, result: RestoreResult) -> Iterator[str]:
    kept = f", {show_bytes(result.kept_bytes)} were there already" if result.kept_bytes else ""
    yield (
        f"{prepared.disk.name} of {prepared.found.manifest.id} is restored to "
        f"{prepared.plan.target}: {show_bytes(result.written_bytes)} written{kept}"
    )
    if prepared.plan.options.read_back:
        yield "it was read back and is what the image says"
    if result.grown_to is not None:
        yield f"the last partition or filesystem was grown to {show_bytes(result.grown_to)}"
    for text in result.missing:
        yield f"not in the image, so zeros on the target: {text}"
