"""Long texts to parts of at most so many characters, at headings, paragraphs, lines, sentences or words."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

BORDERS = (  # (what a part may end before, how much of it must be there at least)
    (re.compile(r"\n(?=#{1,6} )"), 0.5), (re.compile(r"\n[ \t]*\n"), 0.25), (re.compile(r"\n"), 0.25),
    (re.compile(r"(?<=[.!?…])[ \t]|(?<=[。！？])"), 0.25), (re.compile(r"\s"), 0.0),
)  # fmt: skip


def parted(text: str, most: int | None) -> Iterator[tuple[int, str]]:
    """(where it begins in the text, a part without blanks around it); nothing but blanks is lost."""
    start, end = 0, len(text)
    while start < end:
        if text[start].isspace():
            start += 1
            continue
        stop = end if most is None or end - start <= most else _border(text, start, most)
        if part := text[start:stop].rstrip():
            yield start, part
        start = stop


def _border(text: str, start: int, most: int) -> int:
    """Where the part that begins at `start` ends: at the last border of the best kind."""
    for border, least in BORDERS:
        found = deque(border.finditer(text, start + max(1, int(most * least)), start + most + 1), maxlen=1)
        if found:
            last = found[0]
            return min(last.end() if last.end() > last.start() else last.start(), start + most)
    return start + most
