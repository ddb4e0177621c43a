"""Labels of rows: what they are called, which number each is, and what a set of rows says of them; needs no PyTorch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

ONE, SEVERAL, VALUE = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = (ONE, SEVERAL, VALUE)
"""transformers' names: a row has one label, any number of them, or a value."""
NOTHING = -100  # the label of a token of which nothing is said, as PyTorch's cross-entropy has it
OUTSIDE = "O"  # the tag of what is in no entity


class WrongLabel(ValueError):
    """What is wrong with the label of a row."""


def called(label: Any) -> str:
    """The name of a label that a row has as text, as an integer, or as true or false."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int | str) and str(label).strip():
        return str(label)
    raise WrongLabel(f"{_shown(label)} is no label: expected a name or an integer")


def number(label: Any, names: Sequence[str]) -> int:
    """The place of a label among `names`. An integer is a place itself, unless the names are integers."""
    name = called(label)
    if name in names:
        return names.index(name)
    known = f"{', '.join(map(repr, names[:12]))}{', ...' if len(names) > 12 else ''}"
    if isinstance(label, int | float) and not isinstance(label, bool):
        if not any(n.lstrip("-").isdecimal() for n in names) and 0 <= label < len(names):
            return int(label)
        raise WrongLabel(f"{label} is out of range: there are {len(names)} labels ({known})")
    raise WrongLabel(f"{_shown(label)} is not among the {len(names)} labels ({known})")


def value(label: Any) -> float:
    """A label that is a number, written as one or as text."""
    if not isinstance(label, bool) and isinstance(label, int | float | str):
        try:
            made = float(label)
        except ValueError:
            made = math.nan
        if math.isfinite(made) and abs(made) < 3e38:
            return made
    raise WrongLabel(f"{_shown(label)} is no finite number, which problem_type={VALUE} learns")


def numbers(label: Any, names: Sequence[str], problem: str) -> tuple[float, ...]:
    """What a row is labelled with: the place of its one label; a 0 or 1 for each of several; its value."""
    if label is None:
        raise WrongLabel("the row has no label (null)")
    if problem == VALUE:
        return (value(label),)
    if problem == ONE:
        if isinstance(label, list | tuple | dict):
            raise WrongLabel(f"{_shown(label)} is no single label: use objective.problem_type={SEVERAL}")
        return (float(number(label, names)),)
    if not isinstance(label, list | tuple):
        raise WrongLabel(f"{_shown(label)} is no list of labels")
    if label and all(isinstance(each, float) for each in label):  # a 0 or 1 for each already
        if len(label) != len(names) or not set(label) <= {0.0, 1.0}:
            raise WrongLabel(f"{_shown(label)} is not a 0.0 or 1.0 for each of the {len(names)} labels")
        return tuple(label)
    places = {number(each, names) for each in label}
    return tuple(float(i in places) for i in range(len(names)))


def tags(labels: Any, names: Sequence[str]) -> list[int]:
    """The places of the tags of a row's words; -100 says nothing of a word."""
    if not isinstance(labels, list | tuple):
        raise WrongLabel(f"{_shown(labels)} is no list of tags")
    return [NOTHING if tag == NOTHING else number(tag, names) for tag in labels]


# ---------------------------------------------------------------------------- told from rows


@dataclass
class Tally:
    """What the labels of rows are: of which kind, their names, and how often each is there."""

    problem: str | None = None
    counts: Counter = field(default_factory=Counter)
    rows: int = 0

    @classmethod
    def of(cls, labels: Iterable[Any], problem: str | None = None) -> Tally:
        """Of rows' labels; those that are none are passed over, as their rows are bad and told later."""
        made, numeric, texts, lists = cls(problem), 0, 0, 0
        for label in labels:
            if isinstance(label, list | tuple):
                lists += 1
                found = label if not (label and all(isinstance(each, float) for each in label)) else _given(label)
            else:
                numeric += isinstance(label, float) and not label.is_integer()
                texts += isinstance(label, str)
                found = (label,)
            try:
                names = {called(each) for each in found if each is not None and each != NOTHING}
            except WrongLabel:
                if isinstance(label, float):  # no name, but a value
                    made.rows += 1
                continue
            made.rows += 1
            made.counts.update(names)
        if made.problem is None:
            made.problem = SEVERAL if lists else VALUE if numeric and not texts else ONE
        return made

    @property
    def names(self) -> list[str]:
        """In order: integers by size, others by their letters; the tag of what is outside of entities comes first."""
        whole = all(name.lstrip("-").isdecimal() for name in self.counts)
        return sorted(self.counts, key=lambda name: (name != OUTSIDE, int(name) if whole else 0, name))


def _given(label: Sequence[float]) -> list[int]:
    return [i for i, each in enumerate(label) if each]


def balanced(counts: Sequence[int], problem: str, rows: int) -> list[float]:
    """Weights that let each class count the same: rows / (K x rows of the class), as scikit-learn has it; of several
    labels, for each the rows without it over those with it."""
    if problem == SEVERAL:
        return [(rows - n) / n if n else 1.0 for n in counts]
    total = sum(counts)
    return [total / (len(counts) * n) if n else 1.0 for n in counts]


def _shown(label: Any) -> str:
    text = repr(label)
    return text if len(text) <= 60 else text[:60] + "..."


# ---------------------------------------------------------------------------- entities


BEGINS, GOES_ON, ENDS, ALONE = "B", "I", ("E", "L"), ("S", "U")  # IOB2; IOBES and BILOU have the last two
MARKS = (BEGINS, GOES_ON, *ENDS, *ALONE)


def entity_kinds(names: Sequence[str]) -> list[str]:
    """The kinds of entities that tags name (B-PER, I-PER, O); none where some tag is not of that form."""
    parts = [name.partition("-") for name in names if name != OUTSIDE]
    if not parts or any(mark not in MARKS or not kind for mark, _, kind in parts):
        return []
    return list(dict.fromkeys(kind for _, _, kind in parts))


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first, last + 1) of each entity in a row of tags: IOB2 (Ramshaw and Marcus 1995, with B where each one
    begins), or IOBES, which marks its last word E and an only word S; BILOU writes L and U for these.

    As in the shared task of CoNLL-2003, an I or E that does not go on with an entity of its kind begins one, and an
    entity that nothing ends is over where another, or none, begins.
    """
    found: list[tuple[str, int, int]] = []
    kind, start = "", 0
    for i, tag in enumerate([*tags, OUTSIDE]):
        mark, _, of = tag.partition("-")
        if kind and (mark not in (GOES_ON, *ENDS) or of != kind):
            found.append((kind, start, i))
            kind = ""
        if mark in MARKS and not kind:
            kind, start = of, i
        if mark in (*ENDS, *ALONE):
            found.append((kind, start, i + 1))
            kind = ""
    return found
