"""Agreement of annotators against scikit-learn, the papers' own tables, and numbers worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
from sklearn.metrics import cohen_kappa_score

from luthier.prepare.agreement import cohen, fleiss, krippendorff, summary


@pytest.mark.parametrize("weights", [None, "linear", "quadratic"])
def test_cohen_is_that_of_scikit_learn(weights):
    rng = random.Random(0)
    for labels in (2, 3, 5):
        first = [rng.randrange(labels) for _ in range(200)]
        second = [a if rng.random() < 0.6 else rng.randrange(labels) for a in first]
        assert cohen(first, second, weights) == pytest.approx(
            cohen_kappa_score(first, second, weights=weights), abs=1e-12
        )


def test_cohen_by_hand():
    """45 rows both say yes, 25 and 15 differ, 15 both no: agreed 0.6, by chance 0.6 x 0.7 + 0.4 x 0.3 = 0.54."""
    first = ["yes"] * 45 + ["yes"] * 15 + ["no"] * 25 + ["no"] * 15
    second = ["yes"] * 45 + ["no"] * 15 + ["yes"] * 25 + ["no"] * 15
    assert cohen(first, second) == pytest.approx((0.6 - 0.54) / (1 - 0.54))


def test_cohen_with_an_order_of_its_own():
    """low < middle < high is not the order of the alphabet: a step from low to middle costs half of one to high."""
    first, second = ["low", "low", "high", "middle"], ["middle", "low", "high", "high"]
    order = ["low", "middle", "high"]
    codes = [order.index(name) for name in first], [order.index(name) for name in second]
    assert cohen(first, second, "linear", order) == pytest.approx(cohen_kappa_score(*codes, weights="linear"))
    assert cohen(first, second, "linear", order) != pytest.approx(cohen(first, second, "linear"))


def test_fleiss_of_the_well_known_table():
    """Ten rows, fourteen raters, five categories, as worked through on Wikipedia's page of the kappa: 0.210."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    rows = [[c for c, n in enumerate(row) for _ in range(n)] for row in table]
    assert fleiss(rows) == pytest.approx(0.20993, abs=1e-5)


KRIPPENDORFF = [  # the example of his paper of 2011: four observers, twelve units, None where nobody said anything
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorff_of_his_own_example(level, alpha):
    rows = [[label for label in unit if label is not None] for unit in zip(*KRIPPENDORFF)]
    assert krippendorff(rows, level) == pytest.approx(alpha, abs=5e-4)


def test_bounds_and_what_cannot_be_told():
    assert cohen("aabb", "aabb") == 1
    assert cohen("aabb", "bbaa") == -1
    assert fleiss(["ab", "ab"]) == -1
    assert fleiss(["aaa", "bbb"]) == krippendorff(["aa", "bbb"]) == 1
    assert all(math.isnan(figure) for figure in (cohen("aa", "aa"), fleiss(["aa"]), krippendorff(["a"]), cohen([], [])))
    with pytest.raises(ValueError, match="2 labels of the one and 1"):
        cohen("ab", "a")
    with pytest.raises(ValueError, match="as many labels of each row"):
        fleiss(["aa", "aaa"])


def test_a_summary_says_who_agrees_with_whom():
    """On rows 0 to 3 ann and bo differ at row 3; cy labelled two of them."""
    votes = {"ann": dict(enumerate("xxyy")), "bo": dict(enumerate("xxyx")), "cy": {0: "x", 9: "y"}}
    told = summary(votes)
    assert told["annotators"] == {"ann": 4, "bo": 4, "cy": 2}
    assert (told["rows"], told["compared"], told["same"]) == (5, 4, 0.75)
    assert told["pairs"]["ann, bo"] == {"rows": 4, "same": 0.75, "cohen": 0.5}
    assert told["pairs"]["ann, cy"] == {"rows": 1, "same": 1.0, "cohen": None}
    assert told["fleiss"] is None  # row 0 has three labels, others two
    assert told["krippendorff"] == pytest.approx(krippendorff(["xxx", "xx", "yy", "yx"]), abs=1e-6)
    assert summary({"ann": {0: "x"}})["krippendorff"] is None
