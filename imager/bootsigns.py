"""What a machine's console says about a boot: that the system is up, or why it will not be.

The words are those of SeaBIOS, EDK II (OVMF), GRUB 2, Linux, systemd, initramfs-tools and dracut.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from imager.errors import UsageError

SignKind = Literal["login", "target", "port", "command"]
_KINDS: tuple[SignKind, ...] = get_args(SignKind)


@dataclass(frozen=True)
class Sign:
    """What proves that a system is up: ``login`` (a prompt), ``target`` (a systemd unit that is
    reached), ``port`` (TCP, accepts a connection), ``command`` (ends with 0 in the system)."""

    kind: SignKind = "login"
    value: str = ""

    def __str__(self) -> str:
        return f"{self.kind}={self.value}" if self.value else self.kind

    @property
    def port(self) -> int:
        return int(self.value)


def parse_sign(text: str) -> Sign:
    """``login``, ``target=NAME``, ``port=N`` or ``command=WORDS``. Raises UsageError."""
    kind, equals, value = text.partition("=")
    for known in _KINDS:
        if kind == known and bool(equals) == (known != "login") and bool(value) == bool(equals):
            if known == "port" and not (value.isdecimal() and 0 < int(value) < 1 << 16):
                raise UsageError(f"--sign {text}: a port is a number from 1 to 65535")
            return Sign(known, value)
    raise UsageError(f"--sign {text}: it can be login, target=NAME, port=N or command=WORDS")


LOGIN = re.compile(r"^(?!Last )[^\s:]+ login: ?", re.MULTILINE)
"""getty's prompt: the host's name before it (agetty(8), issue and login options)."""


def target_reached(name: str) -> re.Pattern[str]:
    """systemd's line on the console; a unit is named by its name, its description, or both."""
    unit = name if "." in name else f"{name}.target"
    return re.compile(rf"Reached target .*{re.escape(unit)}|Reached target {re.escape(name)}\b")


@dataclass(frozen=True)
class DeadEnd:
    """A boot that will not go on. ``kind`` is for programs."""

    kind: str
    words: str
    pattern: re.Pattern[str]


def _dead_end(kind: str, words: str, *patterns: str) -> DeadEnd:
    return DeadEnd(kind, words, re.compile("|".join(patterns), re.MULTILINE))


# The first that is found says it best: a panic may come from an initramfs without a root.
DEAD_ENDS = (
    _dead_end("panic", "the kernel panicked", r"Kernel panic - not syncing: *(?P<detail>[^\n\]]*)"),
    _dead_end(
        "no-root",
        "the initramfs does not find the root filesystem",
        r"ALERT! +(?P<detail>.*?does not exist)\.",
        r"^\(initramfs\)",
        r"dracut-initqueue.*: Warning: (?P<detail2>.* does not exist)",
        r"Entering emergency mode\. Exit the shell to continue",
        r"^dracut:/#",
    ),
    _dead_end(
        "emergency",
        "systemd went to emergency mode",
        r"You are in emergency mode",
        r"Give root password for maintenance",
        r"Cannot open access to console, the root account is locked",
        r"Press Enter for (?:maintenance|system maintenance)",
    ),
    _dead_end(
        "grub-no-kernel",
        "GRUB has no kernel to start",
        r"error: (?P<detail>.*\n)*?.*you need to load the kernel first",
    ),
    _dead_end("grub-rescue", "GRUB ended in its rescue shell", r"^grub rescue>"),
    _dead_end("grub-prompt", "GRUB found no menu and shows its prompt", r"^grub>"),
    _dead_end(
        "grub-core",
        "GRUB's first stage finds no core image",
        r"(?:GRUB ){3}",
        r"^GRUB (?:Geom|Hard Disk|Floppy|Read) ?Error",
        r"^GRUB Error",
    ),
    _dead_end(
        "signature",
        "Secure Boot refuses the boot loader",
        r"BdsDxe: failed to load .*: Access Denied",
        r"(?:bad shim signature|Verification failed|Security Violation)",
    ),
    _dead_end(
        "not-bootable",
        "the firmware finds nothing to boot",
        r"No bootable (?:device|option)",
        r"^Shell>",
    ),
)

# A first stage of GRUB that jumped to nothing says no more than this.
_GRUB_ALONE = re.compile(r"(?:\A|\n)GRUB ?\s*\Z")


def find_dead_end(text: str) -> tuple[DeadEnd, str] | None:
    """The dead end that a console is in, and its words with what the console adds."""
    for end in DEAD_ENDS:
        found = end.pattern.search(text)
        if found:
            details = [detail for detail in found.groupdict().values() if detail]
            words = ": ".join([end.words, *(" ".join(detail.split()) for detail in details[:1])])
            return end, words
    return None


def stopped_in_first_stage(text: str) -> bool:
    """Whether nothing came after GRUB's first word."""
    return bool(_GRUB_ALONE.search(text.rstrip(" ")))
