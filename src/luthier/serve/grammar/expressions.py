"""Expressions over bytes: literals, sets, sequences, choices, repetitions and rules that may call themselves.

They are read lazily, as partial derivatives (Antimirov, 1996, https://doi.org/10.1016/0304-3975(95)00182-4) over a
stack of what is still to come, so a repetition of a thousand costs nothing before it is reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ...errors import LuthierError

ALL = (1 << 256) - 1  # a set of bytes is a number of 256 bits


class Unsupported(LuthierError):
    """A form that answers cannot be held to, or that nothing has."""


class Node:
    """A part of an expression; two are the same if they are one object."""

    __slots__ = ("_short",)


class Bytes(Node):
    """One byte of a set."""

    __slots__ = ("members",)

    def __init__(self, members: int):
        self.members = members


class Literal(Node):
    """These bytes, one after another."""

    __slots__ = ("_rest", "text")

    def __init__(self, text: bytes):
        assert text
        self.text = text
        self._rest: Literal | None = None

    @property
    def rest(self) -> Literal | None:
        """What follows its first byte."""
        if self._rest is None and len(self.text) > 1:
            self._rest = Literal(self.text[1:])
        return self._rest


class Special(Node):
    """A token of the vocabulary that no bytes spell."""

    __slots__ = ("token",)

    def __init__(self, token: int):
        self.token = token


class Sequence(Node):
    __slots__ = ("parts",)

    def __init__(self, parts: Iterable[Node]):
        self.parts = tuple(parts)


class Choice(Node):
    __slots__ = ("options",)

    def __init__(self, options: Iterable[Node]):
        self.options = tuple(options)


class Repeat(Node):
    """From `low` to `high` times; `high` None is without end."""

    __slots__ = ("_next", "high", "low", "part")

    def __init__(self, part: Node, low: int = 0, high: int | None = None):
        assert high is None or 0 <= low <= high
        self.part, self.low, self.high = part, low, high
        self._next: Repeat | None = None

    @property
    def next(self) -> Repeat:
        """What is left after one."""
        if self._next is None:
            if self.low == 0 and self.high is None:
                self._next = self
            else:
                self._next = Repeat(self.part, max(self.low - 1, 0), None if self.high is None else self.high - 1)
        return self._next


class Rule(Node):
    """An expression with a name, which may be a part of itself; `body` is set later."""

    __slots__ = ("body", "name")

    def __init__(self, name: str, body: Node | None = None):
        self.name = name
        self.body = body


EMPTY = Sequence(())


def byte_set(members: Iterable[int]) -> int:
    made = 0
    for byte in members:
        made |= 1 << byte
    return made


def byte_range(first: int, last: int) -> int:
    return ((1 << (last - first + 1)) - 1) << first


def optional(part: Node) -> Node:
    return Repeat(part, 0, 1)


def literal(text: str | bytes) -> Node:
    data = text.encode() if isinstance(text, str) else text
    return Literal(data) if data else EMPTY


class Grammar:
    """An expression and the length of the shortest text of each of its parts, in bytes."""

    def __init__(self, start: Node):
        self.start = start
        self.least: dict[Node, float] = {}
        """Of rules."""
        self._of: dict[Node, float] = {}
        self._settle()
        if math.isinf(self.shortest(start)):
            raise Unsupported("nothing has this form: it needs an answer without end")

    def _settle(self) -> None:
        rules = list(_rules(self.start))
        self.least = dict.fromkeys(rules, math.inf)
        changed = True
        while changed:
            changed = False
            self._of = {}
            for rule in rules:
                assert isinstance(rule, Rule)
                assert rule.body is not None, rule.name
                found = self.shortest(rule.body)
                if found < self.least[rule]:
                    self.least[rule] = found
                    changed = True
        self._of = {}

    def shortest(self, node: Node) -> float:
        """Bytes of the shortest text of it."""
        if isinstance(node, Rule):
            return self.least[node]
        found = self._of.get(node)
        if found is None:
            if isinstance(node, Bytes):
                found = 1.0 if node.members else math.inf
            elif isinstance(node, Literal):
                found = float(len(node.text))
            elif isinstance(node, Special):
                found = 1.0
            elif isinstance(node, Sequence):
                found = float(sum(map(self.shortest, node.parts)))
            elif isinstance(node, Choice):
                found = min(map(self.shortest, node.options), default=math.inf)
            else:
                assert isinstance(node, Repeat)
                found = node.low * self.shortest(node.part) if node.low else 0.0
            self._of[node] = found
        return found

    def short(self, node: Node) -> Node:
        """Only the shortest texts of it, without rules."""
        made = getattr(node, "_short", None)
        if made is None:
            if isinstance(node, Rule):
                assert node.body is not None
                made = self.short(node.body)
            elif isinstance(node, Sequence):
                made = Sequence(map(self.short, node.parts))
            elif isinstance(node, Choice):
                made = self.short(min(node.options, key=self.shortest))
            elif isinstance(node, Repeat):
                made = Repeat(self.short(node.part), node.low, node.low) if node.low else EMPTY
            else:
                made = node
            node._short = made  # type: ignore[attr-defined]
        return made


def _rules(start: Node) -> dict[Node, None]:
    """All rules that can be reached, in order."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, Rule):
            found[node] = None
            assert node.body is not None, node.name
            waiting.append(node.body)
        elif isinstance(node, Sequence):
            waiting += node.parts
        elif isinstance(node, Choice):
            waiting += node.options
        elif isinstance(node, Repeat):
            waiting.append(node.part)
    return found
