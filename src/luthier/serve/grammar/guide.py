"""Masks over a vocabulary: what may come next after the answer so far, found once for each state of a machine."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .expressions import Grammar, Unsupported
from .machine import DEAD, Machine
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

MOST_MASKS = 2048  # of a machine
MOST_MACHINES = 64
LARGE = 1 << 15  # states, past which a machine is no longer given to new requests


@dataclass(frozen=True)
class Mask:
    """What may come in a state."""

    allowed: Tensor  # [V] bool
    furthest: float  # bytes from the end, after the token that leads furthest from it


class Masks:
    """Of one machine over one vocabulary; `stops` are the tokens that may come where the form is complete."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, stops: Collection[int]):
        self.machine, self.vocabulary = Machine(grammar), vocabulary
        self.stops = sorted(stop for stop in stops if 0 <= stop < len(vocabulary))
        self.lock = threading.Lock()
        self._made: OrderedDict[int, Mask] = OrderedDict()

    def ends(self, state: int) -> np.ndarray:
        """[V] the state after each token; DEAD where it may not come."""
        machine, vocabulary = self.machine, self.vocabulary
        reached = np.zeros(len(vocabulary.parent), np.int32)
        reached[0] = state
        for start, end in vocabulary.levels:
            before = reached[vocabulary.parent[start:end]]
            alive = np.flatnonzero(before)
            if not len(alive):
                break
            before = before[alive]
            while not (known := machine.filled[before]).all():
                for one in np.unique(before[~known]):
                    machine.fill(int(one))
            reached[start + alive] = machine.table[before, vocabulary.byte[start + alive]]
        made = np.where(vocabulary.node >= 0, reached[vocabulary.node], DEAD)
        for token, after in machine.specials[state].items():
            made[token] = after
        return made

    def mask(self, state: int) -> Mask:
        found = self._made.get(state)
        if found is None:
            ends = self.ends(state)
            least = float(self.machine.least[ends].max(initial=0.0, where=ends > 0))
            found = Mask(self._tensor(state, ends != DEAD), least)
            self._made[state] = found
            if len(self._made) > MOST_MASKS:
                self._made.popitem(last=False)
        return found

    def near(self, state: int, left: float) -> Tensor:
        """[V] what may come where the form must be complete `left` bytes after it."""
        ends = self.ends(state)
        return self._tensor(state, (ends != DEAD) & (self.machine.least[ends] <= left))

    def _tensor(self, state: int, allowed: np.ndarray) -> Tensor:
        import torch

        if self.machine.accepts[state]:
            allowed[self.stops] = True
        return torch.from_numpy(allowed)

    def after(self, state: int, token: int) -> int:
        """The state that a token leads to."""
        if token in self.machine.specials[state]:
            return self.machine.specials[state][token]
        text = self.vocabulary.texts[token]
        return self.machine.step(state, text) if text else DEAD


class Guide:
    """Holds one answer to a form: given to a request as `allowed`. The answer is complete within `most` tokens."""

    def __init__(self, masks: Masks, most: int):
        self.masks, self.most = masks, most
        self.state, self.read = masks.machine.start, 0
        self._stops = set(masks.stops)
        if (least := masks.machine.least[self.state]) > most:
            raise Unsupported(f"the shortest answer of this form has {least:.0f} bytes, and max_tokens is {most}")

    def __call__(self, answer: list[int]) -> Tensor | None:
        with self.masks.lock:
            self.follow(answer)
            left = self.most - len(answer) - 1  # tokens after this one, of a byte at least
            made = self.masks.mask(self.state)
            return made.allowed if made.furthest <= left else self.masks.near(self.state, left)

    def follow(self, answer: list[int]) -> None:
        for token in answer[self.read :]:
            if token not in self._stops:
                self.state = self.masks.after(self.state, token)
            self.read += 1
        if self.state == DEAD:
            raise Unsupported("the answer left its form")

    def complete(self, answer: list[int]) -> bool:
        """Whether the answer has the form as a whole."""
        with self.masks.lock:
            self.follow(answer)
            return bool(self.masks.machine.accepts[self.state])


class Triggered:
    """Holds what comes after a mark to a form; before it, and where the model did not keep to it, all may come.

    `mark` is text or, where the vocabulary has it so, a token. After the form's end the next mark is waited for.
    """

    def __init__(self, masks: Masks, mark: bytes, token: int | None, most: int):
        self.masks, self.mark, self.token, self.most = masks, mark, token, most
        self.inside: Guide | None = None
        self.tail = b""
        self.read = 0

    def __call__(self, answer: list[int]) -> Tensor | None:
        for at in range(self.read, len(answer)):
            self._take(answer, at)
        self.read = len(answer)
        if self.inside is None:
            return None
        guide = self.inside
        with self.masks.lock:
            left = guide.most - len(answer) - 1
            made = self.masks.mask(guide.state)
            return made.allowed if made.furthest <= left else self.masks.near(guide.state, left)

    def _take(self, answer: list[int], at: int) -> None:
        token = answer[at]
        text = self.masks.vocabulary.texts[token] if token < len(self.masks.vocabulary) else None
        with self.masks.lock:
            if self.inside is not None:
                self._inside(token, text)
                return
        if token == self.token:
            self._open(b"", at)
            return
        self.tail = (self.tail + (text or b""))[-256:]
        found = self.tail.rfind(self.mark) if self.mark else -1
        if found >= 0:
            rest = self.tail[found + len(self.mark) :]
            self._open(rest, at)

    def _inside(self, token: int, text: bytes | None) -> None:
        guide = self.inside
        assert guide is not None
        after = self.masks.after(guide.state, token)
        if after == DEAD or not _more(self.masks.machine, after):
            self.inside, self.tail = None, b""
        else:
            guide.state = after

    def _open(self, rest: bytes, at: int) -> None:
        self.tail = b""
        try:
            guide = Guide(self.masks, self.most)
        except Unsupported:
            return
        with self.masks.lock:
            guide.state = self.masks.machine.step(guide.state, rest)
        if guide.state != DEAD and self.masks.machine.least[guide.state] <= self.most - at - 1:
            self.inside = guide


def _more(machine: Machine, state: int) -> bool:
    """Whether anything can come after it."""
    if not machine.filled[state]:
        machine.fill(state)
    return bool(machine.table[state].any() or machine.specials[state])


class Machines:
    """Machines by what they are made of, the last ones kept; of one vocabulary."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]):
        self._make_vocabulary = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Masks] = OrderedDict()

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        return self._vocabulary

    def get(self, key: Hashable, grammar: Callable[[], Grammar], stops: Collection[int]) -> Masks:
        """Raises Unsupported."""
        key = (key, frozenset(stops))
        with self._lock:
            found = self._kept.get(key)
            if found is not None and len(found.machine) < LARGE:
                self._kept.move_to_end(key)
                return found
            found = self._kept[key] = Masks(grammar(), self.vocabulary, stops)
            if not math.isfinite(found.machine.least[found.machine.start]):
                raise Unsupported("nothing has this form")
            while len(self._kept) > MOST_MACHINES:
                self._kept.popitem(last=False)
            return found
