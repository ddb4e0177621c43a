"""Characters and strings of JSON as expressions over the bytes that they are written in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from .expressions import Bytes, Choice, Literal, Node, Repeat, Rule, byte_range, byte_set, literal
from .expressions import Sequence as InOrder

LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
HEX = byte_set(b"0123456789abcdefABCDEF")
SHORT = {0x22: b'\\"', 0x5C: b"\\\\", 0x08: b"\\b", 0x0C: b"\\f", 0x0A: b"\\n", 0x0D: b"\\r", 0x09: b"\\t"}
WIDTHS = ((0x00, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, LAST))

Ranges = tuple[tuple[int, int], ...]  # of code points, in order, none overlapping another


def ranges(parts: Iterable[tuple[int, int]]) -> Ranges:
    """In order, joined where they meet, without surrogates."""
    made: list[list[int]] = []
    for first, last in sorted(parts):
        if first > last:
            continue
        if made and first <= made[-1][1] + 1:
            made[-1][1] = max(made[-1][1], last)
        else:
            made.append([first, last])
    out: list[tuple[int, int]] = []
    for first, last in made:
        if first < SURROGATES[0]:
            out.append((first, min(last, SURROGATES[0] - 1)))
        if last > SURROGATES[1]:
            out.append((max(first, SURROGATES[1] + 1), last))
    return tuple(out)


def without(kept: Ranges, gone: Ranges) -> Ranges:
    made, left = [], list(kept)
    for first, last in gone:
        after = []
        for a, b in left:
            if b < first or a > last:
                after.append((a, b))
                continue
            if a < first:
                after.append((a, first - 1))
            if b > last:
                after.append((last + 1, b))
        left = after
    made = left
    return ranges(made)


EVERY = ranges([(0, LAST)])


def utf8(first: int, last: int) -> list[Node]:
    """Expressions for the UTF-8 of the code points of a range."""
    made: list[Node] = []
    for low, high in WIDTHS:
        a, b = max(first, low), min(last, high)
        if a <= b:
            made += _same_width(chr(a).encode(), chr(b).encode())
    return made


def _same_width(a: bytes, b: bytes) -> list[Node]:
    """All byte strings between two of the same length, of which every byte but the first has 64 values."""
    if len(a) == 1:
        return [Bytes(byte_range(a[0], b[0]))]
    least, most = b"\x80" * (len(a) - 1), b"\xbf" * (len(a) - 1)
    if a[0] == b[0]:
        return [InOrder((Literal(a[:1]), Choice(_same_width(a[1:], b[1:]))))]
    made: list[Node] = []
    first, last = a[0], b[0]
    if a[1:] != least:
        made.append(InOrder((Literal(a[:1]), Choice(_same_width(a[1:], most)))))
        first += 1
    if b[1:] != most:
        made.append(InOrder((Literal(b[:1]), Choice(_same_width(least, b[1:])))))
        last -= 1
    if first <= last:
        rest = Bytes(byte_range(0x80, 0xBF))
        made.append(InOrder((Bytes(byte_range(first, last)), *[rest] * (len(a) - 1))))
    return made


def character(of: Ranges) -> Node:
    """One of these code points inside of a JSON string: as itself, or where it must, as an escape."""
    plain = without(of, ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)))
    options: list[Node] = []
    ascii_set = 0
    for first, last in plain:
        if first < 0x80:
            ascii_set |= byte_range(first, min(last, 0x7F))
        if last >= 0x80:
            options += utf8(max(first, 0x80), last)
    if ascii_set:
        options.insert(0, Bytes(ascii_set))
    for first, last in of:
        for code in range(first, min(last, 0x5C) + 1):
            if code in SHORT:
                options.append(Literal(SHORT[code]))
            elif code < 0x20:
                options.append(Literal(b"\\u%04x" % code))
    return options[0] if len(options) == 1 else Choice(options)


@lru_cache
def any_character() -> Node:
    """Of a string: itself, or any escape; a surrogate is half of a pair."""
    digit, quad = Bytes(HEX), [Bytes(HEX)] * 3
    d = byte_set(b"dD")
    basic = Choice(
        (
            InOrder((Bytes(HEX & ~d), *quad)),
            InOrder((Bytes(d), Bytes(byte_set(b"01234567")), digit, digit)),
        )
    )
    pair = InOrder(
        (
            Bytes(d), Bytes(byte_set(b"89abAB")), digit, digit,
            Literal(b"\\u"), Bytes(d), Bytes(byte_set(b"cdefCDEF")), digit, digit,
        )
    )  # fmt: skip
    escaped = InOrder(
        (Literal(b"\\"), Choice((Bytes(byte_set(b'"\\/bfnrt')), InOrder((Literal(b"u"), Choice((basic, pair)))))))
    )
    plain = character(without(EVERY, ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C))))
    return Rule("character", Choice((plain, escaped)))


def string(low: int = 0, high: int | None = None) -> Node:
    """A JSON string of so many characters."""
    quote = Literal(b'"')
    return InOrder((quote, Repeat(any_character(), low, high), quote))


class _Branch(NamedTuple):
    next: dict[str, _Branch]
    ends: list[bool]


def other_key(taken: Sequence[str]) -> Node:
    """A key, written without escapes, that is none of these."""
    root = _Branch({}, [False])
    for key in taken:
        at = root
        for c in key:
            at = at.next.setdefault(c, _Branch({}, [False]))
        at.ends[0] = True
    plain = without(EVERY, ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)))
    rest = Repeat(character(plain), 0, None)

    def after(branch: _Branch) -> Node:
        options: list[Node] = []
        if not branch.ends[0]:
            options.append(InOrder(()))
        here = ranges((ord(c), ord(c)) for c in branch.next if not SURROGATES[0] <= ord(c) <= SURROGATES[1])
        options.append(InOrder((character(without(plain, here)), rest)))
        for c, inner in branch.next.items():
            if ord(c) >= 0x20 and c not in '"\\' and not SURROGATES[0] <= ord(c) <= SURROGATES[1]:
                options.append(InOrder((literal(c), after(inner))))
        return Choice(options)

    return InOrder((Literal(b'"'), after(root), Literal(b'"')))
