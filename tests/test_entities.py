"""Figures of entities against seqeval's, on random rows of IOB2 and IOBES tags, well-formed or not."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval import scheme
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from luthier import classes, labels
from luthier.batch import Batch
from luthier.document import Document
from luthier.objectives import TokenClassification

KINDS = ("PER", "LOC", "a-b")  # a kind may have a hyphen
IOB2 = ["O", *(f"{mark}-{kind}" for kind in KINDS for mark in "BI")]
IOBES = ["O", *(f"{mark}-{kind}" for kind in KINDS for mark in "BIES")]
SCHEMES = {"IOB2": IOB2, "IOBES": IOBES}


class Saying:
    """A network whose likeliest tags are given."""

    def __init__(self, tags: list[int], count: int):
        self.tags, self.count = tags, count

    def scores(self, batch: Batch) -> torch.Tensor:
        return F.one_hot(torch.tensor(self.tags), self.count).float()


Rows = list[list[str]]


def figures(names: list[str], true: Rows, said: Rows, silent: list[list[int]]) -> dict[str, float]:
    """What an evaluation makes of rows of tags; `silent` are places where a row says nothing of a word."""
    documents, found = [], []
    for number, (row, other, left_out) in enumerate(zip(true, said, silent)):
        tags = np.array([labels.NOTHING if i in left_out else names.index(tag) for i, tag in enumerate(row)], np.int32)
        tokens = np.arange(len(row), dtype=np.int32)
        documents.append(Document(tokens, np.zeros(len(row), np.float32), number, token_labels=tags))
        found += [names.index(tag) for tag in other]
    objective = TokenClassification(labels=names).build()  # type: ignore[call-arg]
    loss = objective.evaluate(Saying(found, len(names)), Batch.pack(documents))
    columns = {name: column.numpy() for name, column in loss.metrics.items()}
    return {name: figure.value for name, figure in classes.figures(columns).items()}


@st.composite
def rows(draw, names: list[str]):
    """Rows of tags, any after any; what is said of them, mostly the same; and places that say nothing."""
    tags = st.sampled_from(names)
    true = draw(st.lists(st.lists(tags, min_size=1, max_size=12), min_size=1, max_size=5))
    said = [[draw(tags) if draw(st.integers(0, 2)) == 0 else tag for tag in row] for row in true]
    silent = [[i for i in range(1, len(row)) if draw(st.integers(0, 5)) == 0] for row in true]
    return true, said, silent


def heard(row: list[str], silent: list[int]) -> list[str]:
    return [tag for i, tag in enumerate(row) if i not in silent]


@pytest.mark.parametrize("names", SCHEMES.values(), ids=SCHEMES)
def test_figures_are_those_of_seqeval(names):
    """Its default mode is the rule of CoNLL-2003's script, as here. Words that no tag is of are left out of both."""

    @given(rows(names))
    @settings(max_examples=150, deadline=None, derandomize=True)
    def compared(drawn):
        true, said, silent = drawn
        found = figures(names, true, said, silent)
        pair = [[heard(row, left_out) for row, left_out in zip(of, silent)] for of in (true, said)]
        assert found["accuracy"] == pytest.approx(accuracy_score(*pair))
        given = {"zero_division": 0}
        assert found["entity_precision"] == pytest.approx(precision_score(*pair, **given))
        assert found["entity_recall"] == pytest.approx(recall_score(*pair, **given))
        assert found["entity_f1"] == pytest.approx(f1_score(*pair, **given))
        kinds = sorted({kind for of in pair for row in of for kind, *_ in get_entities(row)})
        if kinds:
            assert found["entity_f1_macro"] == pytest.approx(f1_score(*pair, average="macro", **given))
        for kind, wanted in zip(kinds, f1_score(*pair, average=None, **given) if kinds else ()):
            assert found[f"entity_f1.{kind}"] == pytest.approx(wanted), kind
        assert all(found[f"entity_f1.{kind}"] == 0 for kind in set(KINDS) - set(kinds))

    compared()


@pytest.mark.parametrize("names", SCHEMES.values(), ids=SCHEMES)
def test_entities_are_those_of_seqeval(names):
    """One row at a time, which alone tells borders; seqeval's are inclusive."""
    drawn = random.Random(0)
    for _ in range(3000):
        row = [drawn.choice(names) for _ in range(drawn.randint(0, 9))]
        assert labels.entities(row) == [(kind, a, b + 1) for kind, a, b in get_entities(row)], row


def written(spans: list[tuple[str, int, int]], length: int, name: str) -> list[str]:
    """The tags of these entities."""
    row = ["O"] * length
    for kind, start, stop in spans:
        for i in range(start, stop):
            mark = "B" if i == start else "I"
            if name != "IOB2" and i == stop - 1:
                mark = "S" if i == start else "E"
            row[i] = f"{mark}-{kind}"
    return row


def spans_of(drawn: random.Random) -> tuple[list[tuple[str, int, int]], list[tuple[str, int, int]], int]:
    """Entities, what is said of them (another kind, less, nothing, or the same), and how many words there are."""
    true, said, at = [], [], 0
    for _ in range(drawn.randint(1, 4)):
        start = at + drawn.randint(0, 2)
        kind, at = drawn.choice(KINDS), start + drawn.randint(1, 3)
        true.append((kind, start, at))
        wrong = [(drawn.choice(KINDS), start, at), (kind, start, max(start + 1, at - 1)), None]
        said.append(drawn.choice([(kind, start, at)] * 3 + wrong))
    return true, [span for span in said if span is not None], at


def test_well_formed_rows_have_one_reading():
    """seqeval's strict mode, which takes rows as the scheme has them alone, agrees; BILOU is IOBES in other letters."""
    drawn = random.Random(1)
    for name, of in (("IOB2", scheme.IOB2), ("IOBES", scheme.IOBES)):
        made = [spans_of(drawn) for _ in range(200)]
        true, said = ([written(row[side], row[2], name) for row in made] for side in (0, 1))
        assert [labels.entities(row) for row in true] == [spans for spans, *_ in made]
        strict = f1_score(true, said, mode="strict", scheme=of)
        assert figures(SCHEMES[name], true, said, [[]] * len(true))["entity_f1"] == pytest.approx(strict)
        assert 0.3 < strict < 0.95
    letters = {"S": "U", "E": "L"}
    for row in true:
        bilou = [letters.get(tag[0], tag[0]) + tag[1:] for tag in row]
        assert labels.entities(bilou) == labels.entities(row)
        assert labels.entity_kinds(bilou) == labels.entity_kinds(row) != []


def test_where_strict_mode_differs():
    """By hand: O I-LOC against O B-LOC. The rule of CoNLL-2003 has the entity (LOC, 1, 2) in both: F1 is 1. IOB2 taken
    strictly has none in the first, where nothing begins: F1 is 0. Models say such rows, so they are counted here."""
    said, true = [["O", "I-LOC"]], [["O", "B-LOC"]]
    assert f1_score(true, said, mode="strict", scheme=scheme.IOB2, zero_division=0) == 0
    assert f1_score(true, said) == figures(IOB2, true, said, [[]])["entity_f1"] == 1


def test_tags_of_no_scheme_name_no_entities():
    """seqeval warns of them, and makes entities of parts of speech; here figures of tags alone are left."""
    names = ["NOUN", "VERB"]
    found = figures(names, [["NOUN", "VERB"]], [["NOUN", "NOUN"]], [[]])
    assert found["accuracy"] == 0.5
    assert not any(name.startswith("entity") for name in found)
    assert labels.entity_kinds(["O", "B-PER", "X-PER"]) == []
    assert labels.entity_kinds(["O", "B", "I"]) == []
