"""How an unattended restore ended: a line for those who watch the consoles, a POST for a server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.client import HTTPException
from time import sleep
from urllib.request import Request, urlopen

from imager.fingerprint import read_fingerprint

# A server that is asked by a whole room of machines may be slow; after an early refusal the network
# may still be coming up.
_TIMEOUT_SECONDS = 20
_TRIES, _PAUSE_SECONDS = 3, 5.0

_MOST_REASON = 300  # bytes; the kernel's log cuts a message off at some 1000


@dataclass(frozen=True)
class Result:
    """``exit`` is as the command line's: see ``imager.errors``. ``targets`` are device nodes with
    what the disk is known by; ``reason`` may have several lines."""

    exit: int
    image: str
    targets: tuple[str, ...]
    reason: str

    def line(self) -> str:
        """Fields without blanks, but for the last; values come from firmware and images."""
        target = ",".join(_word(target) for target in self.targets) or "none"
        reason = re.sub(r"\s+", " ", _printable(self.reason))[:_MOST_REASON]
        return (
            f"imager-rescue: result exit={self.exit} image={_word(self.image)} "
            f"target={target} reason={reason}"
        )


def post(url: str, result: Result, medium_id: str, note: Callable[[str], object]) -> bool:
    """A JSON object: the result, which medium and which machine. Whether the server took it; what
    fails is only noted."""
    document = {**asdict(result), "medium": medium_id, "machine": _machine()}
    content = json.dumps(document).encode()
    for attempt in range(_TRIES):
        if attempt:
            sleep(_PAUSE_SECONDS)
        try:
            request = Request(url, content, {"Content-Type": "application/json"}, method="POST")
            with urlopen(request, timeout=_TIMEOUT_SECONDS):
                return True
        except (OSError, ValueError, HTTPException) as error:
            note(f"the report to {url} failed: {error}")
    return False


def _machine() -> dict[str, object]:
    """What tells this machine from others."""
    here = read_fingerprint()
    return {
        "vendor": here.system_vendor,
        "product": here.system_product,
        "serial": here.system_serial,
        "macs": [card.mac for card in here.network if card.mac],
    }


def _word(text: str) -> str:
    return re.sub(r"[\s,]+", "_", _printable(text))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
