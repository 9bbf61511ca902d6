"""The text that describes a volume group, as plain Python values.

Source: LVM2 libdm/libdm-config.c (the grammar) and lvm.conf(5): sections in braces, ``key =
value`` where a value is a number, a string or a list of them, and comments from ``#`` on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from imager.allocation.model import require
from imager.errors import NotRecognized

Value = int | str | list[int | str]
Section = dict[str, "Value | Section"]

_MAX_DEPTH = 8  # the deepest there is: group, volumes, volume, segment
_TOKEN = re.compile(
    r"""(?:\s++|\#[^\n]*+)*+(?:
        (?P<string>"(?:[^"\\]|\\.)*+")
      | (?P<number>-?[0-9]+(?![0-9A-Za-z_.+-]))
      | (?P<name>[A-Za-z0-9_.+-]+)
      | (?P<sign>[][{}=,])
      | (?P<end>\Z)
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


def parse(text: bytes) -> Section:
    """All of a metadata text. Raises NotRecognized for anything that is not of the grammar."""
    try:
        return _Parser(text.decode()).document()
    except UnicodeDecodeError:
        raise NotRecognized("the metadata is no text") from None


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._kind, self._word = next(self._tokens)

    def document(self) -> Section:
        section = self._section(0)
        require(self._kind == "end", f"the metadata has a stray {self._word[:20]!r}")
        return section

    def _section(self, depth: int) -> Section:
        require(depth <= _MAX_DEPTH, "the metadata is nested too deeply")
        section: Section = {}
        while self._kind in ("name", "number", "string"):
            name = self._take()
            require(name not in section, f"the metadata has {name[:40]!r} twice")
            section[name] = self._body(depth) if self._word == "{" else self._assigned()
        return section

    def _body(self, depth: int) -> Section:
        self._expect("{")
        section = self._section(depth + 1)
        self._expect("}")
        return section

    def _assigned(self) -> Value:
        self._expect("=")
        return self._list() if self._word == "[" else self._scalar()

    def _list(self) -> list[int | str]:
        self._expect("[")
        values: list[int | str] = []
        while self._word != "]":
            values.append(self._scalar())
            if self._word != "]":
                self._expect(",")
        self._expect("]")
        return values

    def _scalar(self) -> int | str:
        kind = self._kind
        require(kind in ("string", "number"), f"the metadata has no value at {self._word[:20]!r}")
        word = self._take()
        return int(word) if kind == "number" else word

    def _expect(self, sign: str) -> None:
        require(
            self._kind == "sign" and self._word == sign,
            f"the metadata has {self._word[:20]!r} in place of {sign!r}",
        )
        self._take()

    def _take(self) -> str:
        """The current word, unquoted; then on to the next."""
        word = self._word
        if self._kind == "string":
            word = _ESCAPED.sub(r"\1", word[1:-1])
        require(self._kind != "number" or len(word) <= 20, "the metadata has an impossible number")
        self._kind, self._word = next(self._tokens)
        return word


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Kind and word; the last one is ``end``."""
    at = 0
    while match := _TOKEN.match(text, at):
        kind = match.lastgroup or "end"
        # A string is one word that can look like a sign: its quotes tell them apart.
        yield kind, match[kind]
        if kind == "end":
            return
        at = match.end()
    raise NotRecognized(f"the metadata can't be read at character {at}")
