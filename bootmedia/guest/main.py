"""What the rescue system does from its first process on to the end of the machine's session."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from time import sleep

from bootmedia.guest import ssh, system
from bootmedia.guest.allterminals import AllTerminals
from bootmedia.guest.bootentry import EFIVARS, mount_variables
from bootmedia.guest.coldplug import FIRST_MODULES, Drivers, wait_for_disks
from bootmedia.guest.console import Terminal, open_terminals
from bootmedia.guest.log import Log
from bootmedia.guest.medium import Medium, find_medium
from bootmedia.guest.network import Network
from bootmedia.guest.session import Session
from bootmedia.job import Job
from imager.errors import ImagerError

# A person who misses a disk looks again; a rule must know all disks before it takes one.
_MENU_QUIET, _MENU_LONGEST = 0, 5
_RULE_QUIET, _RULE_LONGEST = 5, 60


def main() -> None:
    log = Log(system.note)
    job = system.read_job()
    _check_layers(job)
    _load_drivers(log)
    network = Network(log.add)
    network.start(job.network)
    with ExitStack() as stack:
        terminals = [stack.enter_context(terminal) for terminal in open_terminals()]
        _greet(terminals)
        medium = _find_medium(job, log)
        _wait_for_disks(job, log)
        _start_ssh(job, log)
        with Session(job, medium, log=log) as session:
            end = _unattended(session, terminals) or _menus(session, terminals, network)
    if end == "poweroff":
        system.power_off()
    system.reboot()


def _check_layers(job: Job) -> None:
    if missing := system.missing_layers(job):
        system.announce(f"imager-rescue: sentinel failed: incomplete: {' '.join(missing)}")
        raise ImagerError(
            f"the machine has too little memory: the rescue system needs at least "
            f"{job.least_memory >> 20} MiB"
        )


def _load_drivers(log: Log) -> None:
    """Without modules (all is built in, or there are none) the machine goes on with what it has."""
    try:
        drivers = Drivers()
        drivers.watch()
        for name in FIRST_MODULES:
            drivers.load(name)
        log.add(f"{drivers.coldplug()} modules loaded")
    except (ImagerError, OSError) as error:
        log.add(f"no drivers could be loaded: {error}")
        return
    _open_firmware(drivers)
    for text in drivers.failures:
        log.add(f"not loaded: {text}")


def _open_firmware(drivers: Drivers) -> None:
    """UEFI's variables: boot entries, and whether Secure Boot is on."""
    if EFIVARS.parent.is_dir() and drivers.load("efivarfs"):
        mount_variables()


def _greet(terminals: Sequence[Terminal]) -> None:
    """One that breaks off must not end the rescue system."""
    AllTerminals(terminals).write("\nimager rescue system: looking for disks and the medium ...\n")


def _find_medium(job: Job, log: Log) -> Medium | None:
    """None when it was booted from the network, and when it is not found: the images may be
    elsewhere."""
    if not job.volumes:
        return None
    try:
        medium = find_medium(job.medium_id)
    except (ImagerError, OSError) as error:
        log.add(f"{error}: going on without it")
        return None
    log.add(f"the medium is {medium.device}")
    return medium


def _wait_for_disks(job: Job, log: Log) -> None:
    if job.unattended is None:
        complete = wait_for_disks(_MENU_QUIET, _MENU_LONGEST)
    else:
        complete = wait_for_disks(_RULE_QUIET, _RULE_LONGEST)
    if not complete:
        log.add("some disks may still be missing: the kernel has not finished looking at them")


def _start_ssh(job: Job, log: Log) -> None:
    if not job.ssh_keys:
        return
    try:
        ssh.start(job.ssh_keys)
        log.add("SSH server started")
    except (ImagerError, OSError) as error:
        log.add(f"SSH: {error}")


def _unattended(session: Session, terminals: Sequence[Terminal]) -> str | None:
    """How the machine is to end; None when a person is to go on."""
    if session.job.unattended is None:
        return None
    from bootmedia.guest import unattended

    return unattended.ending(session, terminals)


def _menus(session: Session, terminals: Sequence[Terminal], network: Network) -> str:
    """A menu on every terminal at once; the first that wants to end the machine does."""
    if not terminals:
        raise ImagerError("neither a screen nor a serial line works")
    ends: SimpleQueue[str] = SimpleQueue()
    for terminal in terminals:
        work = partial(_menu, session, terminal, network, ends)
        threading.Thread(target=work, daemon=True, name=terminal.name).start()
    return ends.get()


def _menu(session: Session, terminal: Terminal, network: Network, ends: SimpleQueue[str]) -> None:
    """On the thread of one terminal. An error that the menu did not expect begins it anew."""
    from bootmedia.guest import menu
    from bootmedia.guest.console import TerminalLost

    while True:
        try:
            ends.put(menu.run(session, terminal, network))
        except TerminalLost as lost:
            session.log.add(lost.message)
        except Exception as error:
            session.log.add_error(error)
            sleep(1)
            continue
        return
