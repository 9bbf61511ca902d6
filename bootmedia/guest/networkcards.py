"""The network cards that an installed system's configuration names, against those that are here.

Files: interfaces(5), netplan(5), systemd.network(5), nm-settings-keyfile(5), and the ifcfg files
of sysconfig. Names that systemd gives: systemd.net-naming-scheme(7).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from imager.fingerprint import Fingerprint, NetworkCard
from imager.rootfolder import RootFolder
from imager.sysfs import entries, read_number, read_text

# What software makes: no card belongs to it.
_VIRTUAL = re.compile(
    r"(lo|all|default|bond|team|br|virbr|docker|veth|vnet|tun|tap|wg|dummy|vlan|ppp|sit|ib)\d*\Z"
    r"|.*[.:@].*|(br|docker|bond|team|vlan|wg)[-_].*"
)
_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\Z")
_PCI = re.compile(r"([0-9a-f]{4,}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])\Z")
_OLD_NAME = re.compile(r"(eth|wlan)\d+\Z")


class Mention(NamedTuple):
    """What a file names a card by: a name (``*`` and ``?`` match), or an address."""

    file: str
    name: str | None
    mac: str | None

    def __str__(self) -> str:
        return f"/{self.file} names {self.name or self.mac}"


def absent_cards(root: Path, here: Fingerprint, sys_root: Path = Path("/")) -> list[str]:
    """Words for each card that the configuration below ``root`` names and this machine lacks."""
    system = RootFolder(root)
    names = {name for card in here.network for name in likely_names(card, sys_root)}
    macs = {card.mac.lower() for card in here.network if card.mac}
    absent = [mention for mention in mentions(system) if not _is_here(mention, names, macs, here)]
    return list(dict.fromkeys(f"{mention}, which is not in this machine" for mention in absent))


def mentions(system: RootFolder) -> Iterator[Mention]:
    """Every physical card that a configuration file names."""
    for found in _all(system):
        name = found.name
        if name is not None and (_VIRTUAL.match(name) or not name):
            continue
        yield found


def likely_names(card: NetworkCard, sys_root: Path = Path("/")) -> set[str]:
    """The names that systemd may give to a card, and the one it has now."""
    found = {card.name} if card.name else set()
    if card.mac:
        found.add("enx" + card.mac.replace(":", ""))
    for device in card.devices:
        match = _PCI.match(device.address or "")
        if device.bus != "pci" or match is None:
            continue
        domain, bus, slot, function = (int(text, 16) for text in match.groups())
        prefix = f"P{domain}" if domain else ""
        folder = sys_root / "sys/bus/pci/devices" / (device.address or "")
        functions = [f"f{function}"] if function else ["", "f0"]
        for end in functions:
            found.add(f"en{prefix}p{bus}s{slot}{end}")
            found |= {f"en{prefix}s{number}{end}" for number in _slots(folder, sys_root)}
        for onboard in (read_number(folder / "acpi_index"), read_number(folder / "index")):
            if onboard:
                found.add(f"eno{onboard}")
    return found


def _slots(device: Path, sys_root: Path) -> Iterator[str]:
    """Numbers of the hotplug slots that a device or a bridge above it lies in."""
    way = {
        folder.name.rpartition(".")[0] for folder in (device.resolve(), *device.resolve().parents)
    }
    for slot in entries(sys_root / "sys/bus/pci/slots"):
        if read_text(slot / "address") in way and slot.name.isdigit():
            yield slot.name


def _is_here(mention: Mention, names: set[str], macs: set[str], here: Fingerprint) -> bool:
    if mention.mac is not None:
        return mention.mac in macs
    name = mention.name or ""
    if _OLD_NAME.match(name):  # counted: as many cards have such a name
        return int(re.sub(r"\D", "", name)) < len(here.network)
    return any(fnmatchcase(known, pattern) for known in names for pattern in name.split())


def _all(system: RootFolder) -> Iterator[Mention]:
    yield from _interfaces(system)
    for folder in ("etc/netplan", "usr/lib/netplan"):
        for file, text in system.files(folder, ".yaml"):
            yield from _netplan(file, text)
    for ending in (".network", ".link"):
        for file, text in system.files("etc/systemd/network", ending):
            yield from _keys(file, text, "Match", ("name", "originalname"), ("macaddress",))
    for file, text in system.files("etc/NetworkManager/system-connections", ""):
        yield from _keys(file, text, None, ("interface-name",), ("mac-address",))
    for name in system.names("etc/sysconfig/network-scripts"):
        file = f"etc/sysconfig/network-scripts/{name}"
        if name.startswith("ifcfg-") and (content := system.text(file)):
            yield from _keys(file, content, None, ("device",), ("hwaddr",))


def _interfaces(system: RootFolder) -> Iterator[Mention]:
    files = [("etc/network/interfaces", system.text("etc/network/interfaces") or "")]
    for file, text in [*files, *system.files("etc/network/interfaces.d", "")]:
        for line in text.splitlines():
            words = line.split()
            if len(words) > 1 and (words[0] == "auto" or words[0].startswith("allow-")):
                yield from (Mention(file, word.partition("=")[0], None) for word in words[1:])
            elif len(words) > 1 and words[0] == "iface":
                yield Mention(file, words[1].partition("=")[0], None)


def _netplan(file: str, text: str) -> Iterator[Mention]:
    """The keys right below ``ethernets:`` and ``wifis:``, and what their ``match`` says.

    A definition that matches by something has a name of its own choice.
    """
    inside: int | None = None
    level: int | None = None
    name: str | None = None
    found: list[Mention] = []
    for line in text.splitlines():
        bare = line.split("#")[0].rstrip()
        if not bare.strip():
            continue
        indent = len(bare) - len(bare.lstrip())
        key, _, value = (part.strip().strip("\"'") for part in bare.strip().partition(":"))
        if inside is None or indent <= inside:
            inside = indent if key in ("ethernets", "wifis") else None
            level = None
            continue
        level = indent if level is None else level
        if indent == level:
            name = key
            found.append(Mention(file, name, None))
        elif key == "match":
            found = [item for item in found if item.name != name or item.mac]
        elif key == "macaddress" and _MAC.match(value.lower()):
            found.append(Mention(file, None, value.lower()))
        elif key == "name" and value:
            found.append(Mention(file, value, None))
    yield from found


def _keys(
    file: str, text: str, wanted: str | None, names: tuple[str, ...], macs: tuple[str, ...]
) -> Iterator[Mention]:
    """``key=value`` lines, of one section if ``wanted``."""
    section = ""
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("["):
            section = line.strip("[]")
        elif "=" in line and not line.startswith(("#", ";")) and wanted in (None, section):
            key, _, value = line.partition("=")
            key, value = key.strip().lower(), value.strip().strip("\"'")
            if key in names and not value.startswith("!"):
                yield from (Mention(file, word, None) for word in value.split())
            elif key in macs:
                for word in value.lower().replace("-", ":").split():
                    if _MAC.match(word):
                        yield Mention(file, None, word)
