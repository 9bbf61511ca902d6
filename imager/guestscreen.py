"""What a virtual machine's screen says, as text.

In text mode that is the memory of the VGA card. In a graphics mode, Linux draws the text, and
keeps its cells in a buffer of its own: it is found in the machine's memory by what it looks like.
Both are cells of two bytes, a character and its colours (Linux drivers/tty/vt/vt.c, vc_screenbuf).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator

_TEXT_COLUMNS = 80
_PAGE = 4096

# The smallest console has 80 by 25 cells; the kernel gives buffers of that size whole pages.
_LEAST_CELLS = 80 * 25
_MOST_CELLS = 480 * 270  # of a screen of 3840 by 2160
_GLYPH_WIDTH = 8

_PIECE = 4 << 20

# Of code page 437, which the first font of a console has: text, frames and shades.
_CHARACTERS = bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
_PLAIN = bytes(range(0x20, 0x7F))
_MOST_COLOURS = 16

_BLANK_LINES = re.compile(r"\n{3,}")


def text_mode_text(memory: bytes) -> str:
    """The VGA card's text memory as lines; empty when it holds something else."""
    cells = memory[: len(memory) // 2 * 2]
    characters, colours = cells[::2], cells[1::2]
    if len(set(colours)) > _MOST_COLOURS or characters.count(b"\xff") > len(characters) // 2:
        return ""
    return _lines(characters, _TEXT_COLUMNS)


def console_texts(memory: int, width: int) -> list[str]:
    """The consoles whose buffers are in a memory, an open file.

    ``width`` of the screen in pixels says how long lines are.
    """
    columns = max(width // _GLYPH_WIDTH, 1)
    found = _buffers(memory)
    # Whole lines: what shares the buffer's last page is something else.
    return [_lines(cells[: len(cells) // columns * columns], columns) for cells in found]


def picture_width(png: bytes | None) -> int:
    """In pixels (PNG specification, 11.2.2); that of a text screen without a picture."""
    if png is None or len(png) < 24 or not png.startswith(b"\x89PNG"):
        return _TEXT_COLUMNS * _GLYPH_WIDTH
    (width,) = struct.unpack_from(">I", png, 16)
    return int(width)


def _lines(characters: bytes, columns: int) -> str:
    text = characters.replace(b"\0", b" ").decode("cp437")
    rows = (text[at : at + columns].rstrip() for at in range(0, len(text), columns))
    return _BLANK_LINES.sub("\n\n", "\n".join(rows)).strip("\n")


def _buffers(memory: int) -> Iterator[bytes]:
    """The characters of each run of pages that is made of cells."""
    found = bytearray()
    for page in _touched_pages(memory):
        cells = _cells(page) if page is not None else 0
        if page is not None and cells:
            found += page[: cells * 2 : 2]
        if cells * 2 < _PAGE and found:
            if _LEAST_CELLS <= len(found) <= _MOST_CELLS and _is_text(found):
                yield bytes(found)
            found.clear()


def _is_text(characters: bytes | bytearray) -> bool:
    """Nearly all of a console is plain text, and some of it blank; shades and frames are rare."""
    plain = len(characters) - len(characters.translate(None, _PLAIN))
    blank = characters.count(b" ")
    return plain * 10 > len(characters) * 9 and len(characters) > blank > len(characters) // 10


def _touched_pages(memory: int) -> Iterator[bytes | None]:
    """The pages that have ever been written, in order; None where others lie between them."""
    size, at = os.fstat(memory).st_size, 0
    while at < size:
        try:
            start = os.lseek(memory, at, os.SEEK_DATA)
            at = os.lseek(memory, start, os.SEEK_HOLE)
        except OSError:  # nothing behind this offset
            break
        for piece_start in range(start, at, _PIECE):
            piece = os.pread(memory, min(_PIECE, at - piece_start), piece_start)
            for offset in range(0, len(piece), _PAGE):
                page = piece[offset : offset + _PAGE]
                # Nearly all pages end here: two cells of the same colours, two characters.
                yield page if len(page) == _PAGE and page[1] == page[3] and page[1] else None
        yield None
    yield None


def _cells(page: bytes) -> int:
    """How many cells a page begins with."""
    characters, colours = page[::2], page[1::2]
    cells = len(characters) - len(characters.lstrip(_CHARACTERS))
    return cells if len(set(colours[:cells])) <= _MOST_COLOURS else 0
