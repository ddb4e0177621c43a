"""Texts as words, spans of characters as tags of words (IOB2: B-, I-, O), and back."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ...labels import OUTSIDE

JOINERS = ("\u200c", "\u200d")  # of no width, between letters or signs
WORD = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]")


class Span(NamedTuple):
    """Characters [start, end) of a text, counted as Python does (code points), and their label."""

    start: int
    end: int
    label: str


class Words(NamedTuple):
    text: str
    borders: list[tuple[int, int]]  # of each word in the text

    def all(self) -> list[str]:
        return [self.text[start:end] for start, end in self.borders]


def words_of(values: Mapping) -> Words:
    """The words of a row: its `tokens`, which stand with blanks between them, or those found in its `text`."""
    tokens = values.get("tokens")
    if tokens is None:
        text = values["text"]
        return Words(text, _borders(text))
    borders, at = [], 0
    for token in tokens:
        borders.append((at, at + len(token)))
        at += len(token) + 1
    return Words(" ".join(tokens), borders)


def _borders(text: str) -> list[tuple[int, int]]:
    """Accents, vowel signs and joiners belong to what they stand on: no word is torn, and no emoji of several signs."""
    made: list[tuple[int, int]] = []
    for match in WORD.finditer(text):
        start, end = match.span()
        if made and made[-1][1] == start and not text[start - 1 : start + 1].isascii():
            first, before, here = text[made[-1][0]], text[start - 1], text[start]
            goes_on = here.isalnum() and _on_a_letter(before) and (first.isalnum() or _on_a_letter(first))
            joins = _on_a_letter(here) or here in JOINERS or "\U0001f3fb" <= here <= "\U0001f3ff" or before in JOINERS
            if joins or goes_on:
                made[-1] = (made[-1][0], end)
                continue
        made.append((start, end))
    return made


def _on_a_letter(letter: str) -> bool:
    return unicodedata.category(letter)[0] == "M"


def snapped(words: Words, spans: Sequence[Span]) -> list[Span]:
    """The spans widened to whole words, in order; one without any word is left out. ValueError where two overlap."""
    made = []
    for span in spans:
        inside = [b for b in words.borders if b[0] < span.end and b[1] > span.start]
        if inside:
            made.append(Span(inside[0][0], inside[-1][1], span.label))
    made.sort()
    for one, other in pairwise(made):
        if other.start < one.end:
            raise ValueError(
                f"spans overlap: {words.text[one.start : one.end]!r} and {words.text[other.start : other.end]!r}"
            )
    return made


def tags(words: Words, spans: Sequence[Span]) -> list[str]:
    """A tag for each word; the spans are of whole words and do not overlap."""
    made = [OUTSIDE] * len(words.borders)
    for span in spans:
        inside = [i for i, b in enumerate(words.borders) if b[0] < span.end and b[1] > span.start]
        for i in inside:
            made[i] = f"{'B' if i == inside[0] else 'I'}-{span.label}"
    return made


def spans_of(words: Words, found: Sequence[str]) -> list[Span]:
    """The spans that tags tell; one that goes on (I-) where none of its label began begins one."""
    made: list[Span] = []
    last = OUTSIDE  # the label that the word before is in
    for (start, end), tag in zip(words.borders, found):
        mark, _, label = tag.partition("-")
        if mark == "I" and label == last:
            made[-1] = made[-1]._replace(end=end)
        elif mark in ("B", "I") and label:
            made.append(Span(start, end, label))
        last = label if mark in ("B", "I") else OUTSIDE
    return made
