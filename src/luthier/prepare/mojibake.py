"""UTF-8 that was read as Latin-1 or Windows-1252, once or several times: found by what it decodes to, and put right.

Every character that such reading makes of a byte is turned back into that byte; where the bytes are UTF-8 and what they
say is what people write, the sequence is damage. What European texts have themselves (a capital with an accent before a
closing quote, say) also decodes at times, so a lone sequence must be of a likely kind, or stand beside others.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

BYTES = {chr(i): i for i in range(0x80, 0x100)}  # of Latin-1
for _byte in range(0x80, 0xA0):  # and of Windows-1252, whose five holes are read as Latin-1
    BYTES[bytes([_byte]).decode("cp1252", "ignore") or chr(_byte)] = _byte
_TABLE = {ord(character): byte for character, byte in BYTES.items()}
_SPECIAL = "".join(c for c, b in BYTES.items() if 0x80 <= b < 0xA0 and ord(c) > 0xFF)

_LATER = "\x80-\xbf" + re.escape(_SPECIAL)  # what a byte after the first becomes
_UNIT = f"(?:[\xc2-\xdf][{_LATER}]|[\xe0-\xef][{_LATER}]{{2}}|[\xf0-\xf4][{_LATER}]{{3}})"
_LOST = "\xe2\u20ac\ufffd?(?![" + _LATER + "])"  # a closing quote, whose last byte Windows-1252 has no character for
LIKELY = re.compile(f"[\xc2-\xf4][{_LATER}]")  # all that can be damage has this in it
_RUN = re.compile(f"{_UNIT}+|{_LOST}")
_UNITS = re.compile(_UNIT)
_GRAVE = re.compile(
    "(?<![A-Z\xc0-\xde])\xc3 (?: (?=\\S))?"
)  # an a with grave accent whose no-break space became a space

# What follows a letter with an accent in sound texts: quotes, dashes, dots, marks.
_OPENING = "«‘“„‚‹"
_ORDINARY = set("«»‘’“”‚„‹›…–—•™\xa0©®°²³¹ªº·´¨¸§")


class Stretch(NamedTuple):
    start: int
    stop: int
    text: str  # what stands there in truth


def stretches(text: str) -> list[Stretch]:
    """The damaged stretches of a text, one reading deep."""
    if text.isascii() or LIKELY.search(text) is None:
        return []
    runs = [(match, _decoded(match[0])) for match in _RUN.finditer(text)]
    runs = [(match, told) for match, told in runs if told is not None]
    sure = {lead for match, told in runs if _damage(text, match, told) for lead in _leads(match[0])}
    found = [
        Stretch(match.start(), match.end(), told)
        for match, told in runs
        if _damage(text, match, told) or (sure & _leads(match[0]) and not _damages_a_word(text, match, told))
    ]
    if found and "\xc3 " in text:
        taken = [(s.start, s.stop) for s in found]
        found += [
            Stretch(m.start(), m.end(), "\xe0 ") for m in _GRAVE.finditer(text)
            if not any(a < m.end() and m.start() < b for a, b in taken)
        ]  # fmt: skip
        found.sort()
    return found


def repaired(text: str) -> str:
    """The text as it was written; itself where nothing is damaged. Each reading makes it shorter, so this ends."""
    while found := stretches(text):
        parts, at = [], 0
        for start, stop, told in found:
            parts += [text[at:start], told]
            at = stop
        text = "".join([*parts, text[at:]])
    return text


def _decoded(run: str) -> str | None:
    if run.startswith("\xe2\u20ac") and len(run) < 4 and (len(run) == 2 or run[2] == "\ufffd"):
        return "\u201d"
    try:
        return bytes(_TABLE[ord(character)] for character in run).decode()
    except UnicodeDecodeError:
        return None


def _leads(run: str) -> set[str]:
    """The scripts that the first characters of sequences stand for: all Cyrillic letters begin with two of them."""
    return {_BLOCKS.get(unit[0], unit[0]) for unit in _UNITS.findall(run)}


_BLOCKS = {"\xd0": "Cyrillic", "\xd1": "Cyrillic", "\xce": "Greek", "\xcf": "Greek", "\xd8": "Arabic", "\xd9": "Arabic",
           "\xc4": "Latin", "\xc5": "Latin", "\xc3": "Latin", "\xc2": "Latin", "\xe2": "marks"}  # fmt: skip


def _damage(text: str, match: re.Match, told: str) -> bool:
    """Whether a run is damage by itself."""
    run = match[0]
    if any(unicodedata.category(c) in ("Cn", "Co") for c in told):
        return False
    units = _UNITS.findall(run)
    if len(units) > 1:  # in sound texts no mark stands right between two letters with accents
        return True
    lead = run[0]
    if lead in "\xc2\xc3":  # a letter with an accent, or a sign of Latin-1
        return True
    if lead == "\xf0":  # emoji
        return run[1] in "\x9f\u0178\x90-\x9d"
    if lead == "\xe2":  # punctuation, arrows, currency; a box only where no punctuation may have made it
        return not "\u2500" <= told <= "\u257f" or not all(c in _ORDINARY for c in run[1:])
    if run in ("\xef\xbb\xbf", "\xef\xbf\xbd"):  # a byte order mark, a replacement character
        return True
    if lead in "\xc4\xc5\xce\xcf\xd0\xd1":  # a letter of Eastern Europe, Greek or Cyrillic
        letter = told.isalpha() and not _damages_a_word(text, match, told)
        return letter and (run[1] not in _ORDINARY or _inside_a_word(text, match))
    return False


def _inside_a_word(text: str, match: re.Match) -> bool:
    """Whether a capital stands after a small letter, or an opening quote between two letters: no text has these."""
    before = text[match.start() - 1] if match.start() else ""
    return before.islower() or (match[0][1] in _OPENING and text[match.end() : match.end() + 1].isalpha())


def _damages_a_word(text: str, match: re.Match, told: str) -> bool:
    """Whether what was decoded would stand as a small letter after a capital one, as no word has it."""
    before = text[match.start() - 1] if match.start() else ""
    return before.isupper() and before.isascii() and told[0].islower() and len(told) == 1 and match[0][0] in "\xc4-\xdf"
