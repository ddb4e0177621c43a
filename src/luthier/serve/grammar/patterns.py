"""Regular expressions of JSON schemas (ECMA-262, what of it is regular) as expressions inside of a JSON string.

https://json-schema.org/draft/2020-12/json-schema-core#section-6.4
"""

from __future__ import annotations

from .expressions import EMPTY, Choice, Literal, Node, Repeat, Unsupported
from .expressions import Sequence as InOrder
from .strings import EVERY, Ranges, character, ranges, without

DIGITS: Ranges = ((0x30, 0x39),)
WORD: Ranges = ranges([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
SPACES: Ranges = ranges([
    (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
    (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
])  # fmt: skip
CLASSES = {"d": DIGITS, "w": WORD, "s": SPACES}
NARROW = {"d": DIGITS, "w": WORD, "s": ((0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x20))}
"""What ECMA-262 and Python, which checkers of schemas are written in, have in common of them."""
CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0x00}
LINES: Ranges = ranges([(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)])
MOST = 1000  # times that a part may be counted
SPECIAL = frozenset("^$\\.*+?()[]{}|")


def inside_string(pattern: str) -> Node:
    """A JSON string that a pattern is found in."""
    quote = Literal(b'"')
    return InOrder((quote, _Parser(pattern).whole(), quote))


class _Anchor(Node):
    """A place that nothing may stand before, or after; taken out by `_found`."""

    __slots__ = ("end",)

    def __init__(self, end: bool):
        self.end = end


class _Parser:
    def __init__(self, pattern: str):
        self.pattern, self.at = pattern, 0

    def whole(self) -> Node:
        options = self._options()
        if self.at < len(self.pattern):
            self._fail("an unopened )")
        return Choice([self._found(option) for option in options])

    def _found(self, parts: list[Node]) -> Node:
        """A choice of the outermost level: what is not anchored may have anything around it."""
        anything = Repeat(character(EVERY), 0, None)
        starts = bool(parts) and isinstance(parts[0], _Anchor) and not parts[0].end
        ends = bool(parts) and isinstance(parts[-1], _Anchor) and parts[-1].end
        inner = parts[starts : len(parts) - ends]
        if any(isinstance(part, _Anchor) for part in inner):
            self._fail("^ or $ in the middle")
        return InOrder(([] if starts else [anything]) + inner + ([] if ends else [anything]))

    def _options(self) -> list[list[Node]]:
        options: list[list[Node]] = [[]]
        while self.at < len(self.pattern) and self.pattern[self.at] != ")":
            if self._take("|"):
                options.append([])
            else:
                options[-1].append(self._counted())
        return options

    def _counted(self) -> Node:
        part = self._one()
        while (bounds := self._bounds()) is not None:
            if isinstance(part, _Anchor):
                self._fail("a count of ^ or $")
            self._take("?")  # lazy or greedy: the same texts
            part = Repeat(part, *bounds)
        return part

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        if not self._take("{"):
            return None
        end = self.pattern.find("}", self.at)
        low, comma, high = self.pattern[self.at : end].partition(",") if end >= 0 else ("", "", "")
        if not low.isascii() or not low.isdigit() or (high and not high.isdigit()):
            self._fail("a { that is no count")
        self.at = end + 1
        least, most = int(low), int(high) if high else None if comma else int(low)
        if least > MOST or (most or 0) > MOST or (most is not None and most < least):
            self._fail(f"a count that is not from 0 to {MOST}")
        return least, most

    def _one(self) -> Node:
        c = self.pattern[self.at]
        self.at += 1
        if c == "(":
            return self._group()
        if c == "[":
            return character(self._set())
        if c == ".":
            return character(without(EVERY, LINES))
        if c in "^$":
            return _Anchor(c == "$")
        if c == "\\":
            return character(self._escape(False))
        if c in "*+?{}]":
            self._fail(f"{c} without what it counts or closes")
        return character(ranges([(ord(c), ord(c))]))

    def _group(self) -> Node:
        if self._take("?"):
            if self._take("<"):
                end = self.pattern.find(">", self.at)
                if end < 0 or not self.pattern[self.at : end].isidentifier():
                    self._fail("a look-behind")
                self.at = end + 1
            elif not self._take(":"):
                self._fail("a look-ahead, or flags")
        options = self._options()
        if not self._take(")"):
            self._fail("a ( that is not closed")
        if any(isinstance(part, _Anchor) for option in options for part in option):
            self._fail("^ or $ in a group")
        made = [InOrder(option) if option else EMPTY for option in options]
        return made[0] if len(made) == 1 else Choice(made)

    def _set(self) -> Ranges:
        inverse, classes = self._take("^"), False
        parts: list[tuple[int, int]] = []
        while not self._take("]"):
            classes |= self._ahead("\\")
            first = self._member()
            if self._ahead("-") and self.pattern[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                last = self._member()
                single = all(len(one) == 1 and one[0][0] == one[0][1] for one in (first, last))
                if not single or first[0][0] > last[0][0]:
                    self._fail("a range that is none")
                parts.append((first[0][0], last[0][0]))
            else:
                parts += first
        found = ranges(parts)
        if not inverse:
            return found
        return without(((0, 0x7F),) if classes else EVERY, found)  # others may count more to a class

    def _member(self) -> Ranges:
        if self.at >= len(self.pattern):
            self._fail("a [ that is not closed")
        c = self.pattern[self.at]
        self.at += 1
        return self._escape(True) if c == "\\" else ranges([(ord(c), ord(c))])

    def _escape(self, in_set: bool) -> Ranges:
        if self.at >= len(self.pattern):
            self._fail("a \\ at the end")
        c = self.pattern[self.at]
        self.at += 1
        if c in CLASSES:
            return NARROW[c]
        if c.lower() in CLASSES:
            wide = (*CLASSES[c.lower()], *((0x1C, 0x1F), (0x85, 0x85))) if c == "S" else CLASSES[c.lower()]
            gone = without(EVERY, ranges(wide))
            return gone if c == "S" else ranges((a, min(b, 0x7F)) for a, b in gone)
        if c in CONTROLS:
            return ranges([(CONTROLS[c], CONTROLS[c])])
        if c == "b" and in_set:
            return ranges([(8, 8)])
        if c in "xu":
            width = 2 if c == "x" else 4
            digits = self.pattern[self.at : self.at + width]
            if len(digits) == width and all(d in "0123456789abcdefABCDEF" for d in digits):
                self.at += width
                return ranges([(int(digits, 16), int(digits, 16))])
            self._fail(f"a \\{c} without its {width} digits")
        if c.isascii() and c.isalnum():
            self._fail(f"\\{c}")
        return ranges([(ord(c), ord(c))])

    def _ahead(self, c: str) -> bool:
        return self.pattern[self.at : self.at + 1] == c

    def _take(self, c: str) -> bool:
        found = self._ahead(c)
        self.at += found
        return found

    def _fail(self, what: str) -> None:
        raise Unsupported(f"pattern {self.pattern[:80]!r} has {what}, which is not supported")
