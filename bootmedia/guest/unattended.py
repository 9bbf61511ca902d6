"""A restore that no person began: told by the medium, safe or not done at all.

What would be written where is found out and shown first; then the countdown, during which any key
leads to the menu. Whatever fails becomes an exit code and a line on every console.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from bootmedia.guest import system
from bootmedia.guest.allterminals import AllTerminals
from bootmedia.guest.console import Terminal
from bootmedia.guest.medium import eject, find_medium
from bootmedia.guest.report import Result, post
from bootmedia.guest.restoring import Prepared, carry_out, describe, prepare
from bootmedia.guest.session import Found, Session
from bootmedia.guest.targets import Candidate, candidates, choose_target
from bootmedia.job import TargetRule, Unattended
from imager.errors import ImagerError, IntegrityError, RefusedError
from imager.manifest import Disk, Manifest
from imager.partitions import smallest_disk
from imager.plan import RestoreOptions

# The network comes up by itself (link, DHCP), disks on USB as well.
_WAIT_SECONDS = 60
_LOOK_AGAIN_SECONDS = 2

# For somebody who watches to read why.
_BACK_SECONDS = 30

# Somebody has to come and change the disc.
_VOLUME_SECONDS = 1800

_DONE, _FAILED, _PARTIAL, _STOPPED = 0, 1, 5, 130


class _Stopped(Exception):
    """A key was pressed before anything was written."""


def run(session: Session, terminals: Sequence[Terminal]) -> int:
    """The exit code, as the command line's: 0 done, 1 failed, 3 damaged, 4 refused, 5 the image
    lacks some of the data; 130 when a key was pressed. Raises nothing."""
    return _run(session, terminals).run()


def ending(session: Session, terminals: Sequence[Terminal]) -> str | None:
    """Run it; how the machine is to end then, "reboot" or "poweroff", or None when a person is to
    go on. Raises nothing."""
    run = _run(session, terminals)
    code = run.run()
    if code == _DONE:
        return run.job.then
    return "reboot" if code != _STOPPED and run.goes_back() else None


def _run(session: Session, terminals: Sequence[Terminal]) -> _Run:
    job = session.job.unattended
    assert job is not None, "the caller asks only a medium that has an unattended restore"
    return _Run(session, job, AllTerminals(terminals))


class _Run:
    def __init__(self, session: Session, job: Unattended, everyone: AllTerminals) -> None:
        self._session, self.job, self._everyone = session, job, everyone
        self._begun = False
        self._prepared: list[Prepared] = []
        self._image = job.image
        self._left_out: tuple[str, ...] = ()

    def run(self) -> int:
        code, reason = self._outcome()
        result = Result(code, self._image, tuple(map(_target_words, self._prepared)), reason)
        system.announce(result.line())
        self._everyone.show(["", f"Unattended restore: {reason}"])
        if code == _STOPPED:
            return code
        if url := self.job.report_url:
            post(url, result, self._session.job.medium_id, self._session.log.add)
        if code and not self._may_go_back:
            self._everyone.show(["The machine stays on: the menu follows."])
        return code

    def goes_back(self) -> bool:
        """Whether the machine is to start its own system again, as nothing was written to it: when
        the job says so, and no key is pressed."""
        if not self._may_go_back:
            return False
        text = f"Nothing was written. The machine starts its own system in {_BACK_SECONDS} s;"
        self._everyone.show([f"{text} any key stops that and leads to the menu."])
        return not self._everyone.key_pressed(_BACK_SECONDS)

    @property
    def _may_go_back(self) -> bool:
        return self.job.back and not self._begun

    def _outcome(self) -> tuple[int, str]:
        """Exit code and reason."""
        try:
            with self._session.work("unattended restore"):
                self._restore()
        except _Stopped:
            return _STOPPED, "a key was pressed, nothing was written"
        except KeyboardInterrupt:
            return _STOPPED, "stopped by Ctrl-C: the target is not complete"
        except ImagerError as error:
            self._session.log.add_error(error)
            return error.exit_code, error.message
        except Exception as error:
            self._session.log.add_error(error)
            return _FAILED, f"an error of the program itself: {error!r}"
        rest = f"; left out, as told: {', '.join(self._left_out)}" if self._left_out else ""
        if any(item.plan.missing for item in self._prepared):
            missing = "restored, but for what could not be read when the image was made"
            return _PARTIAL, missing + rest
        return _DONE, ("rolled back" if self.job.delta else "restored and read back") + rest

    def _restore(self) -> None:
        before, self._session.ask_for_volume = self._session.ask_for_volume, self._wait_for_volume
        try:
            found = self._find()
            self._image = found.manifest.id
            targets = self._targets(found.manifest)
            self._left_out = _without_a_rule(found.manifest, self.job.targets)
            self._prepare(found, targets)
            self._count_down()
            if self._targets(found.manifest) != targets:
                raise RefusedError(["the disks of this machine changed during the countdown"])
            self._begun = True
            with self._everyone.progress() as progress:
                lines = [
                    line for p in self._prepared for line in carry_out(self._session, p, progress)
                ]
        finally:
            self._session.ask_for_volume = before
        self._everyone.show(lines)

    # --- before anything is written ---

    def _find(self) -> Found:
        """Raises the last error when the image does not turn up in time."""
        self._everyone.show([f"Unattended restore of {self.job.image}: press any key to stop it"])
        deadline = monotonic() + _WAIT_SECONDS
        while True:
            try:
                return self._session.find(self.job.image)
            except IntegrityError:
                raise
            except ImagerError:
                if monotonic() >= deadline:
                    raise
            if self._everyone.key_pressed(_LOOK_AGAIN_SECONDS):
                raise _Stopped
            if any(image.id == self.job.image for image in self._session.job.images):
                self._session.search_disks()

    def _targets(self, manifest: Manifest) -> list[tuple[Disk, Candidate]]:
        """By the rules, of the disks that are there now: a disk may come late. Raises RefusedError
        unless each rule fits exactly one."""
        return _choose_targets(manifest, self.job.targets, candidates(self._session))

    def _prepare(self, found: Found, targets: list[tuple[Disk, Candidate]]) -> None:
        """Raises RefusedError unless all of it may be carried out."""
        delta = self.job.delta  # which reads and compares all of the disk as it is
        options = RestoreOptions(delta=delta, grow=self.job.grow, read_back=not delta)
        for disk, target in targets:
            item = prepare(self._session, found, disk, target.path, options)
            self._prepared.append(item)
            self._everyone.show(["", *describe(item)])
        reasons = [reason for item in self._prepared for reason in item.all_refusals]
        if reasons:
            raise RefusedError(reasons)

    def _count_down(self) -> None:
        """Raises _Stopped when a key was pressed."""
        self._everyone.write("\n")
        for left in range(self.job.countdown, 0, -1):
            self._everyone.write(
                f"\rThis begins in {left} s; any key stops it and leads to the menu "
            )
            if self._everyone.key_pressed(1):
                raise _Stopped
        self._everyone.write("\n")

    # --- while it is written ---

    def _wait_for_volume(self, number: int) -> Path:
        """See ``Session.ask_for_volume``: a person may come and put it in, or it is in another
        drive already."""
        session = self._session
        try:
            medium = find_medium(session.job.medium_id, 0, volume=number)
        except ImagerError:
            self._eject()
            self._everyone.show(["", f"Put in volume {number} of the medium."])
            medium = find_medium(session.job.medium_id, _VOLUME_SECONDS, volume=number)
        session.medium = medium
        return medium.folder

    def _eject(self) -> None:
        old = self._session.medium
        if old is None:
            return
        try:
            eject(old)
        except ImagerError as error:
            self._session.log.add(f"the disc could not be ejected: {error.message}")


def _without_a_rule(manifest: Manifest, rules: Sequence[TargetRule]) -> tuple[str, ...]:
    """Disks of the image that stay as they are in the machine: each line of result names them."""
    ruled = {rule.disk for rule in rules}
    return tuple(disk.name for disk in manifest.disks if disk.name not in ruled)


def _choose_targets(
    manifest: Manifest, rules: Sequence[TargetRule], found: Sequence[Candidate]
) -> list[tuple[Disk, Candidate]]:
    """A target for each rule. Raises RefusedError unless each disk has its own."""
    disks = {disk.name: disk for disk in manifest.disks}
    if not rules or (unknown := [rule.disk for rule in rules if rule.disk not in disks]):
        what = f"no disk {', '.join(unknown)}" if rules else "no rule for a target"
        raise RefusedError([f"unattended restore of {manifest.id}: {what}"])
    chosen = [
        (disk, choose_target(rule, found, smallest_disk(disk.table, disk.size)))
        for rule in rules
        for disk in [disks[rule.disk]]
    ]
    paths = [target.path for _, target in chosen]
    if len(set(paths)) < len(paths):
        raise RefusedError([f"two disks of the image would go to one: {', '.join(paths)}"])
    return chosen


def _target_words(prepared: Prepared) -> str:
    identity = prepared.plan.identity
    known = [f"{key}={value}" for key in ("serial", "wwn") if (value := getattr(identity, key))]
    return ":".join([prepared.plan.target, *(known or filter(None, [identity.model]))])
