"""Set up the network: an address by DHCP, or a fixed one."""

from __future__ import annotations

from bootmedia.guest.choosing import Choice, choose, show
from bootmedia.guest.console import Terminal
from bootmedia.guest.network import Network
from bootmedia.job import NetworkSetup


def set_up_network(terminal: Terminal, network: Network) -> None:
    """Raises ImagerError when no card came up."""
    _show_cards(terminal, network)
    way = choose(
        terminal,
        "How:",
        [
            Choice("an address by DHCP, on every card", "dhcp"),
            Choice("a fixed address on one card", "static"),
        ],
    )
    setup = NetworkSetup("dhcp") if way == "dhcp" else _ask_static(terminal, network)
    terminal.line("setting up the network ...")
    network.set_up(setup)
    _show_cards(terminal, network)


def _show_cards(terminal: Terminal, network: Network) -> None:
    words = [card.words() for card in network.cards()]
    show(terminal, words or ["no network card with a driver was found"])


def _ask_static(terminal: Terminal, network: Network) -> NetworkSetup:
    cards = [Choice(card.words(), card.name) for card in network.cards()]
    interface = choose(terminal, "Network card:", cards)
    return NetworkSetup(
        "static",
        interface,
        terminal.ask("address with its prefix, like 192.0.2.7/24: "),
        terminal.ask("gateway (Enter: none): ") or None,
        tuple(terminal.ask("name servers (Enter: none): ").replace(",", " ").split()),
    )
