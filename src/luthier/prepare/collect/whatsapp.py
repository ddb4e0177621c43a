"""WhatsApp's exported chats: lines with time and name, in the writings of iPhones and of Android."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from .base import Document, File, How, Ready
from .talk import Said, absent, by_day, row

MARKS = "\u200e\u200f\u202a\u202c\ufeff"  # of the direction of writing
LINE = re.compile(
    r"\[?(?P<date>\d{1,4}[./-]\d{1,2}[./-]\d{1,4}),?\s+(?P<time>\d{1,2}[:.]\d{2}(?:[:.]\d{2})?"
    r"(?:[\s\u202f]?[ap]\.?[\s\u00a0]?m\.?)?)(?:\]\s?|\s[-–]\s)(?P<rest>.*)", re.I
)  # fmt: skip
MEDIA = re.compile(
    r"<[^<>]{1,40}>|\S+\.(?:jpg|jpeg|png|webp|mp4|opus|ogg|pdf|vcf|gif|m4a) \([^()]{1,40}\)|<attached: .*>"
    r"|(?:image|video|audio|sticker|GIF|document) omitted|null", re.I
)  # fmt: skip


def looks(lines: Iterable[str]) -> bool:
    """Whether the first lines are of such a chat: two of them at least, and the very first."""
    found = [bool(LINE.match(line.strip(MARKS))) for line in lines if line.strip()]
    return len(found) > 1 and found[0] and sum(found) > 1


def read(file: File, how: How) -> Iterator[Ready | Document]:
    entries = list(_entries(file.text()))
    first_is_day = _day_first(date for date, *_ in entries)
    names: Counter[str] = Counter()
    said = []
    for date, rest, line in entries:
        name, colon, text = rest.partition(": ")
        text = text.replace("\u200e", "").strip()
        if not colon or len(name) > 60:
            file.left["a line of the program"] += 1
        elif not text or MEDIA.fullmatch(text):
            names[name] += 1
            file.left["a picture, a recording or a deleted message"] += 1
        else:
            names[name] += 1
            said.append(Said(name, text, day_of(date, first_is_day), {"line": line}))
    absent(names, file, how)
    for stretch in by_day(said, how):
        yield from row(stretch, {}, file, how)


def _entries(text: str) -> Iterator[tuple[str, str, int]]:
    """(date, name and text, line); a line without a time belongs to the one before."""
    date, pieces, first = "", [], 0
    for number, line in enumerate(text.split("\n"), start=1):
        found = LINE.match(line.strip(MARKS))
        if not found:
            pieces.append(line)
            continue
        if first:
            yield date, "\n".join(pieces), first
        date, pieces, first = found["date"], [found["rest"].strip(MARKS)], number
    if first:
        yield date, "\n".join(pieces), first


def _day_first(dates: Iterable[str]) -> bool:
    """Whether the day stands before the month: told by numbers above 12; in doubt it does, as in most of the world."""
    for date in dates:
        first, second, _ = map(int, re.split(r"[./-]", date))
        if first <= 31 and second > 12:
            return False
        if 12 < first <= 31:
            return True
    return True


def day_of(date: str, day_first: bool) -> str:
    a, b, c = map(int, re.split(r"[./-]", date))
    if a > 31:
        year, month, day = a, b, c
    else:
        (day, month), year = ((a, b) if day_first else (b, a)), c
    return f"{year + 2000 if year < 100 else year:04}-{month:02}-{day:02}"
