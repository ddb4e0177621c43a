"""A grammar as a machine over bytes: its states are made when they are reached, and kept as rows of a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from .expressions import Bytes, Choice, Grammar, Literal, Node, Repeat, Rule, Sequence, Special, Unsupported

DEAD = 0  # the state that nothing leads out of
DEEPEST = 192  # parts that are still to come, past which a rule takes its shortest text
MOST_STATES = 1 << 16
UNKNOWN = -1


class Cell:
    """What is to come: a part, and what is to come after it."""

    __slots__ = ("depth", "node", "rest", "shortest")

    def __init__(self, node: Node, rest: Cell | None, shortest: float):
        self.node, self.rest, self.shortest = node, rest, shortest
        self.depth: int = 1 if rest is None else rest.depth + 1


class Machine:
    """`table[state, byte]` is the next state: DEAD, or UNKNOWN in rows that `fill` has not made yet."""

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        self._cells: dict[tuple[int, int], Cell] = {}
        self._states: dict[tuple[frozenset[int], bool], int] = {(frozenset(), False): DEAD}
        self._leaves: list[tuple[Cell, ...]] = [()]
        self._opened: dict[frozenset[int], int] = {}
        self.table = np.full((64, 256), UNKNOWN, np.int32)
        self.filled = np.zeros(64, bool)
        self.accepts = np.zeros(64, bool)
        self.least = np.full(64, np.inf)  # bytes to the end
        self.table[DEAD] = DEAD
        self.filled[DEAD] = True
        self.specials: list[dict[int, int]] = [{}]  # token -> next state
        self.start = self._state([self._cell(grammar.start, None)])

    def __len__(self) -> int:
        return len(self._leaves)

    # ------------------------------------------------------------------ states
    def _cell(self, node: Node, rest: Cell | None) -> Cell:
        key = (id(node), id(rest))  # both live as long as the cell does
        found = self._cells.get(key)
        if found is None:
            least = self.grammar.shortest(node) + (0.0 if rest is None else rest.shortest)
            found = self._cells[key] = Cell(node, rest, least)
        return found

    def _state(self, cells: Iterable[Cell | None]) -> int:
        """The state that these are to come in."""
        leaves: dict[Cell, None] = {}
        accepts = False
        seen: set[Cell] = set()
        waiting = list(cells)
        while waiting:
            cell = waiting.pop()
            if cell is None:
                accepts = True
                continue
            if cell in seen:
                continue
            seen.add(cell)
            node, rest = cell.node, cell.rest
            if isinstance(node, Bytes | Literal | Special):
                leaves[cell] = None
            elif isinstance(node, Sequence):
                for part in reversed(node.parts):
                    rest = self._cell(part, rest)
                waiting.append(rest)
            elif isinstance(node, Choice):
                waiting += [self._cell(option, rest) for option in node.options]
            elif isinstance(node, Repeat):
                if node.low == 0:
                    waiting.append(rest)
                if node.high != 0:
                    if node.low and self.grammar.shortest(node.part) == 0:  # it may be all of nothing
                        waiting.append(rest)
                    waiting.append(self._cell(node.part, self._cell(node.next, rest)))
            else:
                assert isinstance(node, Rule)
                assert node.body is not None
                deep = cell.depth > DEEPEST
                waiting.append(self._cell(self.grammar.short(node) if deep else node.body, rest))
        key = (frozenset(map(id, leaves)), accepts)
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = self._new(tuple(leaves), accepts)
        return found

    def _new(self, leaves: tuple[Cell, ...], accepts: bool) -> int:
        number = len(self._leaves)
        if number >= MOST_STATES:
            raise Unsupported(f"the form has more than {MOST_STATES} states: ask for a simpler one")
        if number == len(self.filled):
            self.table = np.concatenate([self.table, np.full_like(self.table, UNKNOWN)])
            self.filled = np.concatenate([self.filled, np.zeros_like(self.filled)])
            self.accepts = np.concatenate([self.accepts, np.zeros_like(self.accepts)])
            self.least = np.concatenate([self.least, np.full_like(self.least, np.inf)])
        self._leaves.append(leaves)
        self.accepts[number] = accepts
        self.least[number] = 0.0 if accepts else min((cell.shortest for cell in leaves), default=np.inf)
        tokens: dict[int, list[Cell | None]] = defaultdict(list)
        for cell in leaves:
            if isinstance(cell.node, Special):
                tokens[cell.node.token].append(cell.rest)
        self.specials.append({})
        for token, rests in tokens.items():
            self.specials[number][token] = self._state(rests)
        return number

    # ------------------------------------------------------------------ steps
    def fill(self, state: int) -> None:
        """Make the row of a state."""
        by_set: dict[int, list[Cell | None]] = defaultdict(list)
        for cell in self._leaves[state]:
            node = cell.node
            if isinstance(node, Bytes):
                by_set[node.members].append(cell.rest)
            elif isinstance(node, Literal):
                after = node.rest
                by_set[1 << node.text[0]].append(cell.rest if after is None else self._cell(after, cell.rest))
        classes: list[tuple[int, list[Cell | None]]] = []
        for members, targets in by_set.items():
            left, split = members, []
            for other, known in classes:
                both = other & left
                if both:
                    split.append((both, known + targets))
                    left &= ~both
                if other & ~both:
                    split.append((other & ~both, known))
            classes = split + ([(left, targets)] if left else [])
        row = np.zeros(256, np.int32)
        for members, targets in classes:
            key = frozenset(map(id, targets))
            number = self._opened.get(key)
            if number is None:
                number = self._opened[key] = self._state(targets)
            row[_indices(members)] = number
        self.table[state] = row
        self.filled[state] = True

    def step(self, state: int, text: bytes) -> int:
        for byte in text:
            if state == DEAD:
                return DEAD
            if not self.filled[state]:
                self.fill(state)
            state = int(self.table[state, byte])
        return state

    def matches(self, text: bytes) -> bool:
        """Whether a whole text has the form."""
        return bool(self.accepts[self.step(self.start, text)])


_INDICES: dict[int, np.ndarray] = {}


def _indices(members: int) -> np.ndarray:
    found = _INDICES.get(members)
    if found is None:
        bits = np.frombuffer(members.to_bytes(32, "little"), np.uint8)
        found = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        if len(_INDICES) < 1 << 14:
            _INDICES[members] = found
    return found
