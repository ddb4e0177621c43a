"""Characters: slips of the keyboard, swaps, drops, misreadings and wrong case, in texts that are a model's input.

Training on noised inputs: https://arxiv.org/abs/1711.02173 (Belinkov and Bisk).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

from pydantic import Field

from .noise import Edit, Noise
from .way import Draw

LAYOUTS = {
    "qwerty": ("qwertyuiop", "asdfghjkl", "zxcvbnm"), "qwertz": ("qwertzuiopü", "asdfghjklöä", "yxcvbnm"),
    "azerty": ("azertyuiop", "qsdfghjklm", "wxcvbn"),
}  # fmt: skip
MISREAD = {  # how scanned letters are mistaken
    "l": ("1", "I", "i"), "I": ("l", "1"), "i": ("l", "j"), "o": ("0", "c"), "O": ("0", "Q"), "s": ("5",), "S": ("5",),
    "B": ("8",), "b": ("6", "h"), "g": ("9", "q"), "z": ("2",), "Z": ("2",), "m": ("rn",), "w": ("vv",), "d": ("cl",),
    "e": ("c",), "c": ("e",), "h": ("b",), "n": ("u", "ri"), "u": ("n",), "t": ("f",), "f": ("t",), "G": ("6",),
    "D": ("0",), "v": ("y",), "y": ("v",), "q": ("g",), "a": ("o",), "E": ("F",),
}  # fmt: skip

Kind = Literal["keyboard", "swap", "drop", "ocr", "case"]


class Characters(Noise):
    """Each letter that may be changed is, with the chance `rate`, by one of the kinds that can change it."""

    kind: Literal["characters"] = "characters"
    rate: float = Field(0.05, gt=0.0, le=1.0)
    """Of the letters that may be changed, the share that is; at least one in each new row."""
    kinds: list[Kind] = Field(["keyboard", "swap", "drop", "ocr", "case"], min_length=1)
    """`keyboard`: a neighbouring key; `swap`: with the next letter; `drop`; `ocr`: as a scan is misread; `case`."""
    layout: Literal["qwerty", "qwertz", "azerty"] = "qwerty"
    """Of the keyboard."""

    def edits(self, text: str, free: Sequence[bool], words: Sequence[re.Match], draw: Draw, tagged: bool) -> list[Edit]:
        places = [
            (at, stop) for word, may in zip(words, free) if may for at in range(*word.span())
            if text[at].isalpha() for stop in (word.end(),)
        ]  # fmt: skip
        made: list[Edit] = []
        taken: dict[int, int] = {}  # letters left in a word, by where it ends
        for at, stop in places:
            if draw.number() < self.rate and (not made or made[-1].stop <= at):
                self._change(text, at, stop, draw, made, taken)
        if not made:
            for at, stop in draw.some(places, len(places)):
                if self._change(text, at, stop, draw, made, taken):
                    break
        return made

    def _change(self, text: str, at: int, stop: int, draw: Draw, made: list[Edit], dropped: dict[int, int]) -> bool:
        kinds = [kind for kind in self.kinds if self._can(kind, text, at, stop, dropped)]
        if not kinds:
            return False
        kind = draw.one(kinds)
        if kind == "swap":
            made.append(Edit(at, at + 2, text[at + 1] + text[at]))
            return True
        if kind == "drop":
            dropped[stop] = dropped.get(stop, 0) + 1
            made.append(Edit(at, at + 1, ""))
            return True
        made.append(Edit(at, at + 1, self._other(kind, text[at], draw)))
        return True

    def _can(self, kind: str, text: str, at: int, stop: int, dropped: Mapping[int, int]) -> bool:
        letter = text[at]
        if kind == "keyboard":
            return letter.lower() in neighbours(self.layout)
        if kind == "ocr":
            return letter in MISREAD
        if kind == "case":
            return len(letter.swapcase()) == 1 and letter.swapcase() != letter
        if kind == "swap":
            return at + 1 < stop and text[at + 1].isalpha() and text[at + 1] != letter
        start = stop  # a word keeps a character
        while start and not text[start - 1].isspace():
            start -= 1
        return stop - start - dropped.get(stop, 0) > 1

    def _other(self, kind: str, letter: str, draw: Draw) -> str:
        if kind == "case":
            return letter.swapcase()
        if kind == "ocr":
            return draw.one(MISREAD[letter])
        near = draw.one(neighbours(self.layout)[letter.lower()])
        return near.upper() if letter.isupper() else near


@lru_cache
def neighbours(layout: str) -> Mapping[str, str]:
    """The letters around each letter of a keyboard, whose rows stand half a key further right from one to the next."""
    where = {key: (x + 0.5 * y, y) for y, row in enumerate(LAYOUTS[layout]) for x, key in enumerate(row)}
    return {
        key: "".join(k for k, (p, q) in where.items() if k != key and abs(p - x) <= 1 and abs(q - y) <= 1)
        for key, (x, y) in where.items()
    }
