"""Near duplicates: normal texts, shingles, the MinHash estimate, bands, clusters, and rows that stay."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.prepare import lsh, minhash
from luthier.prepare.clusters import Clusters
from luthier.prepare.normal import normal


def plain(text: str, unit: str, size: int) -> set:
    """Shingles as tuples, by the definition."""
    units = list(text.ljust(size)) if unit == "characters" else text.split(" ")
    units += [""] * (size - len(units))
    return {tuple(units[i : i + size]) for i in range(len(units) - size + 1)}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello,   WORLD!\n", "hello world"),
        ("it's a_b-c 3.5", "it s a b c 3 5"),
        ("Ｆｕｌｌ ﬁne", "full fine"),
        ("Cafe\u0301 CAFÉ", "café café"),
        ("ΟΔΟΣ οδός", "οδοσ οδόσ"),
        ("你好，world", "你 好 world"),
        ("“Zitat” – so…", "zitat so"),
        ("हिन्दी में", "हिन्दी में"),
        ("?!…", ""),
    ],
)
def test_normal(text, expected):
    assert normal(text) == expected


@settings(deadline=None)
@given(st.text(max_size=60))
def test_normal_texts_stay_as_they_are(text):
    once = normal(text)
    assert normal(once) == once
    assert normal(f" {text}\n") == once


@settings(deadline=None)
@given(st.text("abcXYZ ,.-09", max_size=60))
def test_ascii_goes_the_same_way_as_other_text(text):
    assert normal(text + " é") == (normal(text) + " é").strip()


WORDS = st.lists(st.text("abcé你", min_size=1, max_size=4), min_size=1, max_size=12).map(" ".join)


@settings(deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=6), st.sampled_from(["characters", "words"]), st.integers(1, 6))
def test_shingles_are_those_of_the_definition(texts, unit, size):
    """As many of each row, equal where their units are, also beside other rows."""
    made = minhash.shingles(texts, unit, size)
    numbers: dict[tuple, int] = {}
    ends = [*made.starts[1:].tolist(), len(made.hashes)]
    for text, start, end in zip(texts, made.starts.tolist(), ends):
        units = list(text.ljust(size)) if unit == "characters" else text.split(" ")
        units += [""] * (size - len(units))
        runs = [tuple(units[i : i + size]) for i in range(len(units) - size + 1)]
        assert len(runs) == end - start
        for run, value in zip(runs, made.hashes[start:end].tolist()):
            assert numbers.setdefault(run, value) == value
    assert len(set(numbers.values())) == len(numbers)
    values, counts = made.sets()
    assert counts.tolist() == [len(plain(text, unit, size)) for text in texts]
    parts = np.split(values, np.cumsum(counts)[:-1])
    assert all((np.diff(part.astype(np.int64)) > 0).all() for part in parts)


def test_texts_that_stand_apart_share_no_shingle():
    for unit, size in (("characters", 3), ("words", 1)):
        made = minhash.shingles(["good bad", "good bad"], unit, size, [(1, 5, 8)])
        values, counts = made.sets()
        both = np.split(values, [counts[0]])
        expected = {"characters": {"goo", "ood", "od "}, "words": {"good"}}[unit]
        assert len(set(both[0].tolist()) & set(both[1].tolist())) == len(expected)


SETS = st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 1 << 30))


@settings(max_examples=60, deadline=None)
@given(SETS)
def test_signatures_agree_as_often_as_sets_are_alike(drawn):
    """The estimate over 512 hashes has the standard deviation sqrt(J (1 - J) / 512); six of them are never passed."""
    shared, left, right, seed = drawn
    if not shared + min(left, right):
        left, right = left + 1, right + 1
    values = np.random.default_rng(seed).choice(1 << 32, shared + left + right, replace=False).astype(np.uint32)
    a, b = values[: shared + left], np.concatenate([values[:shared], values[shared + left :]])
    if not len(a) or not len(b):
        return
    of = minhash.Shingles(np.concatenate([a, b]), np.array([0, len(a)]))
    made = minhash.signatures(of, 512)
    true = shared / (shared + left + right)
    assert abs((made[:, 0] == made[:, 1]).mean() - true) <= 6 * math.sqrt(true * (1 - true) / 512) + 1e-12


def test_the_estimate_has_no_bias():
    """Over 400 pairs of sets with J = 0.5 the mean error is within four standard errors of 0, as is its spread."""
    random = np.random.default_rng(0)
    errors = []
    for _ in range(400):
        values = random.choice(1 << 32, 150, replace=False).astype(np.uint32)  # 50 shared, 50 + 50 of one only: J = 1/3
        of = minhash.Shingles(np.concatenate([values[:100], values[:50], values[100:]]), np.array([0, 100]))
        made = minhash.signatures(of, 128)
        errors.append((made[:, 0] == made[:, 1]).mean() - 1 / 3)
    one = math.sqrt(1 / 3 * 2 / 3 / 128)
    assert abs(np.mean(errors)) < 4 * one / math.sqrt(400)
    assert 0.85 * one < np.std(errors) < 1.15 * one


def test_bands_by_hand():
    """0.6 ** 4 = 0.1296 and 1 - 0.8704 ** 32 = 0.988; with five values 1 - (1 - 0.07776) ** 25 = 0.868."""
    assert minhash.bands_for(0.6, 128, 0.95) == (32, 4)
    assert minhash.found(0.6, 32, 4) == pytest.approx(0.98822, abs=1e-5)
    assert minhash.found(0.6, 25, 5) == pytest.approx(0.86784, abs=1e-5)
    assert minhash.bands_for(1.0, 128, 0.95) == (1, 128)
    assert minhash.bands_for(0.01, 16, 0.95) == (0, 0)


def test_bands_are_equal_where_their_values_are():
    signature = np.random.default_rng(0).integers(0, 1 << 32, (12, 3), np.uint32)
    signature[:, 1] = signature[:, 0]
    signature[4, 1] += 1  # in the second of four bands of three values
    made = minhash.banded(signature, 4, 3)
    assert (made[:, 0] == made[:, 1]).tolist() == [True, False, True, True]
    assert not (made[:, 0] == made[:, 2]).any()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60), st.integers(1, 5))
def test_clusters_are_connected_components(edges, parts):
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    made = Clusters(41)
    for part in np.array_split(np.array(edges, np.int64).reshape(-1, 2), parts):
        made.unite(part[:, 0], part[:, 1])
    found = made.all()
    a, b = np.array(edges, np.int64).reshape(-1, 2).T
    _, labels = connected_components(coo_matrix((np.ones(len(a)), (a, b)), (41, 41)), directed=False)
    first = {int(label): i for i, label in reversed(list(enumerate(labels)))}
    assert found.tolist() == [first[int(label)] for label in labels]


def test_pairs_of_few_are_all_and_of_many_grow_with_their_number(monkeypatch):
    values, rows = np.array([7, 9, 7, 7, 5], np.uint32), np.array([10, 11, 12, 13, 14])
    found = sorted((int(x), int(y)) for a, b in lsh.pairs(values, rows) for x, y in zip(a, b))
    assert found == [(10, 12), (10, 13), (12, 13)]
    monkeypatch.setattr(lsh, "WINDOW", 3)
    found = [(int(x), int(y)) for a, b in lsh.pairs(np.zeros(50, np.uint32), np.arange(50)) for x, y in zip(a, b)]
    assert len(found) == len(set(found)) == 49 + 48 + 47 + 46  # three before each, and the first
    assert {y for x, y in found if x == 0} == set(range(1, 50))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.frozensets(st.integers(0, 30), min_size=1, max_size=20), min_size=2, max_size=8), st.integers(1, 40))
def test_similarities_are_true_ones(given, together):
    with lsh.Sets(np.arange(len(given)) * 3) as sets:
        for one in given:
            sets.add(np.array(sorted(one), np.uint32), np.array([len(one)]))
    a, b = (x.ravel() for x in np.meshgrid(np.arange(len(given)), np.arange(len(given))))
    before, lsh.TOGETHER = lsh.TOGETHER, together
    try:
        made, bounded = sets.jaccard(a * 3, b * 3), sets.jaccard(a * 3, b * 3, 0.5)
    finally:
        lsh.TOGETHER = before
    expected = [jaccard(set(given[x]), set(given[y])) for x, y in zip(a, b)]
    assert made.tolist() == pytest.approx(expected)
    assert ((bounded >= 0.5) == (np.array(expected) >= 0.5)).all()


def test_which_stays():
    clusters = Clusters(6)
    clusters.unite(np.array([1, 3]), np.array([3, 5]))
    sizes = np.array([9, 2, 7, 5, 1, 5])
    assert lsh.kept(clusters, sizes, longest=False).tolist() == [0, 1, 2, 1, 4, 1]
    assert lsh.kept(clusters, sizes, longest=True).tolist() == [0, 3, 2, 3, 4, 3]


def test_what_was_not_compared_is_once_rows_are_gone(monkeypatch):
    """All in one band: 0 ~ 2 and 1 ~ 3. Each beside the one before and the first only, 1 and 3 meet when 2 is gone."""
    monkeypatch.setattr(lsh, "WINDOW", 1)
    with lsh.Sets(np.arange(4)) as sets:
        for values in ([1, 2, 3], [7, 8, 9], [1, 2, 3, 4], [7, 8, 9, 10]):
            sets.add(np.array(values, np.uint32), np.array([len(values)]))
    clusters = Clusters(4)
    of = lsh.Banded(lambda which: np.zeros(4, np.uint32), 1, np.zeros((4, 1), np.uint64), 0)
    assert lsh.unite_near(clusters, of, np.arange(4), sets, 0.7)
    assert clusters.all().tolist() == [0, 1, 0, 3]
    clusters, sizes = Clusters(4), np.array([3, 3, 4, 4])
    lsh.clustered(clusters, of, np.arange(4), sets, 0.7, lambda: lsh.kept(clusters, sizes, longest=False))
    assert clusters.all().tolist() == [0, 1, 0, 1]


def test_sketches_tell_apart_what_is_not_alike():
    """At J = 0.5 a bit agrees with 0.75: 64 of 256 differ, with a deviation of 6.93, so up to 85; unlike rows, 128."""
    assert minhash.most_differing(0.5, 256) == 85
    random = np.random.default_rng(0)
    values = random.choice(1 << 32, 3 * 200 * 300, replace=False).astype(np.uint32).reshape(300, 3, 200)
    alike = np.concatenate([values[:, :2].reshape(300, -1), values[:, [0]].reshape(300, -1)[:, :200]], 1)  # a, b | a
    alike = alike.reshape(-1)
    starts = np.arange(300) * 600
    of = minhash.Shingles(alike, np.sort(np.concatenate([starts, starts + 400])))
    made = minhash.sketches(minhash.signatures(of, 256))
    assert made.shape == (600, 4)
    near, far = minhash.differing(made[::2], made[1::2]), minhash.differing(made[:-2:2], made[2::2])
    assert near.mean() == pytest.approx(64, abs=2)
    assert far.mean() == pytest.approx(128, abs=2)
    assert (near <= 85).mean() > 0.99
    assert (far > 85).all()
    assert minhash.differing(np.array([[3]], np.uint64), np.array([[5]], np.uint64)).tolist() == [2]
