"""ROUGE-L between one text and many: the longest common subsequence of words, bit by bit.

https://aclanthology.org/W04-1013 (Lin 2004).
"""

from __future__ import annotations

import re

WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W_]+")  # characters of scripts that do not part words


def words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, in len(b) operations on integers of len(a) bits.

    https://doi.org/10.1016/S0020-0190(00)00143-X (Crochemore and others, 2001).
    """
    places: dict[str, int] = {}
    for at, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << at
    return _common(places, (1 << len(a)) - 1, b)


def _common(places: dict[str, int], full: int, b: list[str]) -> int:
    rest = full
    for word in b:
        met = rest & places.get(word, 0)
        rest = ((rest + met) | (rest - met)) & full
    return full.bit_count() - rest.bit_count()


def rouge_l(a: list[str], b: list[str]) -> float:
    """The F-measure, in [0, 1]."""
    return 2 * common(a, b) / (len(a) + len(b)) if a and b else 0.0


class Pool:
    """Texts that a new one is compared with."""

    def __init__(self) -> None:
        self.texts: list[list[str]] = []

    def add(self, text: str) -> None:
        self.texts.append(words(text))

    def like(self, text: str, limit: float) -> bool:
        """Whether any text of the pool has a ROUGE-L of `limit` or more with this one."""
        new = words(text)
        places: dict[str, int] = {}
        for at, word in enumerate(new):
            places[word] = places.get(word, 0) | 1 << at
        full = (1 << len(new)) - 1
        for old in self.texts:
            total = len(new) + len(old)
            if 2 * min(len(new), len(old)) >= limit * total and 2 * _common(places, full, old) >= limit * total > 0:
                return True
        return False
