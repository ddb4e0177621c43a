"""Words: some are deleted, swapped with the next, or said twice; tags go with their words.

Easy data augmentation: https://arxiv.org/abs/1901.11196.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from .noise import Edit, Noise
from .way import Draw, Given, Refused

Kind = Literal["delete", "swap", "repeat"]
TAGS = ("ner_tags", "tags", "labels")
ENTITY = re.compile(r"[BIESLUM][-_]")  # how tags of several words begin


class Change(NamedTuple):
    kind: str
    at: int  # the number of the word


class Words(Noise):
    """Each word that may be changed is, with the chance `rate`. Words of a labelled stretch stay where they are."""

    moves_words: ClassVar = True

    kind: Literal["words"] = "words"
    rate: float = Field(0.1, gt=0.0, le=1.0)
    """Of the words that may be changed, the share that is; at least one in each new row."""
    kinds: list[Kind] = Field(["delete", "swap", "repeat"], min_length=1)
    """`delete`; `swap`: with the next word; `repeat`: say it twice."""

    def edits(self, text: str, free: Sequence[bool], words: Sequence[re.Match], draw: Draw, tagged: bool) -> list[Edit]:
        made = []
        for kind, at in self.changes(free, draw):
            start, stop = words[at].span()
            if kind == "repeat":
                made.append(Edit(stop, stop, f" {words[at][0]}"))
            elif kind == "swap":
                made += [Edit(start, stop, words[at + 1][0]), Edit(*words[at + 1].span(), words[at][0])]
            elif at + 1 < len(words):
                made.append(Edit(start, words[at + 1].start(), ""))
            else:  # with what parts it from the last word before it that stays
                while made and not made[-1].text and made[-1].stop == words[at].start():
                    made.pop()
                    at -= 1
                made.append(Edit(words[at - 1].end() if at else 0, stop, ""))
        return made

    def changes(self, free: Sequence[bool], draw: Draw) -> list[Change]:
        """What is done to words, rising; no word twice, and one at least stays."""
        made: list[Change] = []
        for at in range(len(free)):
            if free[at] and draw.number() < self.rate and not (made and _last(made[-1]) >= at):
                self._change(at, free, draw, made)
        if not made:
            for at in draw.some([i for i, may in enumerate(free) if may], len(free)):
                if self._change(at, free, draw, made):
                    break
        return made

    def _change(self, at: int, free: Sequence[bool], draw: Draw, made: list[Change]) -> bool:
        deleted = sum(change.kind == "delete" for change in made)
        can = {"delete": len(free) - deleted > 1, "swap": at + 1 < len(free) and free[at + 1], "repeat": True}
        kinds = [kind for kind in self.kinds if can[kind]]
        if kinds:
            made.append(Change(draw.one(kinds), at))
        return bool(kinds)

    def changed(self, given: Given, draw: Draw) -> dict:
        tagged = given.seen.format in ("ner_tags", "tags", "token_labels")
        return self._tagged(given, draw) if tagged else super().changed(given, draw)

    def _tagged(self, given: Given, draw: Draw) -> dict:
        """Words of one tag may be changed with it; those of entities, which may have several, stay."""
        words: list[str] = given.seen.values["tokens"]
        key = next(name for name in TAGS if name in given.seen.values)
        tags: Any = given.seen.values[key]
        given.asked()
        if not isinstance(tags, list) or len(tags) != len(words):
            raise Refused(f"{key} has not one tag for each word")
        if not all(isinstance(tag, str) for tag in tags):
            raise Refused("its tags are numbers, which do not tell where an entity ends: give their names")
        free = [may and not ENTITY.match(tag) for may, tag in zip(self._free_words(words), tags)]
        order = list(range(len(words)))
        changes = self.changes(free, draw)
        if not changes:
            raise Refused("nothing in it may be changed")
        for kind, at in reversed(changes):
            if kind == "swap":
                order[at], order[at + 1] = order[at + 1], order[at]
            else:
                order[at : at + 1] = [at, at] if kind == "repeat" else []
        made = dict(given.values)
        for name, values in (("tokens", words), (key, tags)):
            made[given.column(name)] = [values[i] for i in order]
        return made

    def _free_words(self, words: Sequence[str]) -> list[bool]:
        found = [re.match(r"\S+", word) for word in words]
        return [match is not None and self.free(word, [match], frozenset())[0] for word, match in zip(words, found)]


def _last(change: Change) -> int:
    return change.at + (change.kind == "swap")
