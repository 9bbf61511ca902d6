"""The network of the rescue system: one DHCP client a card, or one fixed address.

Cards keep the kernel's names (eth0, eth1 in the order they were found). What a card's DHCP client
was told lies in ``LEASE`` with the card's name as its suffix, written by ``udhcpc.sh``.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from bootmedia.job import NetworkSetup
from imager.errors import ImagerError, UsageError
from imager.process import run
from imager.sysfs import entries, read_number, read_text

LEASE = Path("/run/imager/lease")
RESOLV_CONF = Path("/etc/resolv.conf")
_SCRIPT = "/usr/share/udhcpc/default.script"

_CARD_SECONDS = 15.0  # drivers find their cards late, and auto-negotiation takes some seconds
_DHCP_SECONDS = 15.0


@dataclass
class Card:
    """An interface with hardware. ``state`` is for people."""

    name: str
    mac: str
    state: str = "not set up"
    addresses: list[str] = field(default_factory=list)

    def words(self) -> str:
        return f"{self.name} {self.mac} {' '.join(self.addresses) or self.state}"


class Network:
    """What was set up, or what went wrong. ``start`` returns at once."""

    def __init__(self, note: Callable[[str], object]) -> None:
        self._note = note
        self._states: dict[str, str] = {}
        self._lock = threading.Lock()

    def cards(self) -> list[Card]:
        """Every card that there is now, with its addresses."""
        return [
            Card(
                folder.name,
                read_text(folder / "address") or "",
                self._states.get(folder.name, "not set up"),
                _addresses(folder.name),
            )
            for folder in entries(Path("/sys/class/net"))
            if (folder / "device").exists()
        ]

    def start(self, setup: NetworkSetup) -> None:
        """Set it up in a thread of its own: a menu must not wait for a network."""
        if setup.mode != "none":
            threading.Thread(target=self._try, args=(setup,), daemon=True, name="network").start()

    def set_up(self, setup: NetworkSetup) -> None:
        """Raises ImagerError when no card came up."""
        with self._lock:
            if setup.mode == "static":
                self._set_static(setup)
            elif setup.mode == "dhcp":
                self._ask_dhcp(setup)
            elif setup.mode != "none":
                raise UsageError(f"network mode {setup.mode!r}: dhcp, static or none")

    def _try(self, setup: NetworkSetup) -> None:
        try:
            self.set_up(setup)
        except ImagerError as error:
            self._note(f"network: {error.message}")

    def _set_static(self, setup: NetworkSetup) -> None:
        try:
            address = ipaddress.ip_interface(setup.address or "")
            gateway = ipaddress.ip_address(setup.gateway) if setup.gateway else None
        except ValueError as error:
            raise UsageError(f"network address: {error}") from None
        name = setup.interface or self._first_carrier()
        self._end_client(name)
        _bring_up(name)
        run(["ip", "addr", "flush", "dev", name])
        run(["ip", "addr", "replace", str(address), "dev", name])
        if gateway is not None:
            run(["ip", "route", "replace", "default", "via", str(gateway), "dev", name])
        if setup.dns:
            RESOLV_CONF.write_text("".join(f"nameserver {server}\n" for server in setup.dns))
        self._states[name] = f"{address}, fixed"
        self._note(f"network: {name} has {address}")

    def _ask_dhcp(self, setup: NetworkSetup) -> None:
        names = [setup.interface] if setup.interface else self._wait_for_cards()
        threads = [threading.Thread(target=self._lease, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not any(card.addresses for card in self.cards()):
            said = "; ".join(f"{name}: {self._states.get(name, 'no answer')}" for name in names)
            raise ImagerError(
                f"no address by DHCP ({said or 'no network card with a driver'})",
                hint="check the cable, or set a fixed address in the menu",
            )

    def _lease(self, name: str) -> None:
        """Wait for one card's DHCP; the client goes on in a thread, to renew the lease."""
        self._end_client(name)
        self._states[name] = "asking for an address"
        client = threading.Thread(target=self._run_client, args=(name,), daemon=True)
        client.start()
        deadline = monotonic() + _DHCP_SECONDS
        while client.is_alive() and not _lease_of(name).exists():
            if monotonic() > deadline:
                # It goes on asking: a link may come up late.
                self._states[name] = "no answer to DHCP yet"
                self._note(f"network: {name}: no answer to DHCP yet")
                return
            sleep(0.1)
        if client.is_alive():
            self._states[name] = "by DHCP"
            self._note(f"network: {name} has {' '.join(_addresses(name))} by DHCP")

    def _run_client(self, name: str) -> None:
        """Asks, and renews the lease, until it is ended."""
        pid_file = str(_pid_file(name))
        with suppress(ImagerError):
            _bring_up(name)
            run(["udhcpc", "-f", "-i", name, "-p", pid_file, "-s", _SCRIPT], accept=range(256))
        self._states[name] = "not set up"

    def _end_client(self, name: str) -> None:
        """An earlier one would take back what is set up next. SIGTERM: it gives up the lease."""
        number = read_number(_pid_file(name))
        with suppress(ProcessLookupError):
            if number:
                os.kill(number, signal.SIGTERM)
        for file in (_pid_file(name), _lease_of(name)):
            file.unlink(missing_ok=True)

    def _wait_for_cards(self) -> list[str]:
        """Names of the cards, as soon as there is a driver for one, and a moment for others."""
        deadline = monotonic() + _CARD_SECONDS
        while not (cards := self.cards()) and monotonic() < deadline:
            sleep(0.3)
        return [card.name for card in cards]

    def _first_carrier(self) -> str:
        names = self._wait_for_cards()
        for name in names:
            _bring_up(name)
        deadline = monotonic() + _CARD_SECONDS
        while names and monotonic() < deadline:
            for name in names:
                if read_number(Path("/sys/class/net") / name / "carrier") == 1:
                    return name
            sleep(0.3)
        raise ImagerError(
            f"no network card has a link ({', '.join(names) or 'there is none with a driver'})",
            hint="check the cable",
        )


def _lease_of(name: str) -> Path:
    return LEASE.with_suffix(f".{name}")


def _pid_file(name: str) -> Path:
    return LEASE.with_name(f"udhcpc.{name}.pid")


def _bring_up(name: str) -> None:
    run(["ip", "link", "set", name, "up"])


def _addresses(name: str) -> list[str]:
    """IPv4 and global IPv6 addresses with their prefix lengths."""
    with suppress(ImagerError):
        lines = run(["ip", "-o", "addr", "show", "dev", name]).stdout.decode().splitlines()
        words = [line.split() for line in lines]
        return [
            item[3]
            for item in words
            if len(item) > 3 and item[2] in ("inet", "inet6") and not item[3].startswith("fe80:")
        ]
    return []
